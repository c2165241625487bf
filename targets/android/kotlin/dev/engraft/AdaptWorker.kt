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
 * A recipe: once a day, while the device charges and is idle and cool, the gate judges training on the app's rows.
 * The store keeps the winner and two generations before it. WorkManager stops workers after about ten minutes unless
 * they are in the foreground (see [foreground]). A stopped comparison is lost, so [settings] must keep it shorter;
 * after two stops it waits until the next day.
 *
 *     WorkManager.getInstance(context).enqueueUniquePeriodicWork(
 *         "adapt", ExistingPeriodicWorkPolicy.KEEP, AdaptWorker.daily(AdaptWorker::class.java, model, rows, store))
 */
open class AdaptWorker(context: Context, parameters: WorkerParameters) : CoroutineWorker(context, parameters) {
    /**
     * Override this to call `setForeground` with the app's notification if the work must last longer. From the
     * background, where this worker runs, that works only up to Android 11. Later versions throw unless the app is
     * exempt, and the work then has its ten minutes.
     */
    protected open suspend fun foreground() = Unit

    /**
     * What to compare. The minutes limit only training. Measuring takes additional time, which the next three
     * settings limit and which depends on the model and the device.
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
     * Receives the result, on a thread that may block: `Engraft.DECISION_*`, or the error. It isn't called if the
     * system stopped the work. WorkManager keeps no output of periodic work, so the app must record here what it
     * needs later.
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
            // Don't retry: the same would happen again.
            if (failure == null) Result.success() else Result.failure()
        }
    }

    private suspend fun tryForeground() {
        try {
            foreground()
        } catch (e: CancellationException) {
            // A subclass of IllegalStateException, so it comes first.
            throw e
        } catch (e: IllegalStateException) {
            // ForegroundServiceStartNotAllowedException, a class that older versions of Android lack.
        }
    }

    private suspend fun adapt(): Int =
        Model.open(argument(MODEL), applicationContext.cacheDir.path, false).use { model ->
            Data.open(model, argument(ROWS), null).use { data ->
                Store.open(argument(STORE)).use { store ->
                    val settings = settings()
                    settings.store = store
                    Gate.create(model, data, settings).use { gate -> judge(gate, store) }
                }
            }
        }

    private suspend fun judge(gate: Gate, store: Store): Int {
        val power = applicationContext.getSystemService(Context.POWER_SERVICE) as PowerManager
        val heat = if (Build.VERSION.SDK_INT >= 29) Heat(power, gate) else null
        try {
            // When the work is stopped, this cancels the gate and returns once it has stopped. WorkManager writes
            // progress to its database; training mustn't wait for that at every step.
            gate.progress().filter { it.event == Engraft.EVENT_STEP }.conflate().collect {
                setProgress(workDataOf(STEP to it.step, STEPS to it.steps, ARM to it.text))
            }
        } finally {
            heat?.close()
        }
        val decision = gate.decision()
        if (decision == Engraft.DECISION_PROMOTE || decision == Engraft.DECISION_KEEP_PROMPTING) {
            promote(gate, store)
            // The promotion stands, whatever happens to older generations.
            try { store.prune(3) } catch (e: EngraftException) { }
        }
        return decision
    }

    /** Waits while another writer changes the store. That takes moments; failing would waste the whole comparison. */
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

        /** Attempts per day: WorkManager restarts work that it stopped, and would do so all night. */
        private const val ATTEMPTS = 2

        /** How often to retry a busy store, and how long to wait in between. */
        private const val BUSY_ATTEMPTS = 21
        private const val BUSY_MILLIS = 500L

        /** Paths of the model, the rows (JSON lines) and the store's folder, all in the app's private storage. */
        fun daily(worker: Class<out AdaptWorker>, model: String, rows: String, store: String): PeriodicWorkRequest =
            PeriodicWorkRequest.Builder(worker, 1, TimeUnit.DAYS)
                // Work that waits for an idle device can't set a backoff policy.
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

/** Tells a gate how hot the device is, until closed. Needs Android 10. */
@androidx.annotation.RequiresApi(29)
private class Heat(private val power: PowerManager, private val gate: Gate) : AutoCloseable {
    private val listener = PowerManager.OnThermalStatusChangedListener { status ->
        try {
            gate.setThermal(thermal(status))
        } catch (closed: RuntimeException) {
            // A change can still arrive on the main thread after the work has ended.
        }
    }

    init {
        power.addThermalStatusListener(listener)
    }

    override fun close() = power.removeThermalStatusListener(listener)

    /** Background work slows down earlier than work that the user waits for. */
    private fun thermal(status: Int): Int = when (status) {
        PowerManager.THERMAL_STATUS_NONE -> Engraft.THERMAL_NOMINAL
        PowerManager.THERMAL_STATUS_LIGHT -> Engraft.THERMAL_FAIR
        PowerManager.THERMAL_STATUS_MODERATE -> Engraft.THERMAL_SERIOUS
        else -> Engraft.THERMAL_CRITICAL
    }
}
