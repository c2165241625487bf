// As Coroutines.kt, of androidx.work.
@file:Suppress("UNUSED_PARAMETER", "unused")

package androidx.work

import android.content.Context
import java.util.concurrent.TimeUnit

class Data {
    fun getString(key: String): String? = TODO()
}

fun workDataOf(vararg pairs: Pair<String, Any?>): Data = TODO()

class WorkerParameters

abstract class ListenableWorker(context: Context, parameters: WorkerParameters) {
    val applicationContext: Context = TODO()
    val inputData: Data = TODO()
    val runAttemptCount: Int = TODO()

    open class Result {
        companion object {
            fun success(): Result = TODO()
            fun failure(): Result = TODO()
        }
    }
}

abstract class CoroutineWorker(context: Context, parameters: WorkerParameters) : ListenableWorker(context, parameters) {
    abstract suspend fun doWork(): Result

    suspend fun setProgress(data: Data): Unit = TODO()
}

class Constraints {
    class Builder {
        fun setRequiresCharging(requires: Boolean): Builder = TODO()
        fun setRequiresDeviceIdle(requires: Boolean): Builder = TODO()
        fun setRequiresBatteryNotLow(requires: Boolean): Builder = TODO()
        fun build(): Constraints = TODO()
    }
}

class PeriodicWorkRequest {
    class Builder(worker: Class<out ListenableWorker>, interval: Long, unit: TimeUnit) {
        fun setConstraints(constraints: Constraints): Builder = TODO()
        fun setInputData(data: Data): Builder = TODO()
        fun build(): PeriodicWorkRequest = TODO()
    }
}
