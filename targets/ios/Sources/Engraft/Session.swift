import CEngraft
import Foundation

/// A sequence with its cache. One call at a time; others throw `busy`, but streams wait for each other. `cancel`
/// may be called from anywhere.
public final class Session: Trimmable {
    let handle: Handle
    private let queue = DispatchQueue(label: "engraft.session", qos: .userInitiated)

    /// How to store keys and values.
    public enum Cache: Sendable {
        case f16, f32, q8

        var code: UInt32 {
            switch self {
            case .f16: return UInt32(ENGRAFT_CACHE_F16)
            case .f32: return UInt32(ENGRAFT_CACHE_F32)
            case .q8: return UInt32(ENGRAFT_CACHE_Q8)
            }
        }
    }

    /// How a prompt is put to the model.
    public enum Prompting: Sendable {
        /// As the adapter was trained; as a text without one, or where that isn't known.
        case asTrained
        /// Into the model's chat template, as the user's message.
        case chat
        /// As the beginning of a text.
        case text

        var code: UInt32 {
            switch self {
            case .asTrained: return UInt32(ENGRAFT_PROMPT_AS_TRAINED)
            case .chat: return UInt32(ENGRAFT_PROMPT_CHAT)
            case .text: return UInt32(ENGRAFT_PROMPT_TEXT)
            }
        }
    }

    /// How to make a session. Zero is the default for every number.
    public struct Options: Sendable {
        /// Tokens of the context (0: what the model was trained on, up to 4096).
        public var contextSize: UInt32 = 0
        public var cache = Cache.f16
        /// Threads (0: as many as there are cores). Give parallel sessions 1 each.
        public var threads: UInt32 = 0
        /// Keeps activations in 32 bits.
        public var exact = false
        public init() {}

        func params() throws -> engraft_session_params {
            var params = try defaults(engraft_session_params()) { engraft_session_default_params($0, $1) }
            params.ctx_size = contextSize
            params.cache_type = cache.code
            params.threads = threads
            params.exact = exact.flag
            return params
        }
    }

    /// How to generate text. Zero is the default for every number; a negative `topP` or `minP` is off.
    public struct Generation: Sendable {
        /// Maximum tokens (0: 128; `UInt32.max`: until the model stops or the context is full).
        public var tokensMax: UInt32 = 0
        /// How the prompt is put.
        public var prompting = Prompting.asTrained
        /// Continues the session's chat or text instead of starting over.
        public var keep = false
        /// Always takes the most likely token; without a temperature also if answers were judged so.
        public var greedy = false
        /// Draws from this many of the most likely tokens (0: 40; negative: all).
        public var topK: Int32 = 0
        /// Temperature (0: 0.8).
        public var temperature: Float = 0
        /// Draws from the most likely tokens that together have this probability (0: 0.95).
        public var topP: Float = 0
        /// Drops tokens below this share of the top token's probability (0: 0.05).
        public var minP: Float = 0
        /// Makes recent tokens less likely (0: 1, which is off).
        public var repeatPenalty: Float = 0
        /// Seed for the draws.
        public var seed: UInt64 = 0
        /// The system message of the chat; nil for the one that the adapter was trained with, if there is one.
        public var system: String?
        public init() {}

        /// All but the system message, whose address is valid only during a call.
        func params() throws -> engraft_generate_params {
            var params = try defaults(engraft_generate_params()) { engraft_generate_default_params($0, $1) }
            params.n_predict = tokensMax
            params.prompting = prompting.code
            params.keep = keep.flag
            params.greedy = greedy.flag
            params.top_k = topK
            params.temp = temperature
            params.top_p = topP
            params.min_p = minP
            params.repeat_penalty = repeatPenalty
            params.seed = seed
            return params
        }
    }

    public enum Ending: Sendable, Equatable {
        /// The model ended its text.
        case model
        /// The token limit was reached.
        case limit
        /// The context is full.
        case context
        /// The caller stopped it.
        case cancelled
        /// A value from a later version of the library.
        case other(UInt32)

        init(code: UInt32) {
            switch code {
            case UInt32(ENGRAFT_ENDED_MODEL): self = .model
            case UInt32(ENGRAFT_ENDED_LIMIT): self = .limit
            case UInt32(ENGRAFT_ENDED_CONTEXT): self = .context
            case UInt32(ENGRAFT_ENDED_CANCELLED): self = .cancelled
            default: self = .other(code)
            }
        }
    }

