package dev.engraft;

/** The progress of a run. */
public final class Progress {
    /** {@code Engraft.EVENT_*}. */
    public final int event;
    /** Steps done. */
    public final long step;
    /** Steps of the whole run; 0 while unknown. */
    public final long steps;
    /** Tokens that went through the model. */
    public final long tokens;
    /** Mean loss of the last step, in nats per token; NaN before the first. */
    public final double loss;
    /** Loss on the validation rows at their last evaluation; NaN before the first. */
    public final double validLoss;
    /** Learning rate of the last step. */
    public final double learningRate;
    /** Norm of the last step's gradient, before scaling it down. */
    public final double gradNorm;
    /** Tokens per second of work. */
    public final double tokensPerS;
    /** Seconds of work. */
    public final double seconds;
    /** The gate's arm, or a note's text; null for none. */
    public final String text;

    /** Called by engraft_jni.c. */
    Progress(int event, long step, long steps, long tokens, double loss, double validLoss, double learningRate,
            double gradNorm, double tokensPerS, double seconds, byte[] utf8) {
        this.event = event;
        this.step = step;
        this.steps = steps;
        this.tokens = tokens;
        this.loss = loss;
        this.validLoss = validLoss;
        this.learningRate = learningRate;
        this.gradNorm = gradNorm;
        this.tokensPerS = tokensPerS;
        this.seconds = seconds;
        this.text = Native.text(utf8);
    }

    @Override
    public String toString() {
        return "step " + step + "/" + steps + " loss " + loss + (text == null ? "" : " " + text);
    }
}
