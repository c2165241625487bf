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
     * Hands all lines up to a level to a listener, instead of to the one before; null ends it. It is called from any
     * thread. What it throws on the thread of a call ends that call where it has a listener too, and is thrown when
     * the call returns; on threads of the library it is printed.
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
    /** Nothing: the base alone. */
    public static final int KIND_BASE = 3;
    /** The device is cool: work at full speed. As {@code ProcessInfo.ThermalState.nominal}. */
    public static final int THERMAL_NOMINAL = 0;
    /** It is warm: a tenth of the time is spent resting. */
    public static final int THERMAL_FAIR = 1;
    /** It is hot: half of the time is spent resting. */
    public static final int THERMAL_SERIOUS = 2;
    /** It is too hot: work waits until this changes. */
    public static final int THERMAL_CRITICAL = 3;
    /** Rows are not of a known task. */
    public static final int TASK_NONE = 0;
    /** GSM8K: answers behind {@code ####}. */
    public static final int TASK_GSM8K = 1;
    /** Orca-Math: answers in prose. */
    public static final int TASK_ORCA_MATH = 2;
    /** SVAMP: one-step word problems. */
    public static final int TASK_SVAMP = 3;
    /** All is well. */
    public static final int OK = 0;
    /** Reading or writing failed in the operating system. */
    public static final int IO = -1;
    /** The disk, or a quota, is full. */
    public static final int FULL = -2;
    /** The system gave no memory. */
    public static final int NOMEM = -3;
    /** A file is not what its format demands: cut, flipped bits, foreign. */
    public static final int CORRUPT = -4;
    /** An argument is out of range, contradicts another, or is no live handle. */
    public static final int MISUSE = -5;
    /** Another call runs on the handle, or another writer holds the folder or the store. */
    public static final int BUSY = -6;
    /** The caller asked to stop. */
    public static final int CANCELLED = -7;
    /** A struct holds what this version of the library does not know. */
    public static final int UNSUPPORTED_VERSION = -8;
    /** An adapter and a model do not belong together. */
    public static final int BASE_MISMATCH = -9;
    /** A NaN or infinity appeared where none may be. */
    public static final int NONFINITE = -10;
    /** The memory plan exceeds the budget; the message names what would fit. */
    public static final int DOES_NOT_FIT = -11;
    /** The gate did not promote. */
    public static final int GATE_REFUSED = -12;
    /** A defect of the library: the handle can only be freed. */
    public static final int PANIC = -13;
    /** Data is malformed, or leaves nothing to train on. */
    public static final int BAD_DATA = -14;
    /** The file is right, but this version can't handle what it holds. */
    public static final int UNSUPPORTED = -15;
    /** The caller's buffer is too small; it holds the beginning, and the length says how much there is. */
    public static final int TOO_SMALL = -16;
    /** Examples in the prompt. */
    public static final int ARM_FEW_SHOT = 1;
    /** A LoRA adapter. */
    public static final int ARM_LORA = 2;
    /** A DoRA adapter. */
    public static final int ARM_DORA = 4;
    /** Answers are not compared, beyond what the data's task says. */
    public static final int METRIC_NONE = 0;
    /** Answers are compared word for word, white space aside. */
    public static final int METRIC_EXACT = 1;
    /** Answers are compared as JSON, all fields equal. */
    public static final int METRIC_JSON = 2;
    /** Nothing was judged yet. */
    public static final int DECISION_NONE = 0;
    /** A trained arm is to be promoted. */
    public static final int DECISION_PROMOTE = 1;
    /** Examples in the prompt do as well without training. */
    public static final int DECISION_KEEP_PROMPTING = 2;
    /** The base alone stays. */
    public static final int DECISION_KEEP_BASE = 3;
    /** Nothing. */
    public static final int LOG_NONE = 0;
    /** What went wrong. */
    public static final int LOG_ERROR = 1;
    /** What a user should hear of. */
    public static final int LOG_WARN = 2;
    /** What was chosen. */
    public static final int LOG_INFO = 3;
    /** What helps to find a defect. */
    public static final int LOG_DEBUG = 4;
    /** The query projection, in {@link TrainParams#modules}. */
    public static final int MODULE_Q = 1;
    /** The key projection. */
    public static final int MODULE_K = 2;
    /** The value projection. */
    public static final int MODULE_V = 4;
    /** The output projection. */
    public static final int MODULE_O = 8;
    /** The MLP's gate. */
    public static final int MODULE_GATE = 16;
    /** The MLP's way up. */
    public static final int MODULE_UP = 32;
    /** The MLP's way down. */
    public static final int MODULE_DOWN = 64;
    /** The learning rate falls linearly to zero. */
    public static final int SCHEDULE_LINEAR = 0;
    /** It falls to zero as half a cosine. */
    public static final int SCHEDULE_COSINE = 1;
    /** It stays. */
    public static final int SCHEDULE_CONSTANT = 2;
    /** Keys and values take 2 bytes an element. */
    public static final int CACHE_F16 = 0;
    /** 4 bytes, exact. */
    public static final int CACHE_F32 = 1;
    /** 8 bits in blocks of 32. */
    public static final int CACHE_Q8 = 2;
    /** The model ended its text. */
    public static final int ENDED_MODEL = 0;
    /** As many tokens as were asked for. */
    public static final int ENDED_LIMIT = 1;
    /** The context is full. */
    public static final int ENDED_CONTEXT = 2;
    /** The caller stopped it. */
    public static final int ENDED_CANCELLED = 3;
    /** A step is done: {@code step}, {@code loss} and what follows are of it. */
    public static final int EVENT_STEP = 0;
    /** The rows to validate with were looked at: {@code valid_loss} is their loss. */
    public static final int EVENT_VALIDATION = 1;
    /** The call is paused, or it is too hot: it waits once this event's callback has returned. */
    public static final int EVENT_HELD = 2;
    /** {@code text} is something to tell. */
    public static final int EVENT_NOTE = 3;
}
