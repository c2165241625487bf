package dev.engraft;

import java.nio.charset.StandardCharsets;

/**
 * The functions of engraft_jni.c. Handles are the library's numbers, 0 for none; texts are UTF-8. Each throws
 * {@link EngraftException} for a negative code.
 */
final class Native {
    static {
        System.loadLibrary("engraft_jni");
    }

    private Native() {}

    /** Receives text as it is generated, in whole characters; returning false stops. */
    interface TextSink {
        boolean onText(byte[] utf8);
    }

    static byte[] utf8(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    static byte[] utf8OrNull(String text) {
        return text == null ? null : utf8(text);
    }

    static String text(byte[] utf8) {
        return utf8 == null ? null : new String(utf8, StandardCharsets.UTF_8);
    }

    static native byte[] version();
    static native byte[] codeName(int code);
    static native void logSet(int level);

    static native long modelOpen(byte[] path, boolean noMmap, byte[] digestCache);
    static native void modelFree(long model);
    static native void modelInfo(long model, ModelInfo info);
    static native byte[] modelName(long model);
    static native byte[] modelDigest(long model);
    static native void modelTrim(long model);

    static native long dataOpen(long model, byte[] path, DataParams params);
    static native long dataFromMemory(long model, byte[] train, byte[] valid, byte[] test, DataParams params);
    static native void dataFree(long data);
    static native void dataInfo(long data, DataInfo info);
    static native byte[] dataSkipped(long data, long index);

    static native long planCreate(long model, long data, TrainParams params, long replay);
    static native void planFree(long plan);
    static native void planInfo(long plan, PlanInfo info);
    static native byte[] planPoolName(long plan, long index);
    static native long planPoolBytes(long plan, long index);
    static native byte[] planAdvice(long plan);

    static native long trainerCreate(long model, long data, TrainParams params, long replay);
    static native void trainerFree(long trainer);
    static native Progress trainerStep(long trainer);
    static native void trainerRun(long trainer, long steps, ProgressListener listener);
    static native double trainerEvaluate(long trainer);
    static native Progress trainerProgress(long trainer);
    static native void trainerSave(long trainer, byte[] folder);
    static native void trainerCheckpoint(long trainer, byte[] folder);
    static native void trainerRestore(long trainer, byte[] folder);
    static native long trainerAdapter(long trainer);
    static native void trainerCancel(long trainer);
    static native void trainerPause(long trainer);
    static native void trainerResume(long trainer);
    static native void trainerSetThermal(long trainer, int thermal);

    static native long adapterLoad(long model, byte[] path, AdapterParams params);
    static native void adapterFree(long adapter);
    static native void adapterInfo(long adapter, AdapterInfo info);
    static native void adapterSave(long adapter, byte[] folder, boolean half);

    static native long slotCreate();
    static native void slotFree(long slot);
    static native long slotSwap(long slot, long adapter);

    static native long sessionBytes(long model, SessionParams params, int rank);
    static native long sessionCreate(long model, long adapter, SessionParams params);
    static native void sessionFree(long session);
    static native void sessionSetAdapter(long session, long adapter);
    static native void sessionFollow(long session, long slot);
    static native void sessionGenerate(
            long session, byte[] prompt, GenerateParams params, byte[] system, TextSink sink, GenerateInfo info);
    static native void sessionCancel(long session);
    static native void sessionReset(long session);
    static native void sessionTrim(long session);

    static native long gateCreate(
            long model, long data, GateParams params, long replay, byte[] retention, long retentionRows,
            byte[] unfinished, long store);
    static native void gateFree(long gate);
    static native void gateRun(long gate, ProgressListener listener);
    static native int gateDecision(long gate);
    static native byte[] gateArm(long gate);
    static native byte[] gateVerdict(long gate);
    static native byte[] gateReport(long gate);
    static native long gateAdapter(long gate);
    static native void gateCancel(long gate);
    static native void gatePause(long gate);
    static native void gateResume(long gate);
    static native void gateSetThermal(long gate, int thermal);

    static native long storeOpen(byte[] folder, boolean mustExist);
    static native void storeFree(long store);
    static native long storePromote(long store, long gate);
    static native long storePromoteAdapter(long store, long adapter, byte[] verdict);
    static native byte[] storeActive(long store, GenerationInfo info);
    static native long storeLoad(long store, long model, AdapterParams params);
    static native long storeRollback(long store);
    static native void storeActivate(long store, long generation);
    static native long storePrune(long store, long keep);
    static native byte[] storeList(long store);
}
