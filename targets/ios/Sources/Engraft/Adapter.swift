import CEngraft
import Foundation

/// What is added to a model. Immutable; any number of threads and sessions may use it at once.
public final class Adapter: Sendable {
    let handle: Handle

    public enum Kind: Sendable, Equatable {
        /// Trained parameters.
        case adapter
        /// Examples that go before every prompt.
        case fewShot
        /// Nothing: only the base.
        case base
        /// A value from a later version of the library.
        case other(UInt32)

        /// Nil if the library returns 0, which means nothing at all.
        init?(code: UInt32) {
            switch code {
            case 0: return nil
            case UInt32(ENGRAFT_KIND_ADAPTER): self = .adapter
            case UInt32(ENGRAFT_KIND_FEW_SHOT): self = .fewShot
            case UInt32(ENGRAFT_KIND_BASE): self = .base
            default: self = .other(code)
            }
        }
    }

    /// How to load an adapter. Zero is the default for every number.
    public struct Options: Sendable {
        /// Accepts an adapter made for another base if its shapes fit.
        public var forceBase = false
        /// Factor on its effect (0: 1, as trained).
        public var scale: Float = 0
        /// Threads for loading it (0: as many as there are cores).
        public var threads: UInt32 = 0
        public init() {}

        func params() throws -> engraft_adapter_params {
            var params = try defaults(engraft_adapter_params()) { engraft_adapter_default_params($0, $1) }
            params.force_base = forceBase.flag
            params.scale = scale
            params.threads = threads
            return params
        }
    }

    /// Facts about an adapter. For examples and the base alone, all figures are 0.
    public struct Info: Sendable {
        public let kind: Kind
        /// The largest rank of a projection.
        public let rank: Int
        public let dora: Bool
        public let parameters: UInt64
        /// Steps that it was trained for.
        public let steps: UInt64
        /// Trained tokens: those that counted in the loss.
        public let tokens: UInt64
        /// Held-out loss of the base in nats per token; NaN if unknown.
        public let validLossBefore: Float
        /// Held-out loss with the adapter; NaN if unknown.
        public let validLossAfter: Float
    }

    init(_ handle: Handle) {
        self.handle = handle
    }

    /// Loads an adapter from its file, or from a folder that holds `adapter.engraft`, and checks it against the
    /// model. Blocks, so don't call it on the main thread.
    public init(contentsOf location: URL, for model: Model, options: Options = Options()) throws {
        var params: engraft_adapter_params = try options.params()
        handle = try Handle(free: { engraft_adapter_free($0) }) { made in
            model.handle.use { model in
                withText(location.path) { engraft_adapter_load(model, $0, $1, &params, made) }
            }
        }
    }

    /// Facts about the adapter.
    public func info() throws -> Info {
        var info = engraft_adapter_info()
        info.struct_size = size(of: info)
        try handle.call { engraft_adapter_get_info($0, &info) }
        return Info(
            kind: Kind(code: info.kind) ?? .base, rank: Int(info.rank), dora: info.dora == 1,
            parameters: info.parameters, steps: info.steps, tokens: info.tokens,
            validLossBefore: info.valid_loss_before, validLossAfter: info.valid_loss_after
        )
    }

    /// Commits the adapter as `adapter.engraft` in a folder, which is created if missing; `half` stores it in 16
    /// bits. When this returns, it is on disk and was read back. Throws `busy` if a trainer has its checkpoints
    /// there, or another call or process writes to it.
    public func save(to folder: URL, half: Bool = false) throws {
        try handle.call { adapter in
            withText(folder.path) { engraft_adapter_save(adapter, $0, $1, half.flag) }
        }
    }
}

/// A place that sessions take their adapter from. It may be swapped at any time, from any thread, and belongs to one
/// model: that of the first adapter put into it, or of the first session that follows it.
public final class AdapterSlot: Sendable {
    let handle: Handle

    /// An empty slot: sessions that follow it use the base alone.
    public init() throws {
        try checkVersion()
        handle = try Handle(free: { engraft_slot_free($0) }) { engraft_slot_create($0) }
    }

    /// Puts an adapter or the base alone into the slot and returns the number of swaps. Sessions that follow it use
    /// that from their next token on. Never waits if all share one `Model`; otherwise it may read both model files.
    @discardableResult
    public func swap(_ adapter: Adapter?) throws -> UInt64 {
        var generation: UInt64 = 0
        try handle.call { slot in
            use(adapter?.handle) { engraft_slot_swap(slot, $0, &generation) }
        }
        return generation
    }
}
