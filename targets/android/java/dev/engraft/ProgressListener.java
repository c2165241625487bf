package dev.engraft;

/** Receives progress. */
public interface ProgressListener {
    /**
     * Called on the thread of the call that it was given to; false cancels that call. What this throws cancels it,
     * too, and is thrown again by it.
     */
    boolean onProgress(Progress progress);
}
