package dev.engraft;

/** An error from the library. */
public final class EngraftException extends RuntimeException {
    private static final long serialVersionUID = 1;

    private final int code;

    public EngraftException(int code, String message) {
        super(message);
        this.code = code;
    }

    /** Called by engraft_jni.c. */
    EngraftException(int code, byte[] utf8) {
        this(code, Native.text(utf8));
    }

    /** One of {@link Engraft}'s codes, such as {@link Engraft#DOES_NOT_FIT}. */
    public int code() {
        return code;
    }

    /** The code's name, such as "DOES_NOT_FIT". */
    public String codeName() {
        return Engraft.codeName(code);
    }
}
