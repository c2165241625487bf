package dev.engraft;

/**
 * A place that sessions take their adapter from. May be used by any number of threads at once. It is for one model:
 * that of the first adapter put into it, or of the first session that follows it.
 */
public final class Slot extends Handle {
    /** An empty slot: sessions that follow it use the base alone. */
    public Slot() {
        super(Native.slotCreate());
    }

    /**
     * Puts an adapter into it, or with null the base alone: sessions that follow it use it from their next token
     * on. Waits for nobody where all are of one {@link Model}, else both files may be read whole. Gives the number of
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
