// A recipe to copy into an app, not part of the package: adapts overnight, while the phone charges and is idle.
//
// Info.plist needs the identifier in BGTaskSchedulerPermittedIdentifiers, and `processing` among
// UIBackgroundModes. Call `register()` before the app has finished launching, and `schedule()` whenever there
// is something new to learn. To try it, type in Xcode's debugger
//   e -l objc -- (void)[[BGTaskScheduler sharedScheduler] _simulateLaunchForTaskWithIdentifier:@"…"]
import BackgroundTasks
import Engraft
import Foundation
import os

struct AdaptTask: Sendable {
    /// As in Info.plist.
    let identifier: String
    let model: URL
    /// The rows to learn from: JSON, one object per line.
    let rows: @Sendable () throws -> Data
    /// The folder of the adapters, such as Application Support/Adapters.
    let adapters: URL
    /// Minimum time in seconds from one night's work to the next, if nobody calls `schedule()` meanwhile.
    var interval: TimeInterval = 20 * 3600
    /// Minutes for everything: training takes what measuring leaves, which the next three settings limit. The system
    /// grants only a few minutes, and a comparison that is cut off decides nothing.
    var minutes = 2.0
    /// Evaluations on the validation rows per training run.
    var evaluations: UInt32 = 4
    /// Maximum number of held-out rows to compare the arms on.
    var heldOutRows: UInt32 = 100
    /// Maximum tokens per answer, if answers are compared: each arm answers every held-out row.
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

    /// Asks the system for a turn, as soon as possible or after `wait` seconds. Replaces an earlier request and its
    /// wait.
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
        // Ask before the work, which the system may end early. If it fails, this turn is still worthwhile.
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
        // The system grants a few seconds. Cancelling the task ends the gate's stream at once and the gate before
        // its next step; the store shows no unfinished generation. Opening a model or reading rows can't be
        // cancelled, so return the turn without waiting for the work: the system kills apps that hold on to it.
        task.expirationHandler = {
            work.cancel()
            turn.complete(success: false)
        }
    }

    /// Trains, compares, and promotes the winner. It isn't a failure if there is none.
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
        let store = try await blocking { try Store(folder: adapters.appendingPathComponent("store")) }
        options.store = store
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
            try await promote(gate, into: store)
            await prune(store)
        case .keepBase, .keepActive, .undecided, .other:
            break
        }
    }

    /// Waits while another writer changes the store, such as a rollback by the user. That takes moments; failing
    /// would waste the night's comparison.
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

    /// The promotion stands even if this fails; the next night prunes older generations, too.
    private func prune(_ store: Store) async {
        do {
            _ = try await blocking { try store.prune(keeping: 3) }
        } catch {
            Self.log.error("not pruned: \(String(describing: error), privacy: .public)")
        }
    }

    /// The folder of the adapters. It is readable after the first unlock, because the work is done while the phone is
    /// locked. It is excluded from backups, because adapters contain traces of the rows and can be trained again. New
    /// files inherit its protection class.
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

    /// Half of what this process may take now, because the app may need the rest. Never 0, which would mean no limit:
    /// with nothing left, the gate must refuse.
    private static func memoryBudget() -> UInt64 {
        #if targetEnvironment(simulator)
        // The simulator always reports 0.
        return 1 << 30
        #else
        return max(UInt64(os_proc_available_memory()) / 2, 1)
        #endif
    }

    private static let log = Logger(subsystem: "engraft", category: "adapt")
}

/// Runs a blocking call on a thread that may block. Swift has only as many threads as cores, and blocking one could
/// keep the rest of the app waiting.
private func blocking<T: Sendable>(_ call: @escaping @Sendable () throws -> T) async throws -> T {
    try await withCheckedThrowingContinuation { continuation in
        DispatchQueue.global(qos: .utility).async {
            continuation.resume(with: Result { try call() })
        }
    }
}

/// The system's task, completed once, by any thread. Unchecked, because BGTask isn't marked as safe to share; a lock
/// is held whenever it is used here.
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
