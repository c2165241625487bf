package dev.engraft;

/**
 * A comparison of trained adapters with examples in the prompt and with the model alone. One call at a time; others
 * get {@link Engraft#BUSY}. The methods that steer it may be called from any thread and from the listener.
 */
public final class Gate extends Handle {
    private Gate(long handle) {
        super(handle);
    }

    /** A gate for data that hasn't computed anything yet. {@code params} may be null. */
    public static Gate create(Model model, Data data, GateParams params) {
        GateParams p = params == null ? new GateParams() : params;
        byte[] retention = Native.utf8OrNull(p.retention);
        byte[] unfinished = Native.utf8OrNull(p.unfinished);
        long replay = orNone(p.replay);
        long retentionRows = orNone(p.retentionRows);
        long store = orNone(p.store);
        return new Gate(Native.gateCreate(
                model.handle(), data.handle(), p, replay, retention, retentionRows, unfinished, store));
    }

    /**
     * Trains, measures and judges. Returns normally whatever the verdict; an earlier verdict is gone. {@code
     * listener} may be null. Throws {@link Engraft#CANCELLED} if cancelled, and then nothing is judged; {@link
     * Engraft#BAD_DATA} if a file of the rows has changed since it was opened.
     */
    public void run(ProgressListener listener) {
        Native.gateRun(handle(), listener);
    }

    /** {@code Engraft.DECISION_*}. */
    public int decision() {
        return Native.gateDecision(handle());
    }

    /** The name of the decision's arm, which may be empty. */
    public String arm() {
        return Native.text(Native.gateArm(handle()));
    }

    /** The verdict as JSON, with its reasons and figures. */
    public String verdict() {
        return Native.text(Native.gateVerdict(handle()));
    }

    /**
     * The report as a single HTML page with sample rows and answers. Without JavaScript, which a WebView has off,
     * the page shows the verdict alone.
     */
    public String report() {
        return Native.text(Native.gateReport(handle()));
    }

    /** Copies what the verdict chose; throws {@link Engraft#GATE_REFUSED} if what is there stays. */
    public Adapter adapter() {
        return new Adapter(Native.gateAdapter(handle()));
    }

    /** Ends the running call, and later ones, until {@link #resume}. */
    public void cancel() {
        Native.gateCancel(handle());
    }

    /** Makes the running call wait until {@link #resume} or {@link #cancel}. */
    public void pause() {
        Native.gatePause(handle());
    }

    /** Undoes a pause or a cancellation. */
    public void resume() {
        Native.gateResume(handle());
    }

    /** Sets how hot the device is ({@code Engraft.THERMAL_*}), so that the comparison rests accordingly. */
    public void setThermal(int thermal) {
        Native.gateSetThermal(handle(), thermal);
    }

    @Override
    void free(long number) {
        Native.gateFree(number);
    }
}
