package dev.engraft

import java.util.concurrent.CancellationException
import java.util.concurrent.atomic.AtomicReference
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.ProducerScope
import kotlinx.coroutines.channels.awaitClose
import kotlinx.coroutines.channels.trySendBlocking
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.callbackFlow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.launch

/**
 * Trains when collected: this many steps, or with 0 all that are left. Cancelling the collection cancels the trainer
 * and ends once its step is done; then the trainer may be closed. It stays cancelled until [Trainer.resume]. A slow
 * collector slows down training; add `conflate()` if the latest value is enough.
 */
fun Trainer.progress(steps: Long = 0): Flow<Progress> =
    listening(cancel = { cancel() }) { tell -> run(steps, ProgressListener { tell(it) }) }

/** Trains, measures and judges when collected, like [Trainer.progress]. Afterwards see [Gate.decision]. */
fun Gate.progress(): Flow<Progress> =
    listening(cancel = { cancel() }) { tell -> run(ProgressListener { tell(it) }) }

/** Generates text when collected. Cancelling the collection stops it before its next token. */
fun Session.generate(prompt: String, params: GenerateParams? = null): Flow<String> =
    listening(cancel = { cancel() }) { tell -> generate(prompt, params, TextListener { tell(it) }) }

/** The state of a flow's single call. Whoever moves it on from [WAITING] decides whether the call begins at all. */
private enum class Turn { WAITING, RUNNING, OVER }

/**
 * A flow of what [call] emits. The call blocks a thread of [Dispatchers.IO] until it returns; [Dispatchers.Default]
 * has only as many threads as cores, and collecting or cancelling may need one. The flow ends after the call has
 * returned, even if cancelled: only then may its objects be closed.
 */
private fun <T> listening(cancel: () -> Unit, call: (tell: (T) -> Boolean) -> Unit): Flow<T> =
    callbackFlow<T> {
        val turn = AtomicReference(Turn.WAITING)
        launch { close(failureOf(turn, this@callbackFlow, call)) }
        // Reached by the collector's cancellation while the call still blocks. One that has not begun need not, and
        // one that has returned is followed by others': a trainer would stay cancelled.
        awaitClose { if (turn.getAndSet(Turn.OVER) == Turn.RUNNING) cancel() }
    }.flowOn(Dispatchers.IO)

/** What ended the call, null for nothing. A closed channel refuses what it is told, which ends the call, too. */
private fun <T> failureOf(
    turn: AtomicReference<Turn>,
    channel: ProducerScope<T>,
    call: (tell: (T) -> Boolean) -> Unit
): Throwable? =
    try {
        if (!turn.compareAndSet(Turn.WAITING, Turn.RUNNING)) throw CancellationException("nobody collects any more")
        call { channel.trySendBlocking(it).isSuccess }
        null
    } catch (failure: Throwable) {
        failure
    } finally {
        turn.set(Turn.OVER)
    }
