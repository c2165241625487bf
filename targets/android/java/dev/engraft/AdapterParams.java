package dev.engraft;

/** How an adapter is loaded. Zero is the default of everything. */
public final class AdapterParams {
    /** True takes an adapter of another base, if its shapes are this one's. */
    public boolean forceBase;
    /** What its effect is multiplied by (0: 1, as trained). */
    public float scale;
    /** Threads for loading it (0: as many as there are cores). */
    public int threads;
}
