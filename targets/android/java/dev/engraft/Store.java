package dev.engraft;

/** A folder of generations, one of them active. Any number of threads and processes may use it at once. */
public final class Store extends Handle {
    private Store(long handle) {
        super(handle);
    }

    /** Opens the store in a folder. A missing folder is created, accessible only to its owner. */
    public static Store open(String folder) {
        return open(folder, false);
    }

    /** As {@link #open(String)}; {@code mustExist} refuses a folder that isn't a store. */
    public static Store open(String folder, boolean mustExist) {
        return new Store(Native.storeOpen(Native.utf8(folder), mustExist));
    }

    /**
     * Makes the winner of a gate's verdict the active generation and returns its number. Throws
     * {@link Engraft#GATE_REFUSED} if the base alone stays; nothing changes then.
     */
    public long promote(Gate gate) {
        return Native.storePromote(handle(), gate.handle());
    }

    /** Makes an adapter the active generation on the app's judgement; the verdict is stored with it. */
    public long promote(Adapter adapter, String verdict) {
        return Native.storePromoteAdapter(handle(), adapter.handle(), Native.utf8(verdict));
    }

    /** The active generation; its {@link GenerationInfo#kind} is 0 if nothing was ever promoted. */
    public GenerationInfo active() {
        GenerationInfo info = new GenerationInfo();
        info.baseDigest = Native.storeActive(handle(), info);
        return info;
    }

    /** Loads the active generation and checks it against the model. {@code params} may be null. */
    public Adapter load(Model model, AdapterParams params) {
        return new Adapter(Native.storeLoad(handle(), model.handle(), params));
    }

    /** Makes the previously active generation active again and returns its number. */
    public long rollback() {
        return Native.storeRollback(handle());
    }

    /** Makes a generation active after verifying it. */
    public void activate(long generation) {
        Native.storeActivate(handle(), generation);
    }

    /**
     * Removes all but the newest {@code keep} good ones, the active one and the one that a rollback leads to. Returns
     * how many were removed. Throws {@link Engraft#MISUSE} for a {@code keep} below 1.
     */
    public long prune(long keep) {
        return Native.storePrune(handle(), keep);
    }

    /** All generations as JSON. */
    public String list() {
        return Native.text(Native.storeList(handle()));
    }

    @Override
    void free(long number) {
        Native.storeFree(number);
    }
}
