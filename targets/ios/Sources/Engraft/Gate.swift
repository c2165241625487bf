import CEngraft
import Foundation

/// Compares training with prompting and with doing nothing, on held-out rows, and decides what is worth keeping.
/// One call at a time; `cancel`, `pause`, `resume` and `setThermal` may be called from anywhere.
public final class Gate: ThermalSteered {
    let handle: Handle
    private let queue = DispatchQueue(label: "engraft.gate", qos: .utility)

    /// The arms to compare with the base alone.
    public struct Arms: OptionSet, Sendable {
        public let rawValue: UInt32
        public init(rawValue: UInt32) { self.rawValue = rawValue }

        /// Examples in the prompt.
        public static let fewShot = Arms(rawValue: UInt32(ENGRAFT_ARM_FEW_SHOT))
        public static let lora = Arms(rawValue: UInt32(ENGRAFT_ARM_LORA))
        public static let dora = Arms(rawValue: UInt32(ENGRAFT_ARM_DORA))
    }

    /// How to compare answers.
    public enum Metric: Sendable {
        /// Not at all, except as the data's task says.
        case none
        /// Word for word, except for white space.
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
        /// Nothing has been judged yet.
        case undecided
        /// Promote the arm of this name.
        case promote(arm: String)
        /// Keep prompting: examples in the prompt help, and no trained arm passed.
        case keepPrompting
        case keepBase
        /// Keep the store's active generation: nothing is shown to be better.
        case keepActive
        /// A decision from a later version of the library.
        case other(UInt32)
    }

    /// What to compare, and how. Zero is the default for every number.
    public struct Options: Sendable {
        /// Arms to compare with the base alone (empty: all). Without few-shot, training needn't beat it.
        public var arms: Arms = []
        /// Examples in a few-shot prompt (0: 5).
        public var shots: UInt32 = 0
        /// Steps per trained arm (0: 300).
        public var steps: UInt32 = 0
        /// Sequences per step (0: 8 for a protected LoRA, else 1).
        public var batchSize: UInt32 = 0
        /// Rank of the adapters (0: the largest that memory allows, up to 64 for a protected LoRA; others: up to 16).
        public var rank: UInt32 = 0
        public var metric = Metric.none
        /// Maximum tokens per answer (0: 256).
        public var answerTokens: UInt32 = 0
        /// Maximum number of training rows (0: all).
        public var trainRows: UInt32 = 0
        /// Maximum number of held-out rows (0: all).
        public var heldOutRows: UInt32 = 0
        /// Minimum number of held-out rows for a decision (0: 20).
        public var examplesMin: UInt32 = 0
        /// Bootstrap resamples (0: 10000).
        public var resamples: UInt32 = 0
        /// Evaluations on the validation rows per run (0: 10).
        public var evaluations: UInt32 = 0
        /// Threads (0: as many as there are cores).
        public var threads: UInt32 = 0
        /// Keeps activations in 32 bits.
        public var exact = false
        /// Lets a lower loss win even if no more answers are right.
        public var lossAlone = false
        /// Whether to use the built-in text that training must not harm. If not, supply your own.
        public var builtInRetention = true
        /// Whether a LoRA keeps to directions that ordinary text leaves quiet. That costs some gain and saves most of
        /// what a plain LoRA forgets.
        public var protectsOrdinaryText = true
        /// Minutes for everything instead of steps: training takes what scoring leaves (0: use steps).
        public var minutes = 0.0
        /// Peak learning rate (0: 2e-3 for a protected LoRA, else found by a range test).
        public var learningRate = 0.0
        /// Two-sided significance level of intervals and tests (0: 0.05).
        public var level = 0.0
        /// Seed for adapters, examples and the bootstrap.
        public var seed: UInt64 = 0
        /// Bytes of private memory that training and scoring may take (0: no limit).
        public var memoryBudget: UInt64 = 0
        /// A text that training must not harm. Lines that start with `%% ` separate passages.
        public var retention: String?
        /// Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: off). Adds about half the time.
        public var klWeight = 0.0
        /// Data whose training rows the model already knows, mixed into the batches.
        public var replay: TrainingData?
        /// Number of rows to sample from the base instead (0: none).
        public var replayCount: UInt32 = 0
        /// Maximum tokens per sampled row (0: 64).
        public var replayTokens: UInt32 = 0
        /// Share of replayed rows, at most 0.9 (0: 0.1 if there is something to replay).
        public var replayShare = 0.0
        /// Data whose answers training must not harm, in addition to retention texts.
        public var retentionRows: TrainingData?
        /// A folder for unfinished work, created if missing. The same comparison continues from it after the process
        /// has ended.
        public var unfinished: String?
        /// A store whose active generation is compared, too: nothing replaces it that isn't better.
        public var store: Store?
        public init() {}

