package dev.engraft;

/** How to train an adapter. Zero is the default for every field. */
public final class TrainParams {
    /** Rank of the adapter, at most 256 (0: 8). */
    public int rank;
    /** Alpha: the adapter's effect is scaled by alpha/rank (0: twice the rank). */
    public float alpha;
    /** Share of the adapter's inputs set to zero during training, below 1. */
    public float dropout;
    /** {@code Engraft.MODULE_*}: which projections to adapt (0: all seven). */
    public int modules;
    /** How many of the last blocks to adapt (0: all). */
    public int numLayers;
    /** True for DoRA. */
    public boolean dora;
    /** True scales by alpha/sqrt(rank) instead. */
    public boolean rslora;
    /** Sequences per batch (0: 1). */
    public int batchSize;
    /** Batches to sum gradients over before each step (0: 1). */
    public int gradAccumulationSteps;
    /** {@code Engraft.SCHEDULE_*}. */
    public int schedule;
    /** Steps of rising learning rate at the start. */
    public int warmupSteps;
    /** Optimizer steps of the whole run (0: 300). */
    public long steps;
    /** Peak learning rate (0: 2e-4). */
    public double learningRate;
    /** AdamW's decoupled weight decay. */
    public double weightDecay;
    /** Scale gradients down to this norm (0: 1; negative: never). */
    public double maxGradNorm;
    /** LoRA+: the learning rate of B as a multiple of A's (0: 1). */
    public double loraPlusRatio;
    /** Weight of the divergence from the base in each token's loss (0: off). */
    public double klWeight;
    /** Seed for the initial adapter, dropout and the row order. */
    public long seed;
    /** Bytes of private memory that the run may take (0: no limit). */
    public long memoryBudget;
    /** Threads (0: as many as there are cores). */
    public int threads;
    /** True keeps activations in 32 bits, for comparison; by default products take them in 8 bits. */
    public boolean exact;
    /** True saves the adapter in 16 bits. */
    public boolean half;
    /** Data whose training rows the model already knows, mixed into the batches; null for none. */
    public Data replay;
    /** Number of rows to sample from the base instead, when the trainer is made; takes a while (0: none). */
    public int replayCount;
    /** Maximum tokens per sampled row (0: 64). */
    public int replayTokens;
    /** Share of replayed rows, at most 0.9 (0: 0.1 if there is something to replay). */
    public double replayShare;
    /** Batches of rows to initialize A from their inputs' main directions (EVA) (0: A starts at random). */
    public int evaBatches;
    /** True reverses the divergence of {@link #klWeight} to KL(tuned‖base). */
    public boolean klReverse;

    static long replayOf(TrainParams params) {
        return params == null ? 0 : Handle.orNone(params.replay);
    }
}
