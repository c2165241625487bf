package dev.engraft;

/** What is added to a model. Immutable; any number of threads and sessions may use it at once. */
public final class Adapter extends Handle {
    Adapter(long handle) {
        super(handle);
    }

    /**
     * Loads an adapter.engraft, or the one in a folder, and checks it against the model. An adapter of another model
     * is refused with {@link Engraft#BASE_MISMATCH}. {@code params} may be null.
     */
    public static Adapter load(Model model, String path, AdapterParams params) {
        return new Adapter(Native.adapterLoad(model.handle(), Native.utf8(path), params));
    }

    /** What it is. */
    public AdapterInfo info() {
        AdapterInfo info = new AdapterInfo();
        Native.adapterInfo(handle(), info);
        return info;
    }

    /**
     * Commits it as adapter.engraft in a folder, which is created if missing; {@code half} stores 16 bits. Throws
     * {@link Engraft#BUSY} if a trainer has its checkpoints there, or another call or process writes to it.
     */
    public void save(String folder, boolean half) {
        Native.adapterSave(handle(), Native.utf8(folder), half);
    }

    @Override
    void free(long number) {
        Native.adapterFree(number);
    }
}
