package dev.engraft;

/** Facts about a generation. */
public final class GenerationInfo {
    /** {@code Engraft.KIND_*}; 0 if nothing was ever promoted, and then all else is 0, too. */
    public int kind;
    /** Its number, from 1. */
    public long number;
    /** The generation that a rollback leads to; 0 for none. */
    public long previous;
    /** Bytes of its files. */
    public long bytes;
    /** How many damaged generations were passed over for this one; the log says why. */
    public long passedOver;
    /** Digest (32 bytes) of the model that it is for. */
    public byte[] baseDigest;

    GenerationInfo() {}
}
