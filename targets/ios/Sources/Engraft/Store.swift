import CEngraft
import Foundation

/// A folder of generations. Any number of threads may use it at once. Only one writer, of all processes, may change
/// it at a time; others throw `busy`.
public final class Store: Sendable {
    let handle: Handle

    /// A generation.
    public struct Generation: Sendable {
        public let kind: Adapter.Kind
        /// Its number, from 1.
        public let number: UInt64
        /// The generation that a rollback leads to; 0 for none.
        public let previous: UInt64
        /// Bytes of its files.
        public let bytes: UInt64
        /// How many damaged generations were passed over for this one; the log says why.
        public let passedOver: UInt64
        /// Digest of the model that it is for.
        public let baseDigest: Data
    }

    /// Opens the store in a folder, which is created if missing, unless it `mustExist`.
    public init(folder: URL, mustExist: Bool = false) throws {
        try checkVersion()
        var params = try defaults(engraft_store_params()) { engraft_store_default_params($0, $1) }
        params.must_exist = mustExist.flag
        handle = try Handle(free: { engraft_store_free($0) }) { made in
            withText(folder.path) { engraft_store_open($0, $1, &params, made) }
        }
    }

    /// Makes the winner of a gate's verdict the active generation and returns its number. Throws `gateRefused` if the
    /// base stays. When this returns, everything is on disk and was read back.
    @discardableResult
    public func promote(_ gate: Gate) throws -> UInt64 {
        var number: UInt64 = 0
        try handle.call { store in
            gate.handle.use { engraft_store_promote(store, $0, &number) }
        }
        return number
    }

    /// Makes an adapter the active generation on the caller's judgement, without the gate. `verdict` is stored with
    /// it: say why.
    @discardableResult
    public func promote(_ adapter: Adapter, verdict: String) throws -> UInt64 {
        var number: UInt64 = 0
        try handle.call { store in
            adapter.handle.use { adapter in
                withText(verdict) { engraft_store_promote_adapter(store, adapter, $0, $1, &number) }
            }
        }
        return number
    }

    /// The active generation, with its files verified; nil if nothing was ever promoted.
    public func active() throws -> Generation? {
        var info = engraft_generation_info()
        info.struct_size = size(of: info)
        try handle.call { engraft_store_active($0, &info) }
        guard let kind = Adapter.Kind(code: info.kind) else { return nil }
        return Generation(
            kind: kind, number: info.number, previous: info.previous, bytes: info.bytes,
            passedOver: info.passed_over, baseDigest: withUnsafeBytes(of: info.base_digest) { Data($0) }
        )
    }

    /// Loads the active generation, held against the model: an adapter, examples, or the base alone, also
    /// where nothing was ever promoted. Blocks, so don't call it on the main thread.
    public func load(for model: Model, options: Adapter.Options = Adapter.Options()) throws -> Adapter {
        var params: engraft_adapter_params = try options.params()
        return Adapter(try Handle(free: { engraft_adapter_free($0) }) { made in
            handle.use { store in
                model.handle.use { engraft_store_load(store, $0, &params, made) }
            }
        })
    }

    /// Makes the previously active generation active again and returns its number.
    @discardableResult
    public func rollback() throws -> UInt64 {
        var number: UInt64 = 0
        try handle.call { engraft_store_rollback($0, &number) }
        return number
    }

    /// Makes a generation active after verifying it.
    public func activate(_ number: UInt64) throws {
        try handle.call { engraft_store_activate($0, number) }
    }

    /// Removes all generations except the newest good ones, the active one, and the one that a rollback leads to.
    /// Returns how many were removed. Throws `misuse` for a count of 0.
    @discardableResult
    public func prune(keeping count: Int) throws -> UInt64 {
        guard count >= 0 else { throw EngraftError(code: .misuse, message: "count is \(count)") }
        var removed: UInt64 = 0
        try handle.call { engraft_store_prune($0, count, &removed) }
        return removed
    }

    /// All generations, as JSON.
    public func list() throws -> String {
        try handle.use { store in try text { engraft_store_list(store, $0, $1, $2) } }
    }
}
