// See Coroutines.kt.
@file:Suppress("UNUSED_PARAMETER", "unused")

package kotlinx.coroutines.flow

import kotlin.coroutines.CoroutineContext
import kotlinx.coroutines.channels.ProducerScope

interface Flow<out T> {
    suspend fun collect(collector: suspend (value: T) -> Unit)
}

fun <T> callbackFlow(block: suspend ProducerScope<T>.() -> Unit): Flow<T> = TODO()

fun <T> Flow<T>.conflate(): Flow<T> = TODO()

fun <T> Flow<T>.filter(predicate: suspend (T) -> Boolean): Flow<T> = TODO()

fun <T> Flow<T>.flowOn(context: CoroutineContext): Flow<T> = TODO()
