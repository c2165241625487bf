package dev.engraft;

/**
 * How text is generated. Zero is the default of everything; a {@link #topP} or {@link #minP} below zero is off.
 */
public final class GenerateParams {
    /** Tokens at most (0: 128; -1: until the model ends or the context is full). */
    public int nPredict;
    /** True puts the prompt into the model's chat template, as the user's message. */
    public boolean chat;
    /** True goes on from what the session has read and said; false begins anew. */
    public boolean keep;
    /** True always takes the likeliest token. */
    public boolean greedy;
    /** Draws among so many of the likeliest tokens (0: 40; below 0: all). */
    public int topK;
    /** Temperature (0: 0.8). */
    public float temp;
    /** Draws among the likeliest tokens that hold this probability together (0: 0.95). */
    public float topP;
    /** Drops tokens below this share of the likeliest one's probability (0: 0.05). */
    public float minP;
    /** Makes recent tokens less likely (0: 1, which is off). */
    public float repeatPenalty;
    /** Seed of the draws. */
    public long seed;
    /** The system message of the chat; null for none. */
    public String system;
}
