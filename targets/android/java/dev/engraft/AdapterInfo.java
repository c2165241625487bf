package dev.engraft;

/** Facts about an adapter. */
public final class AdapterInfo {
    /**
     * {@code Engraft.KIND_ADAPTER}, {@code Engraft.KIND_FEW_SHOT} or {@code Engraft.KIND_BASE}; for the last two
     * all else is 0.
     */
    public int kind;
    /** The largest rank of a projection. */
    public int rank;
    /** True for DoRA. */
    public boolean dora;
    /** Parameters. */
    public long parameters;
    /** Steps that it was trained for. */
    public long steps;
    /** Trained tokens: those that counted in the loss. */
    public long tokens;
    /** Held-out loss of the base in nats per token; NaN if unknown. */
    public float validLossBefore;
    /** Held-out loss with the adapter; NaN if unknown. */
    public float validLossAfter;

    AdapterInfo() {}
}
