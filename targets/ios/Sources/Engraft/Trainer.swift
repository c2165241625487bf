import CEngraft
import Foundation

/// A training run. One call at a time; others throw `busy`. `cancel`, `pause`, `resume` and `setThermal` may be
/// called from anywhere, at any time, and never wait.
public final class Trainer: ThermalSteered {
    let handle: Handle
    private let queue = DispatchQueue(label: "engraft.trainer", qos: .utility)

    /// Projections of each block.
    public struct Modules: OptionSet, Sendable {
        public let rawValue: UInt32
        public init(rawValue: UInt32) { self.rawValue = rawValue }

        public static let q = Modules(rawValue: UInt32(ENGRAFT_MODULE_Q))
        public static let k = Modules(rawValue: UInt32(ENGRAFT_MODULE_K))
        public static let v = Modules(rawValue: UInt32(ENGRAFT_MODULE_V))
        public static let o = Modules(rawValue: UInt32(ENGRAFT_MODULE_O))
        public static let gate = Modules(rawValue: UInt32(ENGRAFT_MODULE_GATE))
        public static let up = Modules(rawValue: UInt32(ENGRAFT_MODULE_UP))
        public static let down = Modules(rawValue: UInt32(ENGRAFT_MODULE_DOWN))
    }

    /// How the learning rate falls.
    public enum Schedule: Sendable {
        case linear, cosine, constant

        var code: UInt32 {
            switch self {
            case .linear: return UInt32(ENGRAFT_SCHEDULE_LINEAR)
            case .cosine: return UInt32(ENGRAFT_SCHEDULE_COSINE)
            case .constant: return UInt32(ENGRAFT_SCHEDULE_CONSTANT)
            }
        }
    }

    /// How to train an adapter. Zero is the default for every number.
    public struct Options: Sendable {
        /// Rank of the adapter, at most 256 (0: 8).
        public var rank: UInt32 = 0
        /// The adapter's effect is scaled by alpha/rank (0: twice the rank).
        public var alpha: Float = 0
        /// Share of the adapter's inputs set to zero during training, below 1.
        public var dropout: Float = 0
        /// Which projections to adapt (empty: all seven).
        public var modules: Modules = []
        /// How many of the last blocks to adapt (0: all).
        public var lastLayers: UInt32 = 0
        public var dora = false
        /// Scales by alpha/sqrt(rank) instead.
        public var rankStabilized = false
        /// Sequences per batch (0: 1).
        public var batchSize: UInt32 = 0
        /// Batches to sum gradients over before each step (0: 1).
        public var gradientAccumulation: UInt32 = 0
        public var schedule = Schedule.linear
        /// Steps of rising learning rate at the start.
        public var warmupSteps: UInt32 = 0
        /// Optimizer steps of the whole run (0: 300).
        public var steps: UInt64 = 0
        /// Peak learning rate (0: 2e-4).
        public var learningRate = 0.0
        /// AdamW's decoupled weight decay.
        public var weightDecay = 0.0
        /// Scale gradients down to this norm (0: 1; negative: never).
        public var maxGradientNorm = 0.0
        /// The learning rate of B as a multiple of A's (0: 1).
        public var loraPlusRatio = 0.0
        /// Weight of the divergence from the base in each token's loss (0: off).
        public var klWeight = 0.0
        /// Seed for the initial adapter, dropout and the row order.
        public var seed: UInt64 = 0
        /// Bytes of private memory that the run may take (0: no limit).
        public var memoryBudget: UInt64 = 0
        /// Threads (0: as many as there are cores).
        public var threads: UInt32 = 0
        /// Keeps activations in 32 bits, for comparison.
        public var exact = false
        /// Saves the adapter in 16 bits.
        public var half = false
        /// Data whose training rows the model already knows, mixed into the batches.
        public var replay: TrainingData?
        /// Number of rows to sample from the base instead, when the trainer is made; takes a while (0: none).
        public var replayCount: UInt32 = 0
        /// Maximum tokens per sampled row (0: 64).
        public var replayTokens: UInt32 = 0
        /// Share of replayed rows, at most 0.9 (0: 0.1 if there is something to replay).
        public var replayShare = 0.0
        /// Batches of rows to initialize A from their inputs' main directions (EVA) (0: A starts at random).
        public var evaBatches: UInt32 = 0
        /// Reverses the divergence of `klWeight` to KL(tuned‖base).
        public var klReverse = false
        public init() {}

