package dev.engraft;

/** A model in a GGUF file, mapped. May be used by any number of threads at once. */
public final class Model extends Handle {
    private Model(long handle) {
        super(handle);
    }

    /** Opens and checks the file at a path: a file of its own, as an entry of an APK has no path. */
    public static Model open(String path) {
        return open(path, null, false);
    }

    /**
     * As {@link #open(String)}. A {@code digestCache} is a folder for digests of model files, so that each is read
     * whole only once, or null; {@code noMmap} reads the file into private memory.
     */
    public static Model open(String path, String digestCache, boolean noMmap) {
        return new Model(Native.modelOpen(Native.utf8(path), noMmap, Native.utf8OrNull(digestCache)));
    }

    /** What it is, and the memory that it takes. */
    public ModelInfo info() {
        ModelInfo info = new ModelInfo();
        Native.modelInfo(handle(), info);
        return info;
    }

    /** Its own name, which may be empty. */
    public String name() {
        return Native.text(Native.modelName(handle()));
    }

    /** The 32 bytes that identify it to adapters. The first time, this reads the whole file. */
    public byte[] digest() {
        return Native.modelDigest(handle());
    }

    /** Gives back the tokenizer's memory, unless something uses it: for {@code onTrimMemory}. */
    public void trim() {
        Native.modelTrim(handle());
    }

    @Override
    void free(long number) {
        Native.modelFree(number);
    }
}
