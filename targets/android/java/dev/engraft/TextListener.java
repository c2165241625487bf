package dev.engraft;

/** Takes text as it is generated. */
public interface TextListener {
    /**
     * Called on the thread of the call that it was given to, with whole characters; false stops that call. What
     * this throws stops it, too, and is thrown again by it.
     */
    boolean onText(String text);
}
