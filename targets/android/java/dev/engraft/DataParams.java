package dev.engraft;

/** How rows are read. Zero is the default of everything. */
public final class DataParams {
    /** Tokens of a row at most; longer ones are cut (0: 256). Never more than the model was trained for. */
    public int maxSeqLength;
    /** True trains on every token, instead of on answers only. */
    public boolean noMaskPrompt;
    /** True joins prompt and completion as they are, even for a model with a chat template. */
    public boolean raw;
    /** {@code Engraft.TASK_*}: how rows are asked and answers are read. */
    public int task;
    /** Share of the rows that is held back, where no rows are given for that (0: 0.1; below 0: none). */
    public double validFraction;
    /** Seed of that choice. */
    public long splitSeed;
}
