package dev.engraft;

/** What was generated. */
public final class GenerateInfo {
    /** {@code Engraft.ENDED_*}. */
    public int ended;
    /** Tokens of the prompt, with the template's and the examples'. */
    public long promptTokens;
    /** Tokens generated. */
    public long tokens;
    /** Seconds to read the prompt. */
    public double promptSeconds;
    /** Seconds to generate. */
    public double seconds;
    /** Swaps of the slot that the last token was computed after; 0 without a slot. */
    public long generation;

    GenerateInfo() {}
}
