package dev.engraft;

/** A plan's figures. */
public final class PlanInfo {
    /** True if it is within the budget, if any, and within what the machine leaves this process. */
    public boolean fits;
    /** Maximum bytes of private memory: the sum of the pools. */
    public long privateBytes;
    /** Mapped bytes of the model's file, not part of the private memory; the system may drop them. */
    public long mappedBytes;
    /** The requested budget; 0 for none. */
    public long budgetBytes;
    /** Number of pools. */
    public long pools;

    PlanInfo() {}
}
