package android.os;

/** As Coroutines.kt, of Android. */
public abstract class PowerManager {
    public static final int THERMAL_STATUS_NONE = 0;
    public static final int THERMAL_STATUS_LIGHT = 1;
    public static final int THERMAL_STATUS_MODERATE = 2;

    /** Is told of changes. */
    public interface OnThermalStatusChangedListener {
        void onThermalStatusChanged(int status);
    }

    public abstract void addThermalStatusListener(OnThermalStatusChangedListener listener);

    public abstract void removeThermalStatusListener(OnThermalStatusChangedListener listener);
}
