package dev.engraft;

/**
 * How to generate text. Zero is the default for every field; a negative {@link #topP} or {@link #minP} is off.
 */
public final class GenerateParams {
    /** Maximum tokens (0: 128; -1: until the model stops or the context is full). */
    public int nPredict;
    /** {@link Engraft#PROMPT_AS_TRAINED}, {@link Engraft#PROMPT_CHAT} or {@link Engraft#PROMPT_TEXT}. */
    public int prompting;
    /** True continues the session's chat or text; false starts over. */
    public boolean keep;
    /** True always takes the most likely token; false does so without a temp, if answers were judged so. */
    public boolean greedy;
    /** Draws from this many of the most likely tokens (0: 40; negative: all). */
    public int topK;
    /** Temperature (0: 0.8). */
    public float temp;
    /** Draws from the most likely tokens that together have this probability (0: 0.95). */
    public float topP;
    /** Drops tokens below this share of the top token's probability (0: 0.05). */
    public float minP;
    /** Makes recent tokens less likely (0: 1, which is off). */
    public float repeatPenalty;
    /** Seed for the draws. */
    public long seed;
    /** The system message of the chat; null for the one that the adapter was trained with, if there is one. */
    public String system;
}
