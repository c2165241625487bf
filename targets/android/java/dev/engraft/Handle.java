package dev.engraft;

import java.io.Closeable;

/**
 * A handle of the library. The garbage collector doesn't free it: close each one, best with try-with-resources or
 * Kotlin's {@code use}.
 */
public abstract class Handle implements Closeable {
    private volatile long handle;

    Handle(long handle) {
        this.handle = handle;
    }

    /** The library's number for it. Throws {@link IllegalStateException} once this is closed. */
    final long handle() {
        long number = handle;
        if (number == 0) {
            throw new IllegalStateException(getClass().getSimpleName() + " is closed");
        }
        return number;
    }

    /** The number of an optional handle: 0 for null. */
    static long orNone(Handle handle) {
        return handle == null ? 0 : handle.handle();
    }

    abstract void free(long number);

    /** Whether {@link #close} was called. */
    public final boolean isClosed() {
        return handle == 0;
    }

    /**
     * Frees it; closing again does nothing. While a call runs on a trainer, gate or session, this throws
     * {@link Engraft#BUSY} and it stays open: cancel the call, and close once it has returned.
     */
    @Override
    public final synchronized void close() {
        if (handle != 0) {
            free(handle);
            handle = 0;
        }
    }
}
