package dev.engraft;

/** How an adapter is trained. Zero is the default of everything. */
public final class TrainParams {
    /** Rank of the adapter, at most 256 (0: 8). */
    public int rank;
    /** Alpha: the adapter's effect is multiplied by alpha/rank (0: twice the rank). */
    public float alpha;
    /** Share of the adapter's inputs that is set to zero while training, below 1. */
    public float dropout;
    /** {@code Engraft.MODULE_*}: what is adapted (0: all seven). */
    public int modules;
    /** How many of the last blocks are adapted (0: all). */
    public int numLayers;
    /** True for DoRA. */
    public boolean dora;
    /** True multiplies by alpha/sqrt(rank) instead. */
    public boolean rslora;
    /** Sequences of a batch (0: 1). */
    public int batchSize;
    /** Batches whose gradients are summed before a step (0: 1). */
    public int gradAccumulationSteps;
    /** {@code Engraft.SCHEDULE_*}. */
    public int schedule;
    /** Steps in which the learning rate rises from zero. */
    public int warmupSteps;
    /** Optimizer steps of the whole run (0: 300). */
    public long steps;
    /** Learning rate at its highest (0: 2e-4). */
    public double learningRate;
    /** AdamW's decoupled weight decay. */
    public double weightDecay;
    /** Gradients are scaled down to this norm (0: 1; below 0: never). */
    public double maxGradNorm;
    /** LoRA+: the learning rate of B as a multiple of A's (0: 1). */
    public double loraPlusRatio;
    /** Weight of the divergence from the base in each token's loss (0: none). */
    public double klWeight;
    /** Seed of the initial adapter, of dropout, and of the order of rows. */
    public long seed;
    /** Bytes of private memory that the run may take (0: no limit). */
    public long memoryBudget;
    /** Threads (0: as many as there are cores). */
    public int threads;
    /** True keeps activations in 32 bits, for comparison; by default they take 8 in products. */
    public boolean exact;
    /** True saves the adapter in 16 bits. */
    public boolean half;
    /** Rows that the model knew, mixed into every batch: those to train on of this data; null for none. */
    public Data replay;
    /** Rows to sample from the base for that when the trainer is made, which takes a while (0: none). */
    public int replayCount;
    /** Tokens to sample for each of them at most (0: 64). */
    public int replayTokens;
    /** Share of the rows that is replayed, at most 0.9 (0: 0.1 where there is something to replay). */
    public double replayShare;
    /** Batches of rows whose inputs' main directions A begins as (EVA) (0: A begins at random). */
    public int evaBatches;
    /** True takes the divergence of {@link #klWeight} the other way: KL(tuned‖base). */
    public boolean klReverse;

    static long replayOf(TrainParams params) {
        return params == null ? 0 : Handle.orNone(params.replay);
    }
}
