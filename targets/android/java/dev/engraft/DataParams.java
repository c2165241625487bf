package dev.engraft;

/** How to read rows. Zero is the default for every field. */
public final class DataParams {
    /** Maximum tokens per row; longer rows are cut (0: 256). Limited to what the model was trained on. */
    public int maxSeqLength;
    /** True trains on every token instead of only on answers. */
    public boolean noMaskPrompt;
    /** True joins prompt and completion without the model's chat template. */
    public boolean raw;
    /** {@code Engraft.TASK_*}: how to ask the questions and read the answers. */
    public int task;
    /** Share of the rows to hold out if no validation rows are given (0: 0.1; negative: none). */
    public double validFraction;
    /** Seed for that choice. */
    public long splitSeed;
}
