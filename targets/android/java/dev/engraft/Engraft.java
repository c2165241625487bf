package dev.engraft;

/** The library as a whole: its version, its log, and the numbers of engraft.h under the same names. */
public final class Engraft {
    private static volatile LogListener logListener;

    private Engraft() {}

    /** The library's version, such as "0.1.0". Loads the library; throws {@link UnsatisfiedLinkError} without it. */
    public static String version() {
        return Native.text(Native.version());
    }

    /** The name of a code, such as "BUSY". */
    public static String codeName(int code) {
        return Native.text(Native.codeName(code));
    }

    /**
     * Passes all lines up to a level to a listener, which replaces the previous one; null ends logging. It is called
     * from any thread. An exception that it throws on the thread of a call ends the call if that has a listener, too,
     * and is rethrown when the call returns. On the library's threads it is printed.
     */
    public static void setLog(LogListener listener, int level) {
        logListener = listener;
        Native.logSet(listener == null ? LOG_NONE : level);
    }

    /** Called by engraft_jni.c. */
    static void log(int level, byte[] utf8) {
        LogListener listener = logListener;
        if (listener != null) {
            listener.onLine(level, Native.text(utf8));
        }
    }

    /** Trained parameters. */
    public static final int KIND_ADAPTER = 1;
    /** Examples that go before every prompt. */
    public static final int KIND_FEW_SHOT = 2;
    /** Nothing: only the base. */
    public static final int KIND_BASE = 3;
    /** The device is cool: work at full speed. As {@code ProcessInfo.ThermalState.nominal}. */
    public static final int THERMAL_NOMINAL = 0;
    /** It is warm: rest a tenth of the time. */
    public static final int THERMAL_FAIR = 1;
    /** It is hot: rest half of the time. */
    public static final int THERMAL_SERIOUS = 2;
    /** It is too hot: wait until this changes. */
    public static final int THERMAL_CRITICAL = 3;
    /** The rows belong to no known task. */
    public static final int TASK_NONE = 0;
    /** GSM8K: answers after {@code ####}. */
    public static final int TASK_GSM8K = 1;
    /** Orca-Math: answers in prose. */
    public static final int TASK_ORCA_MATH = 2;
    /** SVAMP: one-step word problems. */
    public static final int TASK_SVAMP = 3;
    /** Success. */
    public static final int OK = 0;
    /** The operating system failed to read or write. */
    public static final int IO = -1;
    /** The disk or a quota is full. */
    public static final int FULL = -2;
    /** Out of memory. */
    public static final int NOMEM = -3;
    /** A file doesn't match its format: truncated, damaged or foreign. */
    public static final int CORRUPT = -4;
    /** An argument is out of range, contradicts another, or isn't a live handle. */
    public static final int MISUSE = -5;
    /** Another call runs on the handle, or another writer uses the folder or store. */
    public static final int BUSY = -6;
    /** The caller asked to stop. */
    public static final int CANCELLED = -7;
    /** A struct has fields set that this version of the library doesn't know. */
    public static final int UNSUPPORTED_VERSION = -8;
    /** An adapter and a model don't belong together. */
    public static final int BASE_MISMATCH = -9;
    /** NaN or infinity where a finite number is needed. */
    public static final int NONFINITE = -10;
    /** The memory plan exceeds the budget. The message says what would fit. */
    public static final int DOES_NOT_FIT = -11;
    /** The gate didn't promote. */
    public static final int GATE_REFUSED = -12;
    /** A bug in the library. The handle can only be freed. */
    public static final int PANIC = -13;
    /** The data is malformed or leaves nothing to train on. */
    public static final int BAD_DATA = -14;
    /** The file is good, but this version can't handle its contents. */
    public static final int UNSUPPORTED = -15;
    /** The caller's buffer is too small. It holds the beginning; the length is that of the whole. */
    public static final int TOO_SMALL = -16;
    /** Examples in the prompt. */
    public static final int ARM_FEW_SHOT = 1;
    /** A LoRA adapter. */
    public static final int ARM_LORA = 2;
    /** A DoRA adapter. */
    public static final int ARM_DORA = 4;
    /** Don't compare answers, except as the data's task says. */
    public static final int METRIC_NONE = 0;
    /** Compare answers word for word, except for white space. */
    public static final int METRIC_EXACT = 1;
    /** Compare answers as JSON, all fields equal. */
    public static final int METRIC_JSON = 2;
    /** Nothing has been judged yet. */
    public static final int DECISION_NONE = 0;
    /** Promote a trained arm. */
    public static final int DECISION_PROMOTE = 1;
    /** Keep prompting: examples in the prompt help, and no trained arm passed. */
    public static final int DECISION_KEEP_PROMPTING = 2;
    /** Keep the base alone. */
    public static final int DECISION_KEEP_BASE = 3;
    /** Keep the store's active generation: nothing is shown to be better. */
    public static final int DECISION_KEEP_ACTIVE = 4;
    /** No lines. */
    public static final int LOG_NONE = 0;
    /** Errors. */
    public static final int LOG_ERROR = 1;
    /** Warnings that a user should see. */
    public static final int LOG_WARN = 2;
    /** Choices that the library made. */
    public static final int LOG_INFO = 3;
    /** Details for finding a bug. */
    public static final int LOG_DEBUG = 4;
    /** The query projection, in {@link TrainParams#modules}. */
    public static final int MODULE_Q = 1;
    /** The key projection. */
    public static final int MODULE_K = 2;
    /** The value projection. */
    public static final int MODULE_V = 4;
    /** The output projection. */
    public static final int MODULE_O = 8;
    /** The MLP's gate projection. */
    public static final int MODULE_GATE = 16;
    /** The MLP's up projection. */
    public static final int MODULE_UP = 32;
    /** The MLP's down projection. */
    public static final int MODULE_DOWN = 64;
    /** The learning rate falls linearly to zero. */
    public static final int SCHEDULE_LINEAR = 0;
    /** The learning rate falls to zero along half a cosine. */
    public static final int SCHEDULE_COSINE = 1;
    /** The learning rate stays the same. */
    public static final int SCHEDULE_CONSTANT = 2;
    /** Keys and values take 2 bytes per element. */
    public static final int CACHE_F16 = 0;
    /** 4 bytes per element, exact. */
    public static final int CACHE_F32 = 1;
    /** 8 bits per element, in blocks of 32. */
    public static final int CACHE_Q8 = 2;
    /** A prompt is put as the session's adapter was trained: into the model's chat template or as a text; as a text without an adapter, or where that isn't known. */
    public static final int PROMPT_AS_TRAINED = 0;
    /** A prompt is the user's message in the model's chat template. */
    public static final int PROMPT_CHAT = 1;
    /** A prompt is the beginning of a text. */
    public static final int PROMPT_TEXT = 2;
    /** The model ended its text. */
    public static final int ENDED_MODEL = 0;
    /** The token limit was reached. */
    public static final int ENDED_LIMIT = 1;
    /** The context is full. */
    public static final int ENDED_CONTEXT = 2;
    /** The caller stopped it. */
    public static final int ENDED_CANCELLED = 3;
    /** A step is done: {@code step}, {@code loss} and what follows describe it. */
    public static final int EVENT_STEP = 0;
    /** The validation rows were evaluated; {@code valid_loss} is their loss. */
    public static final int EVENT_VALIDATION = 1;
    /** The call is paused, or the device is too hot: it waits once this event's callback has returned. */
    public static final int EVENT_HELD = 2;
    /** A note; see {@code text}. */
    public static final int EVENT_NOTE = 3;
}
