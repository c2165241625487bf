package dev.engraft;

/**
 * A place that sessions take their adapter from. Any number of threads may use it at once. It belongs to one model:
 * that of the first adapter put into it, or of the first session that follows it.
 */
public final class Slot extends Handle {
    /** An empty slot: sessions that follow it use the base alone. */
    public Slot() {
        super(Native.slotCreate());
    }

    /**
     * Puts an adapter, or with null the base alone, into it. Sessions that follow it use that from their next token
     * on. Never waits if all share one {@link Model}; otherwise it may read both model files. Returns the number of
     * swaps.
     */
    public long swap(Adapter adapter) {
        return Native.slotSwap(handle(), orNone(adapter));
    }

    @Override
    void free(long number) {
        Native.slotFree(number);
    }
}
