import CEngraft
import Foundation

/// The library's lines.
public enum Log {
    public enum Level: Sendable {
        /// Errors.
        case error
        /// Warnings that a user should see.
        case warn
        /// Choices that the library made.
        case info
        /// Details for finding a bug.
        case debug

        var code: Int32 {
            switch self {
            case .error: return ENGRAFT_LOG_ERROR
            case .warn: return ENGRAFT_LOG_WARN
            case .info: return ENGRAFT_LOG_INFO
            case .debug: return ENGRAFT_LOG_DEBUG
            }
        }

        init(code: Int32) {
            switch code {
            case ENGRAFT_LOG_ERROR: self = .error
            case ENGRAFT_LOG_WARN: self = .warn
            case ENGRAFT_LOG_INFO: self = .info
            default: self = .debug
            }
        }
    }

    public typealias Handler = @Sendable (Level, String) -> Void

    /// Passes all lines up to `level` to `handler`, which replaces the previous one; nil ends logging. When this
    /// returns, the previous handler never runs again. Any thread may call the handler, even several at once. It must
    /// neither set a handler nor wait for a thread that does.
    public static func set(_ handler: Handler?, upTo level: Level = .info) throws {
        try LogHandlers.shared.set(handler.map { LogHandler($0) }, level)
    }
}

/// The callback's `user`.
private final class LogHandler: Sendable {
    let handler: Log.Handler
    init(_ handler: @escaping Log.Handler) { self.handler = handler }
}

/// Holds the handler that the library has. Unchecked, because a lock guards what changes.
private final class LogHandlers: @unchecked Sendable {
    static let shared = LogHandlers()

    private let lock = NSLock()
    private var current: Unmanaged<LogHandler>?

    /// Releases each box once: here if the library refuses it, otherwise when the next one replaces it.
    func set(_ handler: LogHandler?, _ level: Log.Level) throws {
        lock.lock()
        defer { lock.unlock() }
        let next = handler.map { Unmanaged.passRetained($0) }
        let code = next.map { engraft_log_set(onLine, $0.toOpaque(), level.code) }
            ?? engraft_log_set(nil, nil, ENGRAFT_LOG_NONE)
        guard code == ENGRAFT_OK else {
            let failure = EngraftError(ofThisThread: code)
            next?.release()
            throw failure
        }
        current?.release()
        current = next
    }
}

private func onLine(
    _ level: Int32, _ text: UnsafePointer<CChar>?, _ length: Int, _ user: UnsafeMutableRawPointer?
) {
    guard let user, let line = string(text, length) else { return }
    Unmanaged<LogHandler>.fromOpaque(user).takeUnretainedValue().handler(Log.Level(code: level), line)
}