        /// All but the data, whose handle is valid only during a call.
        func params() throws -> engraft_train_params {
            var params = try defaults(engraft_train_params()) { engraft_train_default_params($0, $1) }
            params.rank = rank
            params.alpha = alpha
            params.dropout = dropout
            params.modules = modules.rawValue
            params.num_layers = lastLayers
            params.dora = dora.flag
            params.rslora = rankStabilized.flag
            params.batch_size = batchSize
            params.grad_accumulation_steps = gradientAccumulation
            params.schedule = schedule.code
            params.warmup_steps = warmupSteps
            params.steps = steps
            params.learning_rate = learningRate
            params.weight_decay = weightDecay
            params.max_grad_norm = maxGradientNorm
            params.lora_plus_ratio = loraPlusRatio
            params.kl_weight = klWeight
            params.seed = seed
            params.memory_budget = memoryBudget
            params.threads = threads
            params.exact = exact.flag
            params.half = half.flag
            params.replay_count = replayCount
            params.replay_tokens = replayTokens
            params.replay_share = replayShare
            params.eva_batches = evaBatches
            params.kl_reverse = klReverse.flag
            return params
        }
    }

    /// Plans and allocates everything that training takes. Throws `doesNotFit` if that exceeds the budget.
    public init(model: Model, data: TrainingData, options: Options = Options()) throws {
        var params: engraft_train_params = try options.params()
        handle = try Handle(free: { engraft_trainer_free($0) }) { made in
            use(options.replay?.handle) { replay in
                params.replay = replay
                return model.handle.use { model in
                    data.handle.use { engraft_trainer_create(model, $0, &params, made) }
                }
            }
        }
    }

    /// Trains this many steps, or with 0 all that are left. Begins at once, on a separate thread. A second run waits
    /// for the first.
    ///
    /// When the stream is given up (by `break` or a cancelled task), the trainer is cancelled before its next step
    /// and stays so until `resume`; what was trained stays. In a cancelled task the loop ends without an error, as
    /// with all such streams; call `Task.checkCancellation()` after it.
    public func run(steps: UInt64 = 0) -> AsyncThrowingStream<RunProgress, Error> {
        let handle = self.handle
        return stream(
            of: RunProgress.self, on: queue,
            cancel: { _ = handle.use { engraft_trainer_cancel($0) } },
            call: { user in try handle.call { engraft_trainer_run($0, steps, onProgress, user) } }
        )
    }

    /// Takes one step. Blocks, so don't call it on the main thread. Its event is `note` if the step was skipped or
    /// the run returned to its checkpoint; the log says why.
    public func step() throws -> RunProgress {
        try filled { engraft_trainer_step($0, $1) }
    }

    /// The progress of the run. While it runs, this throws `busy`; use the stream then.
    public func progress() throws -> RunProgress {
        try filled { engraft_trainer_progress($0, $1) }
    }

    private func filled(
        _ fill: (OpaquePointer, UnsafeMutablePointer<engraft_progress>) -> Int32
    ) throws -> RunProgress {
        var progress = engraft_progress()
        progress.struct_size = size(of: progress)
        try handle.call { fill($0, &progress) }
        return RunProgress(progress)
    }

    /// The loss on the validation rows: the base's before the first step, with the adapter afterwards.
    /// Blocks, so don't call it on the main thread.
    public func evaluate() throws -> Double {
        var loss = 0.0
        try handle.call { engraft_trainer_evaluate($0, &loss) }
        return loss
    }

    /// Commits the current adapter as `adapter.engraft` in a folder, which is created if missing. When this returns,
    /// it is on disk and was read back. Throws `busy` if another trainer has its checkpoints there, or another call
    /// or process writes to it.
    public func save(to folder: URL) throws {
        try handle.call { trainer in
            withText(folder.path) { engraft_trainer_save(trainer, $0, $1) }
        }
    }

    /// Commits everything that the run needs to continue, and the adapter as `save` does. From then on the folder
    /// belongs to this trainer, until it is released or uses another folder. The two newest checkpoints are kept.
    public func checkpoint(to folder: URL) throws {
        try handle.call { trainer in
            withText(folder.path) { engraft_trainer_checkpoint(trainer, $0, $1) }
        }
    }

    /// Continues from the newest good checkpoint in a folder. The trainer must have taken no step, and must be made
    /// with the run's model, rows and settings.
    public func restore(from folder: URL) throws {
        try handle.call { trainer in
            withText(folder.path) { engraft_trainer_restore(trainer, $0, $1) }
        }
    }

    /// A copy of the current adapter.
    public func adapter() throws -> Adapter {
        Adapter(try Handle(free: { engraft_adapter_free($0) }) { made in
            handle.use { engraft_trainer_adapter($0, made) }
        })
    }

    /// Ends the run, and later ones, with `cancelled` until `resume`.
    public func cancel() throws {
        try handle.call { engraft_trainer_cancel($0) }
    }

    /// Makes the run wait before its next step.
    public func pause() throws {
        try handle.call { engraft_trainer_pause($0) }
    }

    /// Undoes a pause or a cancellation.
    public func resume() throws {
        try handle.call { engraft_trainer_resume($0) }
    }

    /// Sets how hot the device is, so that training rests accordingly.
    public func setThermal(_ thermal: Thermal) throws {
        try handle.call { engraft_trainer_set_thermal($0, thermal.code) }
    }
}