        /// All but texts and data, whose addresses are valid only during a call.
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
            params.protect_off = (!protectsOrdinaryText).flag
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

    /// Makes a gate for data without computing anything yet.
    public init(model: Model, data: TrainingData, options: Options = Options()) throws {
        var params: engraft_gate_params = try options.params()
        handle = try Handle(free: { engraft_gate_free($0) }) { made in
            use(options.replay?.handle) { replay in
                use(options.retentionRows?.handle) { rows in
                    withText(options.retention) { retention, retentionLength in
                        withText(options.unfinished) { unfinished, unfinishedLength in
                            use(options.store?.handle) { store in
                                params.replay = replay
                                params.retention_rows = rows
                                params.retention = retention
                                params.retention_length = retentionLength
                                params.unfinished = unfinished
                                params.unfinished_length = unfinishedLength
                                params.store = store
                                return model.handle.use { model in
                                    data.handle.use { engraft_gate_create(model, $0, &params, made) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// Trains and measures all arms and judges them. Begins at once, on a separate thread. `decision` has the outcome
    /// once the stream has ended; an earlier outcome is gone. If the stream is given up, the run ends like
    /// `Trainer.run` and judges nothing. Throws `badData` if a file of the rows has changed since it was opened.
    public func run() -> AsyncThrowingStream<RunProgress, Error> {
        let handle = self.handle
        return stream(
            of: RunProgress.self, on: queue,
            cancel: { _ = handle.use { engraft_gate_cancel($0) } },
            call: { user in try handle.call { engraft_gate_run($0, onProgress, user) } }
        )
    }

    /// The decision.
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
        case UInt32(ENGRAFT_DECISION_KEEP_ACTIVE): return .keepActive
        default: return .other(decision)
        }
    }

    /// The verdict as JSON, with its reasons and figures.
    public func verdict() throws -> String {
        try handle.use { gate in try text { engraft_gate_verdict(gate, $0, $1, $2) } }
    }

    /// The report as a single HTML page with sample rows and answers. Without JavaScript, the page shows the
    /// verdict alone.
    public func report() throws -> String {
        try handle.use { gate in try text { engraft_gate_report(gate, $0, $1, $2) } }
    }

    /// A copy of what the verdict chose: an adapter or examples. Throws `gateRefused` if the base stays.
    public func adapter() throws -> Adapter {
        Adapter(try Handle(free: { engraft_adapter_free($0) }) { made in
            handle.use { engraft_gate_adapter($0, made) }
        })
    }

    /// Ends the run, and later ones, with `cancelled` until `resume`.
    public func cancel() throws {
        try handle.call { engraft_gate_cancel($0) }
    }

    /// Makes the run wait.
    public func pause() throws {
        try handle.call { engraft_gate_pause($0) }
    }

    /// Undoes a pause or a cancellation.
    public func resume() throws {
        try handle.call { engraft_gate_resume($0) }
    }

    /// Sets how hot the device is, so that the comparison rests accordingly.
    public func setThermal(_ thermal: Thermal) throws {
        try handle.call { engraft_gate_set_thermal($0, thermal.code) }
    }
}
