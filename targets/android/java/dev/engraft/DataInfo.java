package dev.engraft;

/** Facts about the rows. */
public final class DataInfo {
    /** True if the validation rows were split off by seed. */
    public boolean splitBySeed;
    /** Training rows. */
    public long trainRows;
    /** Tokens in these rows that count in the loss. */
    public long trainTokens;
    /** Validation rows. */
    public long validRows;
    /** Tokens in these rows that count in the loss. */
    public long validTokens;
    /** Skipped rows; {@link Data#skipped} names them. */
    public long skipped;
    /** Rows that were cut. */
    public long truncated;
    /** Validation rows that are also training rows, which make the result look too good. */
    public long duplicates;
    /** Positions of the longest row. */
    public long rowsMax;

    DataInfo() {}
}
