package dev.engraft;

/**
 * A sequence with its cache. One call at a time; others get {@link Engraft#BUSY}. {@link #cancel} works from
 * anywhere.
 */
public final class Session extends Handle {
    private Session(long handle) {
        super(handle);
    }

    /**
     * A session with an adapter, or with null the base alone. {@code params} may be null. An adapter of another model
     * is refused with {@link Engraft#BASE_MISMATCH}.
     */
    public static Session create(Model model, Adapter adapter, SessionParams params) {
        return new Session(Native.sessionCreate(model.handle(), orNone(adapter), params));
    }

    /**
     * Uses an adapter of this model, or with null the base alone, from the next token on. Stops following a slot.
     */
    public void setAdapter(Adapter adapter) {
        Native.sessionSetAdapter(handle(), orNone(adapter));
    }

    /** Takes the adapter from a slot of this model from now on, checking the slot before every token. */
    public void follow(Slot slot) {
        Native.sessionFollow(handle(), slot.handle());
    }

    /**
     * Continues a prompt, or answers it as a chat. {@code params} and {@code listener} may be null. A stopped
     * generation also has a result: see {@link GenerateInfo#ended}.
     */
    public GenerateInfo generate(String prompt, GenerateParams params, TextListener listener) {
        GenerateInfo info = new GenerateInfo();
        Native.TextSink sink = listener == null ? null : utf8 -> listener.onText(Native.text(utf8));
        byte[] system = Native.utf8OrNull(params == null ? null : params.system);
        try {
            Native.sessionGenerate(handle(), Native.utf8(prompt), params, system, sink, info);
        } catch (EngraftException e) {
            boolean stopped = e.code() == Engraft.CANCELLED && info.ended == Engraft.ENDED_CANCELLED;
            if (!stopped) {
                throw e;
            }
        }
        return info;
    }

    /** Like {@link #generate}, but returns all of the text at once. */
    public String answer(String prompt, GenerateParams params) {
        StringBuilder all = new StringBuilder();
        generate(prompt, params, text -> {
            all.append(text);
            return true;
        });
        return all.toString();
    }

    /** Stops the running call before its next token, if there is one. */
    public void cancel() {
        Native.sessionCancel(handle());
    }

    /** Forgets everything that was read and generated. */
    public void reset() {
        Native.sessionReset(handle());
    }

    /** Frees the memory of cache and buffers and forgets everything: for {@code onTrimMemory}. */
    public void trim() {
        Native.sessionTrim(handle());
    }

    @Override
    void free(long number) {
        Native.sessionFree(number);
    }
}
