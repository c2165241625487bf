package dev.engraft;

/** Facts about what was generated. */
public final class GenerateInfo {
    /** {@code Engraft.ENDED_*}. */
    public int ended;
    /** Tokens of the prompt, including the template and the examples. */
    public long promptTokens;
    /** Generated tokens. */
    public long tokens;
    /** Seconds to read the prompt. */
    public double promptSeconds;
    /** Seconds to generate. */
    public double seconds;
    /** The slot's generation when the last token was computed; 0 without a slot. */
    public long generation;

    GenerateInfo() {}
}
