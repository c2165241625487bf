package dev.engraft;

import java.util.LinkedHashMap;
import java.util.Map;

/** The memory that a training run will take, known before allocating any. */
public final class Plan extends Handle {
    private Plan(long handle) {
        super(handle);
    }

    /** Plans a run, even one that doesn't fit. {@code data} and {@code params} may be null. */
    public static Plan create(Model model, Data data, TrainParams params) {
        return new Plan(Native.planCreate(model.handle(), orNone(data), params, TrainParams.replayOf(params)));
    }

    /** The bytes that a session will take, with adapters up to a rank. {@code params} may be null. */
    public static long sessionBytes(Model model, SessionParams params, int rank) {
        return Native.sessionBytes(model.handle(), params, rank);
    }

    /** Whether it fits, and the sums. */
    public PlanInfo info() {
        PlanInfo info = new PlanInfo();
        Native.planInfo(handle(), info);
        return info;
    }

    /** Bytes of each pool, by its name; together they are {@link PlanInfo#privateBytes}. */
    public Map<String, Long> pools() {
        Map<String, Long> pools = new LinkedHashMap<>();
        long count = info().pools;
        for (long i = 0; i < count; i++) {
            pools.merge(Native.text(Native.planPoolName(handle(), i)), Native.planPoolBytes(handle(), i), Long::sum);
        }
        return pools;
    }

    /** Why it doesn't fit, and what would; empty if it fits. */
    public String advice() {
        return Native.text(Native.planAdvice(handle()));
    }

    @Override
    void free(long number) {
        Native.planFree(number);
    }
}
