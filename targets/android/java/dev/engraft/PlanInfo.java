package dev.engraft;

/** What a plan says. */
public final class PlanInfo {
    /** True where it is within the budget, if there is one, and within what the machine leaves this process. */
    public boolean fits;
    /** Bytes of private memory at most: the sum of the pools. */
    public long privateBytes;
    /** Bytes of the model's file that are mapped beside them, which the system may drop. */
    public long mappedBytes;
    /** The budget that was asked about; 0 for none. */
    public long budgetBytes;
    /** Pools. */
    public long pools;

    PlanInfo() {}
}
