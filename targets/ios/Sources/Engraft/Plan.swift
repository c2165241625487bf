import CEngraft

/// What a run of training will take, before any of it is taken. Never changes.
public final class Plan: Sendable {
    let handle: Handle

    /// Bytes by purpose.
    public struct Pool: Sendable {
        public let name: String
        public let bytes: UInt64
    }

    /// What a plan says.
    public struct Info: Sendable {
        /// Within the budget, if there is one, and within what the machine leaves this process.
        public let fits: Bool
        /// Bytes of private memory at most: the sum of the pools.
        public let privateBytes: UInt64
        /// Bytes of the model's file that are mapped beside them.
        public let mappedBytes: UInt64
        /// The budget that was asked about; 0 for none.
        public let budgetBytes: UInt64
        public let pools: [Pool]
    }

    /// Plans a run. What does not fit is no error: `info` tells. Without data, rows are taken for as long as
    /// they may be by default.
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

    /// What the plan says.
    public func info() throws -> Info {
        var info = engraft_plan_info()
        info.struct_size = size(of: info)
        try handle.call { engraft_plan_get_info($0, &info) }
        return Info(
            fits: info.fits == 1, privateBytes: info.private_bytes, mappedBytes: info.mapped_bytes,
            budgetBytes: info.budget_bytes, pools: try (0..<Int(info.pools)).map(pool)
        )
    }

    /// Why the plan does not fit, and what would; empty where it fits.
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