    /// Facts about what was generated.
    public struct Summary: Sendable {
        public let ending: Ending
        /// Tokens of the prompt, including the template and the examples.
        public let promptTokens: UInt64
        public let tokens: UInt64
        /// Seconds to read the prompt.
        public let promptSeconds: Double
        /// Seconds to generate.
        public let seconds: Double
        /// The slot's generation when the last token was computed; 0 without a slot.
        public let generation: UInt64
    }

    /// A session on a model, with an adapter of that model (otherwise `baseMismatch`) or with the base alone.
    public init(model: Model, adapter: Adapter? = nil, options: Options = Options()) throws {
        var params: engraft_session_params = try options.params()
        handle = try Handle(free: { engraft_session_free($0) }) { made in
            model.handle.use { model in
                use(adapter?.handle) { engraft_session_create(model, $0, &params, made) }
            }
        }
    }

    /// The bytes that such a session will take, with adapters up to a rank.
    public static func bytes(model: Model, rank: UInt32, options: Options = Options()) throws -> UInt64 {
        var params: engraft_session_params = try options.params()
        var bytes: UInt64 = 0
        try model.handle.call { engraft_session_bytes($0, &params, rank, &bytes) }
        return bytes
    }

    /// Continues a prompt, or answers it as a chat, piece by piece. Begins at once, on a separate thread. When the
    /// stream is given up, the call ends before its next token, and the session can be used again.
    ///
    /// `ended` receives the figures on that thread before the stream ends, unless the call failed.
    public func generate(
        _ prompt: String,
        _ generation: Generation = Generation(),
        ended: (@Sendable (Summary) -> Void)? = nil
    ) -> AsyncThrowingStream<String, Error> {
        let handle = self.handle
        return stream(
            of: String.self, on: queue,
            cancel: { _ = handle.use { engraft_session_cancel($0) } },
            call: { user in try generated(handle, prompt, generation, user, ended) }
        )
    }

    /// Stops the running call before its next token, if there is one.
    public func cancel() throws {
        try handle.call { engraft_session_cancel($0) }
    }

    /// Uses an adapter of this model, or the base alone, from the next token on. Stops following a slot.
    public func setAdapter(_ adapter: Adapter?) throws {
        try handle.call { session in
            use(adapter?.handle) { engraft_session_set_adapter(session, $0) }
        }
    }

    /// Takes the adapter from a slot of this model from now on, checking the slot before every token.
    public func follow(_ slot: AdapterSlot) throws {
        try handle.call { session in
            slot.handle.use { engraft_session_follow(session, $0) }
        }
    }

    /// Forgets everything that was read and generated.
    public func reset() throws {
        try handle.call { engraft_session_reset($0) }
    }

    /// Frees the memory of the cache and the buffers and forgets what was read and generated; the next call
    /// allocates them again. Throws `busy` while generating.
    public func trim() throws {
        try handle.call { engraft_session_trim($0) }
    }
}

/// The call behind `Session.generate`.
private func generated(
    _ handle: Handle,
    _ prompt: String,
    _ generation: Session.Generation,
    _ user: UnsafeMutableRawPointer,
    _ ended: (@Sendable (Session.Summary) -> Void)?
) throws {
    var params: engraft_generate_params = try generation.params()
    var info = engraft_generate_info()
    info.struct_size = size(of: info)
    let code = withText(generation.system) { system, systemLength in
        params.system = system
        params.system_length = systemLength
        return withText(prompt) { prompt, promptLength in
            handle.use { engraft_session_generate($0, prompt, promptLength, &params, onText, user, &info) }
        }
    }
    // Read it before calling `ended`, which may fail on this thread and so replace the message.
    let outcome = Result { try check(code) }
    if code == ENGRAFT_OK || code == ENGRAFT_CANCELLED {
        ended?(Session.Summary(
            ending: Session.Ending(code: info.ended), promptTokens: info.prompt_tokens, tokens: info.tokens,
            promptSeconds: info.prompt_seconds, seconds: info.seconds, generation: info.generation
        ))
    }
    try outcome.get()
}
