package dev.engraft;

/** How to make a session. Zero is the default for every field. */
public final class SessionParams {
    /** Tokens of the context (0: what the model was trained on, up to 4096). */
    public int ctxSize;
    /** {@code Engraft.CACHE_*}. */
    public int cacheType;
    /** Threads (0: as many as there are cores). Give parallel sessions 1 each. */
    public int threads;
    /** True keeps activations in 32 bits. */
    public boolean exact;
}
