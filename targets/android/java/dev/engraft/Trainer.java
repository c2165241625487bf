package dev.engraft;

/**
 * A run of training. One call at a time, others get {@link Engraft#BUSY}; {@link #cancel}, {@link #pause},
 * {@link #resume} and {@link #setThermal} may be called from any thread and from the listener.
 */
public final class Trainer extends Handle {
    private Trainer(long handle) {
        super(handle);
    }

    /**
     * Plans and allocates everything that training takes; what exceeds the budget is refused with
     * {@link Engraft#DOES_NOT_FIT}. {@code params} may be null.
     */
    public static Trainer create(Model model, Data data, TrainParams params) {
        return new Trainer(Native.trainerCreate(model.handle(), data.handle(), params, TrainParams.replayOf(params)));
    }

    /**
     * One step. Its event is {@link Engraft#EVENT_NOTE} where it was skipped, or where the run went back to its
     * checkpoint: the log says why.
     */
    public Progress step() {
        return Native.trainerStep(handle());
    }

    /**
     * So many steps, or with 0 all that are left. {@code listener} may be null. Throws {@link Engraft#CANCELLED}
     * where it was cancelled; what was trained stays, and another call goes on.
     */
    public void run(long steps, ProgressListener listener) {
        Native.trainerRun(handle(), steps, listener);
    }

    /** The loss on the validation rows: the base's before the first step, with the adapter afterwards. */
    public double evaluate() {
        return Native.trainerEvaluate(handle());
    }

    /** Its progress. */
    public Progress now() {
        return Native.trainerProgress(handle());
    }

    /**
     * Commits the adapter as adapter.engraft in a folder, which is made if it is missing. Throws
     * {@link Engraft#BUSY} where another trainer has its checkpoints there, or another call or process writes to it.
     */
    public void save(String folder) {
        Native.trainerSave(handle(), Native.utf8(folder));
    }

    /**
     * Commits everything that the run needs to go on, and beside it the adapter, as {@link #save}. From then on the
     * folder is this trainer's, until it is closed or has its checkpoints elsewhere; the newest two stay.
     */
    public void checkpoint(String folder) {
        Native.trainerCheckpoint(handle(), Native.utf8(folder));
    }

    /**
     * Goes on where the newest whole checkpoint in a folder stood. The trainer must have taken no step, and be
     * made with the model, rows and settings of the run.
     */
    public void restore(String folder) {
        Native.trainerRestore(handle(), Native.utf8(folder));
    }

    /** Copies the current adapter. */
    public Adapter adapter() {
        return new Adapter(Native.trainerAdapter(handle()));
    }

    /** Ends the running call, and later ones, before their next step, until {@link #resume}. */
    public void cancel() {
        Native.trainerCancel(handle());
    }

    /** Makes the running call wait before its next step, until {@link #resume} or {@link #cancel}. */
    public void pause() {
        Native.trainerPause(handle());
    }

    /** Undoes a pause or a cancellation. */
    public void resume() {
        Native.trainerResume(handle());
    }

    /** Sets how hot the device is ({@code Engraft.THERMAL_*}), so that training rests accordingly. */
    public void setThermal(int thermal) {
        Native.trainerSetThermal(handle(), thermal);
    }

    @Override
    void free(long number) {
        Native.trainerFree(number);
    }
}
