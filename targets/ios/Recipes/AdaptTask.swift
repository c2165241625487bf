// A recipe to copy into an app, no part of the package: adapts overnight, while the phone is charged and
// idle.
//
// Info.plist needs the identifier in BGTaskSchedulerPermittedIdentifiers, and `processing` among
// UIBackgroundModes. Call `register()` before the app has finished launching, and `schedule()` whenever there
// is something new to learn. In Xcode's debugger, the system's own way to try it is
//   e -l objc -- (void)[[BGTaskScheduler sharedScheduler] _simulateLaunchForTaskWithIdentifier:@"…"]
import BackgroundTasks
import Engraft
import Foundation
import os

struct AdaptTask: Sendable {
    /// As in Info.plist.
    let identifier: String
    let model: URL
    /// The rows to learn from: JSON, one object a line.
    let rows: @Sendable () throws -> Data
    /// The folder of the adapters, such as Application Support/Adapters.
    let adapters: URL
    /// The least time from one night's work to the next, in seconds, where nobody calls `schedule()` meanwhile.
    var interval: TimeInterval = 20 * 3600
    /// Minutes to train, shared by the trained arms. Measuring comes on top of them, and is bounded by the three
    /// that follow: the system grants a few minutes, and a comparison that is cut off has decided nothing.
    var minutes = 2.0
    /// Looks at the validation rows in each run of training.
    var evaluations: UInt32 = 4
    /// Held-out rows at most that the arms are compared on.
    var heldOutRows: UInt32 = 100
    /// Tokens of an answer at most, where answers are compared: each arm answers every held-out row.
    var answerTokens: UInt32 = 64

    /// Must be called once, before the app has finished launching.
    func register() -> Bool {
        BGTaskScheduler.shared.register(forTaskWithIdentifier: identifier, using: nil) { task in
            guard let processing = task as? BGProcessingTask else {
                return task.setTaskCompleted(success: false)
            }
            begin(processing)
        }
    }

    /// Asks for a turn: for the next that the system has, or for none before `wait` seconds are over. A request
    /// that is there already is replaced, and its wait with it.
    func schedule(after wait: TimeInterval = 0) throws {
        let request = BGProcessingTaskRequest(identifier: identifier)
        request.requiresExternalPower = true
        request.requiresNetworkConnectivity = false
        if wait > 0 {
            request.earliestBeginDate = Date(timeIntervalSinceNow: wait)
        }
        try BGTaskScheduler.shared.submit(request)
    }

    private func begin(_ task: BGProcessingTask) {
        // Before the work, which may not live to the end. Without a next turn, this one is still worth its
        // while.
        do {
            try schedule(after: interval)
        } catch {
            Self.log.error("not scheduled: \(String(describing: error), privacy: .public)")
        }
        let turn = BackgroundTurn(task)
        let work = Task.detached(priority: .utility) {
            do {
                try await adapt()
                turn.complete(success: true)
            } catch {
                Self.log.error("not adapted: \(String(describing: error), privacy: .public)")
                turn.complete(success: false)
            }
        }
        // The system grants a few seconds. Cancelling the task ends the gate's stream at once, and with it
        // the gate before its next step; nothing of a generation shows in the store before it is whole. Opening
        // a model or reading rows can't be cancelled, so the turn is given back without waiting for the work:
        // an app that holds on to it is ended.
        task.expirationHandler = {
            work.cancel()
            turn.complete(success: false)
        }
    }

    /// Trains, compares, and promotes what is worth it. That nothing is, is no failure.
    func adapt() async throws {
        try prepare(adapters)
        let digests = adapters.appendingPathComponent("digests")
        let base = try await blocking { try Model(contentsOf: model, digestCache: digests) }
        try Task.checkCancellation()
        let data = try await blocking { try TrainingData(train: try rows(), for: base) }
        try Task.checkCancellation()

        var options = Gate.Options()
        options.memoryBudget = Self.memoryBudget()
        options.threads = 2
        options.minutes = minutes
        options.evaluations = evaluations
        options.heldOutRows = heldOutRows
        options.answerTokens = answerTokens
        let gate = try Gate(model: base, data: data, options: options)
        let thermal = ThermalObserver(gate)
        defer { withExtendedLifetime(thermal) {} }

        for try await progress in gate.run() where progress.event == .validation {
            Self.log.info("step \(progress.step), loss \(progress.validLoss)")
        }
        // The loop of a cancelled task ends without an error.
        try Task.checkCancellation()

        switch try gate.decision() {
        case .promote, .keepPrompting:
            let store = try await blocking { try Store(folder: adapters.appendingPathComponent("store")) }
            try await promote(gate, into: store)
            await prune(store)
        case .keepBase, .undecided, .other:
            break
        }
    }

    /// Waits for whoever else changes the store, such as a rollback by the user: that takes moments, and the
    /// comparison a night.
    private func promote(_ gate: Gate, into store: Store) async throws {
        for _ in 0..<20 {
            do {
                _ = try await blocking { try store.promote(gate) }
                return
            } catch let error as EngraftError where error.code == .busy {
                try await Task.sleep(nanoseconds: 500_000_000)
            }
        }
        _ = try await blocking { try store.promote(gate) }
    }

    /// What was promoted stands, whatever becomes of the older ones: the next night prunes them, too.
    private func prune(_ store: Store) async {
        do {
            _ = try await blocking { try store.prune(keeping: 3) }
        } catch {
            Self.log.error("not pruned: \(String(describing: error), privacy: .public)")
        }
    }

    /// The folder of the adapters: readable once the phone was unlocked after its start, since the work is
    /// done while it is locked; and in no backup, since adapters hold traces of what they learnt from, and
    /// can be trained again. What is made in the folder takes its protection class from it.
    private func prepare(_ folder: URL) throws {
        let unlockedOnce = FileProtectionType.completeUntilFirstUserAuthentication
        let protection: [FileAttributeKey: Any] = [.protectionKey: unlockedOnce]
        let files = FileManager.default
        try files.createDirectory(at: folder, withIntermediateDirectories: true, attributes: protection)
        try files.setAttributes(protection, ofItemAtPath: folder.path)
        var values = URLResourceValues()
        values.isExcludedFromBackup = true
        var marked = folder
        try marked.setResourceValues(values)
    }

    /// Half of what this process may take now: the app itself may come to need the rest. Never 0, which would be
    /// no limit: with nothing left, the gate is to refuse.
    private static func memoryBudget() -> UInt64 {
        #if targetEnvironment(simulator)
        // There the system tells 0, whatever is left.
        return 1 << 30
        #else
        return max(UInt64(os_proc_available_memory()) / 2, 1)
        #endif
    }

    private static let log = Logger(subsystem: "engraft", category: "adapt")
}

/// A call that blocks, on a thread that may be blocked: of Swift's own there are as few as cores, and who blocks
/// one may keep the rest of the app waiting.
private func blocking<T: Sendable>(_ call: @escaping @Sendable () throws -> T) async throws -> T {
    try await withCheckedThrowingContinuation { continuation in
        DispatchQueue.global(qos: .utility).async {
            continuation.resume(with: Result { try call() })
        }
    }
}

/// The system's task, which may be completed by any thread, and is once. Unchecked, since BGTask is not
/// marked as safe to share; all that is done with it here is done with the lock held.
private final class BackgroundTurn: @unchecked Sendable {
    private let lock = NSLock()
    private var task: BGProcessingTask?

    init(_ task: BGProcessingTask) {
        self.task = task
    }

    func complete(success: Bool) {
        lock.lock()
        defer { lock.unlock() }
        task?.setTaskCompleted(success: success)
        task = nil
    }
}
