package dev.engraft;

/** How to load an adapter. Zero is the default for every field. */
public final class AdapterParams {
    /** True accepts an adapter made for another base if its shapes fit. */
    public boolean forceBase;
    /** Factor on its effect (0: 1, as trained). */
    public float scale;
    /** Threads for loading it (0: as many as there are cores). */
    public int threads;
}
