import CEngraft

/// The memory that a training run will take, known before allocating any. Immutable.
public final class Plan: Sendable {
    let handle: Handle

    /// Bytes by purpose.
    public struct Pool: Sendable {
        public let name: String
        public let bytes: UInt64
    }

    /// A plan's figures.
    public struct Info: Sendable {
        /// Whether it is within the budget, if any, and within what the machine leaves this process.
        public let fits: Bool
        /// Maximum bytes of private memory: the sum of the pools.
        public let privateBytes: UInt64
        /// Mapped bytes of the model's file, not part of the private memory.
        public let mappedBytes: UInt64
        /// The requested budget; 0 for none.
        public let budgetBytes: UInt64
        public let pools: [Pool]
    }

    /// Plans a run. A run that doesn't fit isn't an error; see `info`. Without data, rows are assumed to have the
    /// default maximum length.
    public init(model: Model, data: TrainingData? = nil, options: Trainer.Options = .init()) throws {
        var params: engraft_train_params = try options.params()
        handle = try Handle(free: { engraft_plan_free($0) }) { made in
            use(options.replay?.handle) { replay in
                params.replay = replay
                return model.handle.use { model in
                    use(data?.handle) { engraft_plan_create(model, $0, &params, made) }
                }
            }
        }
    }

    /// The plan's figures.
    public func info() throws -> Info {
        var info = engraft_plan_info()
        info.struct_size = size(of: info)
        try handle.call { engraft_plan_get_info($0, &info) }
        return Info(
            fits: info.fits == 1, privateBytes: info.private_bytes, mappedBytes: info.mapped_bytes,
            budgetBytes: info.budget_bytes, pools: try (0..<Int(info.pools)).map(pool)
        )
    }

    /// Why the plan doesn't fit, and what would; empty if it fits.
    public func advice() throws -> String {
        try handle.use { plan in try text { engraft_plan_advice(plan, $0, $1, $2) } }
    }

    private func pool(_ index: Int) throws -> Pool {
        var bytes: UInt64 = 0
        let name = try handle.use { plan in
            try text { engraft_plan_pool(plan, index, $0, $1, $2, &bytes) }
        }
        return Pool(name: name, bytes: bytes)
    }
}
