package dev.engraft;

/** A generation. */
public final class GenerationInfo {
    /** {@code Engraft.KIND_*}; 0 where nothing was ever promoted, and then all else is 0 too. */
    public int kind;
    /** Its number, from 1. */
    public long number;
    /** What a rollback leads to; 0 for nothing. */
    public long previous;
    /** Bytes of its files. */
    public long bytes;
    /** Generations that should have been taken before it, and were damaged: the log says why. */
    public long passedOver;
    /** The 32 bytes that identify the model that it is for. */
    public byte[] baseDigest;

    GenerationInfo() {}
}
