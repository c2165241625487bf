import CEngraft
import Foundation

/// A model file, opened and checked. Any number of threads may use it at once.
public final class Model: Sendable {
    let handle: Handle

    /// Facts about a model.
    public struct Info: Sendable {
        public let vocabulary: Int
        public let width: Int
        public let layers: Int
        public let contextLength: Int
        public let parameters: UInt64
        /// Bytes of the file that are mapped: clean pages, which don't count against an app's limit.
        public let mappedBytes: UInt64
        /// Bytes of private memory, without the tokenizer.
        public let privateBytes: UInt64
        /// Bytes of private memory that the tokenizer takes once needed.
        public let tokenizerBytes: UInt64
    }

    /// Opens a GGUF file. Blocks while reading it, so don't call it on the main thread.
    ///
    /// - Parameters:
    ///   - mapped: false reads the file into private memory. A mapped file must stay readable: see the README
    ///     on the protection class.
    ///   - digestCache: a folder that caches digests, so that each file is fully read only once.
    public init(contentsOf file: URL, mapped: Bool = true, digestCache: URL? = nil) throws {
        try checkVersion()
        var params = try defaults(engraft_model_params()) { engraft_model_default_params($0, $1) }
        params.no_mmap = (!mapped).flag
        handle = try Handle(free: { engraft_model_free($0) }) { made in
            withText(digestCache?.path) { cache, cacheLength in
                params.digest_cache = cache
                params.digest_cache_length = cacheLength
                return withText(file.path) { engraft_model_open($0, $1, &params, made) }
            }
        }
    }

    /// Facts about the model.
    public func info() throws -> Info {
        var info = engraft_model_info()
        info.struct_size = size(of: info)
        try handle.call { engraft_model_get_info($0, &info) }
        return Info(
            vocabulary: Int(info.vocab), width: Int(info.d_model), layers: Int(info.n_layers),
            contextLength: Int(info.context_length), parameters: info.parameters,
            mappedBytes: info.mapped_bytes, privateBytes: info.private_bytes,
            tokenizerBytes: info.tokenizer_bytes
        )
    }

    /// The name in the model's file, which may be empty.
    public func name() throws -> String {
        try handle.use { model in try text { engraft_model_name(model, $0, $1, $2) } }
    }

    /// The 32 bytes that identify the model to adapters. The first call reads the whole file.
    public func digest() throws -> Data {
        var digest = Data(count: 32)
        try handle.call { model in
            digest.withUnsafeMutableBytes {
                engraft_model_digest(model, $0.bindMemory(to: UInt8.self).baseAddress)
            }
        }
        return digest
    }

    /// Frees the tokenizer's memory unless it is in use.
    public func trim() throws {
        try handle.call { engraft_model_trim($0) }
    }
}
