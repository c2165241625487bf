// Declarations of kotlinx.coroutines that Flows.kt and AdaptWorker.kt use, written after its documentation, so that
// a compiler without that library can hold the two files against the Java classes. Nothing here runs.
@file:Suppress("UNUSED_PARAMETER", "unused")

package kotlinx.coroutines

import kotlin.coroutines.CoroutineContext

typealias CancellationException = java.util.concurrent.CancellationException

interface Job : CoroutineContext.Element

interface CoroutineScope {
    val coroutineContext: CoroutineContext
}

object Dispatchers {
    val IO: CoroutineContext = TODO()
}

fun CoroutineScope.launch(block: suspend CoroutineScope.() -> Unit): Job = TODO()

suspend fun delay(timeMillis: Long): Unit = TODO()

suspend fun <T> withContext(context: CoroutineContext, block: suspend CoroutineScope.() -> T): T = TODO()
