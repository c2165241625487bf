package dev.engraft;

/** A folder of generations, one of which is active. May be used by any number of threads and processes at once. */
public final class Store extends Handle {
    private Store(long handle) {
        super(handle);
    }

    /** Opens the store in a folder, which is made if it is missing, readable by its owner only. */
    public static Store open(String folder) {
        return open(folder, false);
    }

    /** As {@link #open(String)}; {@code mustExist} refuses a folder that is none of a store. */
    public static Store open(String folder, boolean mustExist) {
        return new Store(Native.storeOpen(Native.utf8(folder), mustExist));
    }

    /**
     * Makes what a gate's verdict names the active generation, and gives its number. Throws
     * {@link Engraft#GATE_REFUSED} where the base alone stays; then nothing is changed.
     */
    public long promote(Gate gate) {
        return Native.storePromote(handle(), gate.handle());
    }

    /** Makes an adapter the active generation on the app's own judgement: the verdict is kept beside it. */
    public long promote(Adapter adapter, String verdict) {
        return Native.storePromoteAdapter(handle(), adapter.handle(), Native.utf8(verdict));
    }

    /** Which generation is active; its {@link GenerationInfo#kind} is 0 where nothing was ever promoted. */
    public GenerationInfo active() {
        GenerationInfo info = new GenerationInfo();
        info.baseDigest = Native.storeActive(handle(), info);
        return info;
    }

    /** Loads the active generation, held against the model. {@code params} may be null. */
    public Adapter load(Model model, AdapterParams params) {
        return new Adapter(Native.storeLoad(handle(), model.handle(), params));
    }

    /** Makes the generation active that was active before, and gives its number. */
    public long rollback() {
        return Native.storeRollback(handle());
    }

    /** Makes any generation active that verifies. */
    public void activate(long generation) {
        Native.storeActivate(handle(), generation);
    }

    /**
     * Removes all but the newest {@code keep} that are whole, the active one and the one that a rollback leads to;
     * gives how many went. Throws {@link Engraft#MISUSE} for a {@code keep} below 1.
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
