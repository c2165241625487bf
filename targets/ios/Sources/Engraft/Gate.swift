import CEngraft
import Foundation

/// Compares training with prompting and with doing nothing, on rows that were held back, and says what is
/// worth keeping. One call at a time; `cancel`, `pause`, `resume` and `setThermal` from anywhere.
public final class Gate: ThermalSteered {
    let handle: Handle
    private let queue = DispatchQueue(label: "engraft.gate", qos: .utility)

    /// What is compared, beside the base alone.
    public struct Arms: OptionSet, Sendable {
        public let rawValue: UInt32
        public init(rawValue: UInt32) { self.rawValue = rawValue }

        /// Examples in the prompt.
        public static let fewShot = Arms(rawValue: UInt32(ENGRAFT_ARM_FEW_SHOT))
        public static let lora = Arms(rawValue: UInt32(ENGRAFT_ARM_LORA))
        public static let dora = Arms(rawValue: UInt32(ENGRAFT_ARM_DORA))
    }

    /// How answers are compared.
    public enum Metric: Sendable {
        /// Not at all, beyond what the data's task says.
        case none
        /// Word for word, white space aside.
        case exact
        /// As JSON, all fields equal.
        case json

        var code: UInt32 {
            switch self {
            case .none: return UInt32(ENGRAFT_METRIC_NONE)
            case .exact: return UInt32(ENGRAFT_METRIC_EXACT)
            case .json: return UInt32(ENGRAFT_METRIC_JSON)
            }
        }
    }

    public enum Decision: Sendable, Equatable {
        /// Nothing was judged yet.
        case undecided
        /// The arm of this name is to be promoted.
        case promote(arm: String)
        /// Examples in the prompt do as well without training.
        case keepPrompting
        case keepBase
        /// What a later version of the library decides.
        case other(UInt32)
    }

    /// What is compared, and how. Zero is the default of every number.
    public struct Options: Sendable {
        /// Beside the base alone (empty: all). Without few-shot, training need not beat it.
        public var arms: Arms = []
        /// Examples in a few-shot prompt (0: 5).
        public var shots: UInt32 = 0
        /// Steps of each trained arm (0: 300).
        public var steps: UInt32 = 0
        /// Sequences of a step (0: 1).
        public var batchSize: UInt32 = 0
        /// Rank of the adapters (0: the largest that memory and rows allow, up to 16).
        public var rank: UInt32 = 0
        public var metric = Metric.none
        /// Tokens of an answer at most (0: 256).
        public var answerTokens: UInt32 = 0
        /// Training rows at most (0: all).
        public var trainRows: UInt32 = 0
        /// Held-out rows at most (0: all).
        public var heldOutRows: UInt32 = 0
        /// Held-out rows below which nothing is decided (0: 20).
        public var examplesMin: UInt32 = 0
        /// Bootstrap resamples (0: 10000).
        public var resamples: UInt32 = 0
        /// Looks at the validation rows in a run (0: 10).
        public var evaluations: UInt32 = 0
        /// Threads (0: as many as there are cores).
        public var threads: UInt32 = 0
        /// Keeps activations in 32 bits.
        public var exact = false
        /// Lets a lower loss alone win, where answers are compared.
        public var lossAlone = false
        /// Whether training must not harm the text that is built in. Where not, name one of your own.
        public var builtInRetention = true
        /// Minutes to train, shared by the trained arms, instead of steps (0: steps count).
        public var minutes = 0.0
        /// Learning rate at its highest (0: found by a range test).
        public var learningRate = 0.0
        /// Two-sided level of the intervals and tests (0: 0.05).
        public var level = 0.0
        /// Seed of adapters, examples and the bootstrap.
        public var seed: UInt64 = 0
        /// Bytes of private memory that training and scoring may take (0: no limit).
        public var memoryBudget: UInt64 = 0
        /// A text that training must not harm, in passages behind lines that begin with `%% `, or as one.
        public var retention: String?
        /// Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: none); half as much time again.
        public var klWeight = 0.0
        /// Rows that the model knew, mixed into every batch: those to train on of this data.
        public var replay: TrainingData?
        /// Rows to sample from the base for that (0: none).
        public var replayCount: UInt32 = 0
        /// Tokens to sample for each of them at most (0: 64).
        public var replayTokens: UInt32 = 0
        /// Share of the rows that is replayed, at most 0.9 (0: 0.1 where there is something to replay).
        public var replayShare = 0.0
        /// Rows whose answers training must not harm, beside retention texts: all of this data.
        public var retentionRows: TrainingData?
        /// A folder for what is unfinished, made if it is missing: the same comparison goes on from there after the
        /// process has ended.
        public var unfinished: String?
        public init() {}

