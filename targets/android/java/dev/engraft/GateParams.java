package dev.engraft;

/** What is compared. Zero is the default of everything. */
public final class GateParams {
    /** {@code Engraft.ARM_*} beside the base alone (0: all). Without few-shot, training need not beat it. */
    public int arms;
    /** Examples in a few-shot prompt (0: 5). */
    public int shots;
    /** Steps of each trained arm (0: 300). */
    public int steps;
    /** Sequences of a step (0: 1). */
    public int batchSize;
    /** Rank of the adapters (0: the largest that memory and rows allow, up to 16). */
    public int rank;
    /** {@code Engraft.METRIC_*}; data of a task is compared as the task says. */
    public int metric;
    /** Tokens of an answer at most (0: 256). */
    public int answerTokens;
    /** Training rows at most (0: all). */
    public int trainRows;
    /** Held-out rows at most (0: all). */
    public int heldOutRows;
    /** Held-out rows below which nothing is decided (0: 20). */
    public int examplesMin;
    /** Bootstrap resamples (0: 10000). */
    public int resamples;
    /** Looks at the validation rows in a run (0: 10). */
    public int evaluations;
    /** Threads (0: as many as there are cores). */
    public int threads;
    /** True keeps activations in 32 bits. */
    public boolean exact;
    /** True lets a lower loss alone win, where answers are compared. */
    public boolean lossAlone;
    /** True leaves out the text that is built in, which training must not harm. Then name one of your own. */
    public boolean noBuiltInRetention;
    /** Minutes to train, shared by the trained arms, instead of steps (0: steps count). */
    public double minutes;
    /** Learning rate at its highest (0: found by a range test). */
    public double learningRate;
    /** Two-sided level of the intervals and tests (0: 0.05). */
    public double level;
    /** Seed of adapters, examples and the bootstrap. */
    public long seed;
    /** Bytes of private memory that training and scoring may take (0: no limit). */
    public long memoryBudget;
    /**
     * A text that training must not harm, beside the one that is built in: in passages behind lines that begin
     * with {@code %% }, or as one; null for none.
     */
    public String retention;
    /** Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: none); half as much time again. */
    public double klWeight;
    /** Rows that the model knew, mixed into every batch: those to train on of this data; null for none. */
    public Data replay;
    /** Rows to sample from the base for that (0: none). */
    public int replayCount;
    /** Tokens to sample for each of them at most (0: 64). */
    public int replayTokens;
    /** Share of the rows that is replayed, at most 0.9 (0: 0.1 where there is something to replay). */
    public double replayShare;
    /** Rows whose answers training must not harm, beside retention texts: all of this data; null for none. */
    public Data retentionRows;
    /**
     * A folder for what is unfinished, made if it is missing: the same comparison goes on from there after the
     * process has ended. Null for none.
     */
    public String unfinished;
}
