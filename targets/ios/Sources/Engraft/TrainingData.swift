import CEngraft
import Foundation

/// Rows for training and validation. Immutable; any number of threads may use them at once.
public final class TrainingData: Sendable {
    let handle: Handle

    /// How to ask the questions and read the answers.
    public enum Task: Sendable {
        case none, gsm8k, orcaMath, svamp

        var code: UInt32 {
            switch self {
            case .none: return UInt32(ENGRAFT_TASK_NONE)
            case .gsm8k: return UInt32(ENGRAFT_TASK_GSM8K)
            case .orcaMath: return UInt32(ENGRAFT_TASK_ORCA_MATH)
            case .svamp: return UInt32(ENGRAFT_TASK_SVAMP)
            }
        }
    }

    /// How to read rows. Zero is the default for every number.
    public struct Options: Sendable {
        /// Maximum tokens per row; longer rows are cut (0: 256).
        public var maxSequenceLength: UInt32 = 0
        /// Trains only on answers.
        public var maskPrompt = true
        /// Joins prompt and completion without the model's chat template.
        public var raw = false
        public var task = Task.none
        /// Share of the rows to hold out if no validation rows are given (0: 0.1; negative: none).
        public var validFraction = 0.0
        /// Seed for that choice.
        public var splitSeed: UInt64 = 0
        public init() {}

        func params() throws -> engraft_data_params {
            var params = try defaults(engraft_data_params()) { engraft_data_default_params($0, $1) }
            params.max_seq_length = maxSequenceLength
            params.no_mask_prompt = (!maskPrompt).flag
            params.raw = raw.flag
            params.task = task.code
            params.valid_fraction = validFraction
            params.split_seed = splitSeed
            return params
        }
    }

    /// Facts about the rows.
    public struct Info: Sendable {
        public let trainRows: UInt64
        public let trainTokens: UInt64
        public let validRows: UInt64
        public let validTokens: UInt64
        /// Skipped rows; `skipped` names them.
        public let skipped: UInt64
        /// Rows that were cut.
        public let truncated: UInt64
        /// Validation rows that are also training rows, which make the result look too good.
        public let duplicates: UInt64
        /// Tokens of the longest row.
        public let longestRow: UInt64
    }

    /// Rows of a file, or of a folder with `train.jsonl` and optionally `valid.jsonl` and `test.jsonl`. A `Gate`
    /// reads the files again, so leave them unchanged until then. Blocks, so don't call it on the main thread.
    public init(contentsOf location: URL, for model: Model, options: Options = Options()) throws {
        var params: engraft_data_params = try options.params()
        handle = try Handle(free: { engraft_data_free($0) }) { made in
            model.handle.use { model in
                withText(location.path) { engraft_data_open(model, $0, $1, &params, made) }
            }
        }
    }

    /// Rows in memory: JSON, one object per line. Without `valid` and `test`, a share of `train` is split off for
    /// them. The library keeps a copy. Blocks, so don't call it on the main thread.
    public init(
        train: Data, valid: Data? = nil, test: Data? = nil, for model: Model, options: Options = Options()
    ) throws {
        var params: engraft_data_params = try options.params()
        handle = try Handle(free: { engraft_data_free($0) }) { made in
            model.handle.use { model in
                withRows(train) { train, trainLength in
                    withRows(valid) { valid, validLength in
                        withRows(test) { test, testLength in
                            engraft_data_from_memory(
                                model, train, trainLength, valid, validLength, test, testLength, &params, made
                            )
                        }
                    }
                }
            }
        }
    }

    /// Facts about the rows.
    public func info() throws -> Info {
        var info = engraft_data_info()
        info.struct_size = size(of: info)
        try handle.call { engraft_data_get_info($0, &info) }
        return Info(
            trainRows: info.train_rows, trainTokens: info.train_tokens, validRows: info.valid_rows,
            validTokens: info.valid_tokens, skipped: info.skipped, truncated: info.truncated,
            duplicates: info.duplicates, longestRow: info.rows_max
        )
    }

    /// The place of a skipped row and why it was skipped, but never its text. Only the first thousand of a part are
    /// known.
    public func skipped(at index: Int) throws -> String {
        guard index >= 0 else { throw EngraftError(code: .misuse, message: "index is \(index)") }
        return try handle.use { data in try text { engraft_data_skipped(data, index, $0, $1, $2) } }
    }
}

/// Rows in the form that the library takes, valid within `body`.
private func withRows<R>(_ rows: Data?, _ body: (UnsafePointer<UInt8>?, Int) throws -> R) rethrows -> R {
    guard let rows else { return try body(nil, 0) }
    return try rows.withUnsafeBytes { try body($0.bindMemory(to: UInt8.self).baseAddress, $0.count) }
}
