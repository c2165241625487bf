package dev.engraft;

/** What rows there are. */
public final class DataInfo {
    /** True where the rows to validate with were split off by seed. */
    public boolean splitBySeed;
    /** Rows to train on. */
    public long trainRows;
    /** Tokens in them that the loss is taken on. */
    public long trainTokens;
    /** Rows to validate with. */
    public long validRows;
    /** Tokens in them that the loss is taken on. */
    public long validTokens;
    /** Rows that were left out; {@code engraft_data_skipped} names them. */
    public long skipped;
    /** Rows that were cut. */
    public long truncated;
    /** Rows to validate with that are among those to train on: they flatter the result. */
    public long duplicates;
    /** Positions of the longest row. */
    public long rowsMax;

    DataInfo() {}
}
