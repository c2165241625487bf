package dev.engraft;

/** Rows for training and validation. Any number of threads may use them at once. */
public final class Data extends Handle {
    private Data(long handle) {
        super(handle);
    }

    /**
     * Reads a file of JSON lines, or a folder with train.jsonl and optionally valid.jsonl and test.jsonl. A
     * {@link Gate} reads the files again, so leave them unchanged until then.
     */
    public static Data open(Model model, String path, DataParams params) {
        return new Data(Native.dataOpen(model.handle(), Native.utf8(path), params));
    }

    /** Takes rows as JSON, one object per line; holds out a share of them for validation. */
    public static Data of(Model model, String rows, DataParams params) {
        return of(model, Native.utf8(rows), null, null, params);
    }

    /** Takes rows as JSON lines in UTF-8. {@code valid}, {@code test} and {@code params} may be null. */
    public static Data of(Model model, byte[] train, byte[] valid, byte[] test, DataParams params) {
        return new Data(Native.dataFromMemory(model.handle(), train, valid, test, params));
    }

    /** Facts about the rows. */
    public DataInfo info() {
        DataInfo info = new DataInfo();
        Native.dataInfo(handle(), info);
        return info;
    }

    /** The place of the index-th skipped row, and why it was skipped; the first thousand are known. */
    public String skipped(long index) {
        return Native.text(Native.dataSkipped(handle(), index));
    }

    @Override
    void free(long number) {
        Native.dataFree(number);
    }
}
