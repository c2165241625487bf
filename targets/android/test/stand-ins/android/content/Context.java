package android.content;

import java.io.File;

/** As Coroutines.kt, of Android. */
public abstract class Context {
    public static final String POWER_SERVICE = "power";

    public abstract Object getSystemService(String name);

    public abstract File getCacheDir();
}
