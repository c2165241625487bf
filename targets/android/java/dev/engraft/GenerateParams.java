package dev.engraft;

/**
 * How to generate text. Zero is the default for every field; a negative {@link #topP} or {@link #minP} is off.
 */
public final class GenerateParams {
    /** Maximum tokens (0: 128; -1: until the model stops or the context is full). */
    public int nPredict;
    /** True puts the prompt into the model's chat template, as the user's message. */
    public boolean chat;
    /** True continues the session's chat or text; false starts over. */
    public boolean keep;
    /** True always takes the most likely token. */
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
    /** The system message of the chat; null for none. */
    public String system;
}
