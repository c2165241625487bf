import CEngraft
import Foundation

/// The progress of a run. Not called Progress, because Foundation has that name.
public struct RunProgress: Sendable {
    public enum Event: Sendable, Equatable {
        /// A step is done: `step`, `loss` and what follows describe it.
        case step
        /// The validation rows were evaluated; `validLoss` is their loss.
        case validation
        /// The run is paused, or the device is too hot: it waits.
        case held
        /// A note; see `text`.
        case note
        /// A value from a later version of the library.
        case other(UInt32)
    }

    public let event: Event
    /// Steps done.
    public let step: UInt64
    /// Steps of the whole run; 0 while unknown.
    public let steps: UInt64
    /// Tokens that went through the model.
    public let tokens: UInt64
    /// Mean loss of the last step, in nats per token; NaN before the first.
    public let loss: Double
    /// Loss on the validation rows at their last evaluation; NaN before the first.
    public let validLoss: Double
    public let learningRate: Double
    /// Norm of the gradient, before scaling it down.
    public let gradientNorm: Double
    /// Tokens per second of work.
    public let tokensPerSecond: Double
    /// Seconds of work.
    public let seconds: Double
    /// The gate's arm, or a note's text.
    public let text: String?

    init(_ progress: engraft_progress) {
        switch progress.event {
        case UInt32(ENGRAFT_EVENT_STEP): event = .step
        case UInt32(ENGRAFT_EVENT_VALIDATION): event = .validation
        case UInt32(ENGRAFT_EVENT_HELD): event = .held
        case UInt32(ENGRAFT_EVENT_NOTE): event = .note
        default: event = .other(progress.event)
        }
        step = progress.step
        steps = progress.steps
        tokens = progress.tokens
        loss = progress.loss
        validLoss = progress.valid_loss
        learningRate = progress.learning_rate
        gradientNorm = progress.grad_norm
        tokensPerSecond = progress.tokens_per_s
        seconds = progress.seconds
        text = string(progress.text, progress.text_length)
    }
}

/// Ties the end of a stream to the call that feeds it. Stopping the stream mustn't stop the call of the next
/// stream, and a call that hasn't begun needn't begin.
///
/// Unchecked, because a lock guards what changes.
final class Turn: @unchecked Sendable {
    private enum State { case waiting, running, over }

    private let lock = NSLock()
    private var state = State.waiting
    private let cancel: @Sendable () -> Void

    /// `cancel` ends the call. It is called with the lock held and must not wait.
    init(cancel: @escaping @Sendable () -> Void) {
        self.cancel = cancel
    }

    /// Whether the call may begin.
    func begin() -> Bool {
        lock.lock()
        defer { lock.unlock() }
        guard state == .waiting else { return false }
        state = .running
        return true
    }

    func end() {
        lock.lock()
        defer { lock.unlock() }
        state = .over
    }

    /// The consumer has given up the stream.
    func stop() {
        lock.lock()
        defer { lock.unlock() }
        if state == .running { cancel() }
        state = .over
    }
}

/// Passes a callback's values to a stream.
final class Outlet<Element: Sendable>: Sendable {
    private let continuation: AsyncThrowingStream<Element, Error>.Continuation

    init(_ continuation: AsyncThrowingStream<Element, Error>.Continuation) {
        self.continuation = continuation
    }

    /// False if nobody listens any more.
    func take(_ element: Element) -> Bool {
        if case .terminated = continuation.yield(element) { return false }
        return true
    }
}

/// Turns a blocking call into a stream of what its callback receives. The call begins at once on `queue`, because
/// Swift's own threads must not block. It keeps what it captures until it returns.
///
/// `call` gets the callback's `user`: an `Outlet<Element>`, retained until the call returns.
func stream<Element: Sendable>(
    of _: Element.Type,
    on queue: DispatchQueue,
    cancel: @escaping @Sendable () -> Void,
    call: @escaping @Sendable (UnsafeMutableRawPointer) throws -> Void
) -> AsyncThrowingStream<Element, Error> {
    AsyncThrowingStream { continuation in
        let turn = Turn(cancel: cancel)
        continuation.onTermination = { termination in
            if case .cancelled = termination { turn.stop() }
        }
        queue.async {
            guard turn.begin() else { return }
            let user = Unmanaged.passRetained(Outlet(continuation))
            defer { user.release() }
            let outcome = Result { try call(user.toOpaque()) }
            turn.end()
            switch outcome {
            case .success: continuation.finish()
            case .failure(let failure): continuation.finish(throwing: failure)
            }
        }
    }
}

/// The callback of runs; `user` is an `Outlet<RunProgress>`.
func onProgress(_ progress: UnsafePointer<engraft_progress>?, _ user: UnsafeMutableRawPointer?) -> Bool {
    guard let progress, let user else { return false }
    let outlet = Unmanaged<Outlet<RunProgress>>.fromOpaque(user).takeUnretainedValue()
    return outlet.take(RunProgress(progress.pointee))
}

/// The callback of sessions; `user` is an `Outlet<String>`. The library passes whole UTF-8 characters, so each
/// piece can be decoded separately.
func onText(_ piece: UnsafePointer<CChar>?, _ length: Int, _ user: UnsafeMutableRawPointer?) -> Bool {
    guard let user, let piece = string(piece, length) else { return false }
    return Unmanaged<Outlet<String>>.fromOpaque(user).takeUnretainedValue().take(piece)
}
