package android.os;

/** As Coroutines.kt, of Android. */
public final class Build {
    private Build() {}

    /** Versions. */
    public static final class VERSION {
        public static final int SDK_INT = Integer.parseInt("0");

        private VERSION() {}
    }
}
