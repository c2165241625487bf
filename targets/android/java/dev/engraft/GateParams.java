package dev.engraft;

/** What to compare. Zero is the default for every field. */
public final class GateParams {
    /** {@code Engraft.ARM_*} to compare with the base alone (0: all). Without few-shot, training needn't beat it. */
    public int arms;
    /** Examples in a few-shot prompt (0: 5). */
    public int shots;
    /** Steps per trained arm (0: 300). */
    public int steps;
    /** Sequences per step (0: 8 for a protected LoRA, else 1). */
    public int batchSize;
    /** Rank of the adapters (0: the largest that memory allows, up to 64 for a protected LoRA; others: up to 16). */
    public int rank;
    /** {@code Engraft.METRIC_*}; the data's task overrides it. */
    public int metric;
    /** Maximum tokens per answer (0: 256). */
    public int answerTokens;
    /** Maximum number of training rows (0: all). */
    public int trainRows;
    /** Maximum number of held-out rows (0: all). */
    public int heldOutRows;
    /** Minimum number of held-out rows for a decision (0: 20). */
    public int examplesMin;
    /** Bootstrap resamples (0: 10000). */
    public int resamples;
    /** Evaluations on the validation rows per run (0: 10). */
    public int evaluations;
    /** Threads (0: as many as there are cores). */
    public int threads;
    /** True keeps activations in 32 bits. */
    public boolean exact;
    /** True lets a lower loss win even if no more answers are right. */
    public boolean lossAlone;
    /** True leaves out the built-in text that training must not harm. Then supply your own. */
    public boolean noBuiltInRetention;
    /**
     * True lets a LoRA act on what ordinary text uses, too. By default it keeps to directions that such text leaves
     * quiet, which costs some gain and saves most of what a plain LoRA forgets.
     */
    public boolean protectOff;
    /** Minutes for everything instead of steps: training takes what scoring leaves (0: use steps). */
    public double minutes;
    /** Peak learning rate (0: 2e-3 for a protected LoRA, else found by a range test). */
    public double learningRate;
    /** Two-sided significance level of intervals and tests (0: 0.05). */
    public double level;
    /** Seed for adapters, examples and the bootstrap. */
    public long seed;
    /** Bytes of private memory that training and scoring may take (0: no limit). */
    public long memoryBudget;
    /**
     * A text that training must not harm, in addition to the built-in one. Lines that start with {@code %% }
     * separate passages. Null for none.
     */
    public String retention;
    /** Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: off). Adds about half the time. */
    public double klWeight;
    /** Data whose training rows the model already knows, mixed into the batches; null for none. */
    public Data replay;
    /** Number of rows to sample from the base instead (0: none). */
    public int replayCount;
    /** Maximum tokens per sampled row (0: 64). */
    public int replayTokens;
    /** Share of replayed rows, at most 0.9 (0: 0.1 if there is something to replay). */
    public double replayShare;
    /** Data whose answers training must not harm, in addition to retention texts; null for none. */
    public Data retentionRows;
    /**
     * A folder for unfinished work, created if missing. The same comparison continues from it after the process has
     * ended. Null for none.
     */
    public String unfinished;
    /** A store whose active generation is compared, too: nothing replaces it that isn't better; null for none. */
    public Store store;
}
