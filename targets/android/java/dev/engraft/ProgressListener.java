package dev.engraft;

/** Receives progress. */
public interface ProgressListener {
    /**
     * Called on the thread of the call that it was passed to; returning false cancels that call. An exception cancels
     * it, too, and the call rethrows it.
     */
    boolean onProgress(Progress progress);
}
