package dev.engraft;

/** What is added to a model. Immutable; any number of threads and sessions may use it at once. */
public final class Adapter extends Handle {
    Adapter(long handle) {
        super(handle);
    }

    /**
     * Loads an adapter.engraft, or the one in a folder, and holds it against the model; what belongs to another is
     * refused with {@link Engraft#BASE_MISMATCH}. {@code params} may be null.
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
     * Commits it as adapter.engraft in a folder, which is made if it is missing; {@code half} stores 16 bits. Throws
     * {@link Engraft#BUSY} where a trainer has its checkpoints there, or another call or process writes to it.
     */
    public void save(String folder, boolean half) {
        Native.adapterSave(handle(), Native.utf8(folder), half);
    }

    @Override
    void free(long number) {
        Native.adapterFree(number);
    }
}
