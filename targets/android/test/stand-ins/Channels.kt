// See Coroutines.kt.
@file:Suppress("UNUSED_PARAMETER", "unused")

package kotlinx.coroutines.channels

import kotlinx.coroutines.CoroutineScope

class ChannelResult<T> {
    val isSuccess: Boolean = TODO()
}

interface SendChannel<in E> {
    fun close(cause: Throwable? = null): Boolean
}

interface ProducerScope<in E> : CoroutineScope, SendChannel<E>

suspend fun ProducerScope<*>.awaitClose(block: () -> Unit = {}): Unit = TODO()

fun <E> SendChannel<E>.trySendBlocking(element: E): ChannelResult<Unit> = TODO()
