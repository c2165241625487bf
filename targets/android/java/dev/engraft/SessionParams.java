package dev.engraft;

/** How a session is made. Zero is the default of everything. */
public final class SessionParams {
    /** Tokens of the context (0: what the model was trained for, at most 4096). */
    public int ctxSize;
    /** {@code Engraft.CACHE_*}. */
    public int cacheType;
    /** Threads (0: as many as there are cores). Sessions that run side by side take 1 each. */
    public int threads;
    /** True keeps activations in 32 bits. */
    public boolean exact;
}
