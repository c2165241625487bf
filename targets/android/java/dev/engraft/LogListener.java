package dev.engraft;

/** Takes a line of the log: see {@link Engraft#setLog}. */
public interface LogListener {
    /** A line and its level, {@code Engraft.LOG_*}. Called from any thread, even from several at once. */
    void onLine(int level, String line);
}
