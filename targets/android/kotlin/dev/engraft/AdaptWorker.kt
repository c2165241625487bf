package dev.engraft

import android.content.Context
import android.os.Build
import android.os.PowerManager
import androidx.work.Constraints
import androidx.work.CoroutineWorker
import androidx.work.PeriodicWorkRequest
import androidx.work.WorkerParameters
import androidx.work.workDataOf
import java.util.concurrent.TimeUnit
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.conflate
import kotlinx.coroutines.flow.filter
import kotlinx.coroutines.withContext

/**
 * A recipe: once a day, while the device charges, is idle and cool, the gate compares what training on the app's rows
 * brings, and the store keeps what won, and two generations before it. WorkManager stops workers after about ten
 * minutes unless they are in the foreground (see [foreground]), and nothing is kept of a comparison that was stopped:
 * [settings] is to keep it shorter. One that was stopped twice is left until the next day.
 *
 *     WorkManager.getInstance(context).enqueueUniquePeriodicWork(
 *         "adapt", ExistingPeriodicWorkPolicy.KEEP, AdaptWorker.daily(AdaptWorker::class.java, model, rows, store))
 */
open class AdaptWorker(context: Context, parameters: WorkerParameters) : CoroutineWorker(context, parameters) {
    /**
     * Calls `setForeground` with the app's own notification, where the work is to last longer. From the background,
     * where this worker runs, that works up to Android 11 only: later versions throw unless the app is exempt, and
     * the work then goes on within its ten minutes.
     */
    protected open suspend fun foreground() = Unit

    /**
     * What is compared. The minutes bound training only; measuring comes on top of them, and takes its time by the
     * three that follow. How long that is depends on model and device.
     */
    protected open fun settings(): GateParams = GateParams().apply {
        minutes = 2.0
        evaluations = 4
        heldOutRows = 100
        answerTokens = 64
        memoryBudget = 512L shl 20
        threads = 2
    }

    /**
     * Is told what came of it, on a thread that may be blocked: `Engraft.DECISION_*`, or what went wrong. It is not
     * called where the system stopped the work. WorkManager keeps no output of periodic work: what the app is to know
     * later, it must write down here.
     */
    protected open suspend fun ended(decision: Int?, failure: EngraftException?) = Unit

    override suspend fun doWork(): Result {
        if (runAttemptCount >= ATTEMPTS) return Result.failure()
        return withContext(Dispatchers.IO) {
            tryForeground()
            var decision: Int? = null
            var failure: EngraftException? = null
            try {
                decision = adapt()
            } catch (e: EngraftException) {
                failure = e
            }
            ended(decision, failure)
            // Not retry, since the same would only happen again.
            if (failure == null) Result.success() else Result.failure()
        }
    }

    private suspend fun tryForeground() {
        try {
            foreground()
        } catch (e: CancellationException) {
            // It is an IllegalStateException, too.
            throw e
        } catch (e: IllegalStateException) {
            // ForegroundServiceStartNotAllowedException, which older versions of Android do not know by name.
        }
    }

    private suspend fun adapt(): Int =
        Model.open(argument(MODEL), applicationContext.cacheDir.path, false).use { model ->
            Data.open(model, argument(ROWS), null).use { data ->
                Gate.create(model, data, settings()).use { gate -> judge(gate) }
            }
        }

    private suspend fun judge(gate: Gate): Int {
        val power = applicationContext.getSystemService(Context.POWER_SERVICE) as PowerManager
        val heat = if (Build.VERSION.SDK_INT >= 29) Heat(power, gate) else null
        try {
            // When the work is stopped, this cancels the gate, and returns once it has stopped. WorkManager writes
            // progress to its database: training must not wait for that at each step.
            gate.progress().filter { it.event == Engraft.EVENT_STEP }.conflate().collect {
                setProgress(workDataOf(STEP to it.step, STEPS to it.steps, ARM to it.text))
            }
        } finally {
            heat?.close()
        }
        val decision = gate.decision()
        if (decision != Engraft.DECISION_KEEP_BASE) {
            Store.open(argument(STORE)).use {
                promote(gate, it)
                // What was promoted stands, whatever becomes of the older ones.
                try { it.prune(3) } catch (e: EngraftException) { }
            }
        }
        return decision
    }

    /** Waits for who else changes the store: that takes moments, and all that was compared would be done anew. */
    private suspend fun promote(gate: Gate, store: Store) {
        for (attempt in 1..BUSY_ATTEMPTS) {
            try {
                store.promote(gate)
                return
            } catch (e: EngraftException) {
                if (e.code() != Engraft.BUSY || attempt == BUSY_ATTEMPTS) throw e
            }
            delay(BUSY_MILLIS)
        }
    }

    private fun argument(name: String): String =
        inputData.getString(name) ?: throw EngraftException(Engraft.MISUSE, "the work has no $name")

    companion object {
        const val MODEL = "model"
        const val ROWS = "rows"
        const val STORE = "store"
        const val STEP = "step"
        const val STEPS = "steps"
        const val ARM = "arm"

        /** Runs of a day's work: WorkManager begins anew what it stopped, and would all night. */
        private const val ATTEMPTS = 2

        /** A store that is busy is asked so often, and so long apart. */
        private const val BUSY_ATTEMPTS = 21
        private const val BUSY_MILLIS = 500L

        /** Paths of the model, of the rows (JSON lines) and of the store's folder, all in the app's own storage. */
        fun daily(worker: Class<out AdaptWorker>, model: String, rows: String, store: String): PeriodicWorkRequest =
            PeriodicWorkRequest.Builder(worker, 1, TimeUnit.DAYS)
                // Work that waits for an idle device can't have a backoff policy of its own.
                .setConstraints(
                    Constraints.Builder()
                        .setRequiresCharging(true)
                        .setRequiresDeviceIdle(true)
                        .setRequiresBatteryNotLow(true)
                        .build()
                )
                .setInputData(workDataOf(MODEL to model, ROWS to rows, STORE to store))
                .build()
    }
}

/** Tells a gate how hot the device is, until it is closed. Needs Android 10. */
@androidx.annotation.RequiresApi(29)
private class Heat(private val power: PowerManager, private val gate: Gate) : AutoCloseable {
    private val listener = PowerManager.OnThermalStatusChangedListener { status ->
        try {
            gate.setThermal(thermal(status))
        } catch (closed: RuntimeException) {
            // A change that was on its way to the main thread when the work ended.
        }
    }

    init {
        power.addThermalStatusListener(listener)
    }

    override fun close() = power.removeThermalStatusListener(listener)

    /** Work in the background gives way sooner than what the user waits for. */
    private fun thermal(status: Int): Int = when (status) {
        PowerManager.THERMAL_STATUS_NONE -> Engraft.THERMAL_NOMINAL
        PowerManager.THERMAL_STATUS_LIGHT -> Engraft.THERMAL_FAIR
        PowerManager.THERMAL_STATUS_MODERATE -> Engraft.THERMAL_SERIOUS
        else -> Engraft.THERMAL_CRITICAL
    }
}