        /// All but texts and data, whose addresses are valid within a call only.
        func params() throws -> engraft_gate_params {
            var params = try defaults(engraft_gate_params()) { engraft_gate_default_params($0, $1) }
            params.arms = arms.rawValue
            params.shots = shots
            params.steps = steps
            params.batch_size = batchSize
            params.rank = rank
            params.metric = metric.code
            params.answer_tokens = answerTokens
            params.train_rows = trainRows
            params.held_out_rows = heldOutRows
            params.examples_min = examplesMin
            params.resamples = resamples
            params.evaluations = evaluations
            params.threads = threads
            params.exact = exact.flag
            params.loss_alone = lossAlone.flag
            params.no_built_in_retention = (!builtInRetention).flag
            params.minutes = minutes
            params.learning_rate = learningRate
            params.level = level
            params.seed = seed
            params.memory_budget = memoryBudget
            params.kl_weight = klWeight
            params.replay_count = replayCount
            params.replay_tokens = replayTokens
            params.replay_share = replayShare
            return params
        }
    }

    /// Makes a gate for data; nothing is computed yet.
    public init(model: Model, data: TrainingData, options: Options = Options()) throws {
        var params: engraft_gate_params = try options.params()
        handle = try Handle(free: { engraft_gate_free($0) }) { made in
            use(options.replay?.handle) { replay in
                use(options.retentionRows?.handle) { rows in
                    withText(options.retention) { retention, retentionLength in
                        withText(options.unfinished) { unfinished, unfinishedLength in
                            params.replay = replay
                            params.retention_rows = rows
                            params.retention = retention
                            params.retention_length = retentionLength
                            params.unfinished = unfinished
                            params.unfinished_length = unfinishedLength
                            return model.handle.use { model in
                                data.handle.use { engraft_gate_create(model, $0, &params, made) }
                            }
                        }
                    }
                }
            }
        }
    }

    /// Trains and measures all arms, and judges them; begins at once, on a thread of its own. `decision`
    /// tells the outcome once the stream has ended; an earlier one is gone. What is given up ends as
    /// `Trainer.run` does, and judges nothing. Throws `badData` where a file of the rows was changed since they
    /// were opened.
    public func run() -> AsyncThrowingStream<RunProgress, Error> {
        let handle = self.handle
        return stream(
            of: RunProgress.self, on: queue,
            cancel: { _ = handle.use { engraft_gate_cancel($0) } },
            call: { user in try handle.call { engraft_gate_run($0, onProgress, user) } }
        )
    }

    /// What was decided.
    public func decision() throws -> Decision {
        var decision: UInt32 = 0
        let arm = try handle.use { gate in
            try text { engraft_gate_decision(gate, &decision, $0, $1, $2) }
        }
        switch decision {
        case UInt32(ENGRAFT_DECISION_NONE): return .undecided
        case UInt32(ENGRAFT_DECISION_PROMOTE): return .promote(arm: arm)
        case UInt32(ENGRAFT_DECISION_KEEP_PROMPTING): return .keepPrompting
        case UInt32(ENGRAFT_DECISION_KEEP_BASE): return .keepBase
        default: return .other(decision)
        }
    }

    /// The verdict as JSON, with its reasons and figures.
    public func verdict() throws -> String {
        try handle.use { gate in try text { engraft_gate_verdict(gate, $0, $1, $2) } }
    }

    /// The report as one HTML page, which holds sample rows and answers to them.
    public func report() throws -> String {
        try handle.use { gate in try text { engraft_gate_report(gate, $0, $1, $2) } }
    }

    /// A copy of what the verdict names: an adapter, or examples. Throws `gateRefused` where the base stays.
    public func adapter() throws -> Adapter {
        Adapter(try Handle(free: { engraft_adapter_free($0) }) { made in
            handle.use { engraft_gate_adapter($0, made) }
        })
    }

    /// Ends the run, and those that follow, with `cancelled`, until `resume`.
    public func cancel() throws {
        try handle.call { engraft_gate_cancel($0) }
    }

    /// Lets the run wait.
    public func pause() throws {
        try handle.call { engraft_gate_pause($0) }
    }

    /// Takes back a pause and a cancellation.
    public func resume() throws {
        try handle.call { engraft_gate_resume($0) }
    }

    /// Says how hot the device is: the comparison rests accordingly.
    public func setThermal(_ thermal: Thermal) throws {
        try handle.call { engraft_gate_set_thermal($0, thermal.code) }
    }
}
