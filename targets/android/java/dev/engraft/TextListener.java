package dev.engraft;

/** Receives text as it is generated. */
public interface TextListener {
    /**
     * Called on the thread of the call that it was passed to, with whole characters; returning false stops that call.
     * An exception stops it, too, and the call rethrows it.
     */
    boolean onText(String text);
}
