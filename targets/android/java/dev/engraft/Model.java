package dev.engraft;

/** A mapped model in a GGUF file. Any number of threads may use it at once. */
public final class Model extends Handle {
    private Model(long handle) {
        super(handle);
    }

    /** Opens and checks the file at a path. It must be a separate file: an entry of an APK has no path. */
    public static Model open(String path) {
        return open(path, null, false);
    }

    /**
     * Like {@link #open(String)}. {@code digestCache} is a folder that caches digests of model files, so that each is
     * fully read only once, or null. {@code noMmap} reads the file into private memory.
     */
    public static Model open(String path, String digestCache, boolean noMmap) {
        return new Model(Native.modelOpen(Native.utf8(path), noMmap, Native.utf8OrNull(digestCache)));
    }

    /** Facts about it, and the memory that it takes. */
    public ModelInfo info() {
        ModelInfo info = new ModelInfo();
        Native.modelInfo(handle(), info);
        return info;
    }

    /** The name in its file, which may be empty. */
    public String name() {
        return Native.text(Native.modelName(handle()));
    }

    /** The 32 bytes that identify it to adapters. The first call reads the whole file. */
    public byte[] digest() {
        return Native.modelDigest(handle());
    }

    /** Frees the tokenizer's memory unless it is in use: for {@code onTrimMemory}. */
    public void trim() {
        Native.modelTrim(handle());
    }

    @Override
    void free(long number) {
        Native.modelFree(number);
    }
}
