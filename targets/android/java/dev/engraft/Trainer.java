package dev.engraft;

/**
 * A training run. One call at a time; others get {@link Engraft#BUSY}. {@link #cancel}, {@link #pause},
 * {@link #resume} and {@link #setThermal} may be called from any thread and from the listener.
 */
public final class Trainer extends Handle {
    private Trainer(long handle) {
        super(handle);
    }

    /**
     * Plans and allocates everything that training takes. Throws {@link Engraft#DOES_NOT_FIT} if that exceeds the
     * budget. {@code params} may be null.
     */
    public static Trainer create(Model model, Data data, TrainParams params) {
        return new Trainer(Native.trainerCreate(model.handle(), data.handle(), params, TrainParams.replayOf(params)));
    }

    /**
     * Takes one step. Its event is {@link Engraft#EVENT_NOTE} if the step was skipped or the run returned to its
     * checkpoint; the log says why.
     */
    public Progress step() {
        return Native.trainerStep(handle());
    }

    /**
     * Takes this many steps, or with 0 all that are left. {@code listener} may be null. Throws
     * {@link Engraft#CANCELLED} if cancelled; what was trained stays, and another call continues.
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
     * Commits the adapter as adapter.engraft in a folder, which is created if missing. Throws {@link Engraft#BUSY} if
     * another trainer has its checkpoints there, or another call or process writes to it.
     */
    public void save(String folder) {
        Native.trainerSave(handle(), Native.utf8(folder));
    }

    /**
     * Commits everything that the run needs to continue, and the adapter as {@link #save} does. From then on the
     * folder belongs to this trainer, until it is closed or uses another folder. The two newest checkpoints are kept.
     */
    public void checkpoint(String folder) {
        Native.trainerCheckpoint(handle(), Native.utf8(folder));
    }

    /**
     * Continues from the newest good checkpoint in a folder. The trainer must have taken no step, and must be made
     * with the run's model, rows and settings.
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
