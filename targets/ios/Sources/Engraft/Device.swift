import CEngraft
import Dispatch
import Foundation

/// How hot the device is.
public enum Thermal: Sendable {
    /// Cool: work at full speed.
    case nominal
    /// Warm: rest a tenth of the time.
    case fair
    /// Hot: rest half of the time.
    case serious
    /// Too hot: wait until this changes.
    case critical

    public init(_ state: ProcessInfo.ThermalState) {
        switch state {
        case .nominal: self = .nominal
        case .fair: self = .fair
        case .serious: self = .serious
        case .critical: self = .critical
        // A state that is not known yet is no reason to work at full speed.
        @unknown default: self = .serious
        }
    }

    var code: Int32 {
        switch self {
        case .nominal: return ENGRAFT_THERMAL_NOMINAL
        case .fair: return ENGRAFT_THERMAL_FAIR
        case .serious: return ENGRAFT_THERMAL_SERIOUS
        case .critical: return ENGRAFT_THERMAL_CRITICAL
        }
    }
}

/// Rests when the device is hot: trainers and gates.
public protocol ThermalSteered: AnyObject, Sendable {
    func setThermal(_ thermal: Thermal) throws
}

/// Gives back memory when it is scarce: models and sessions.
public protocol Trimmable: AnyObject, Sendable {
    func trim() throws
}

extension Model: Trimmable {}

/// Tells a trainer or gate how hot the device is, now and whenever that changes, for as long as this lives.
/// It keeps neither alive.
///
/// Unchecked, since the compiler can't know that the notification centre's token may be used by any thread.
public final class ThermalObserver: @unchecked Sendable {
    private let token: NSObjectProtocol

    public init(_ steered: any ThermalSteered) {
        let tell: @Sendable () -> Void = { [weak steered] in
            // The only failure is of an object that is of no more use.
            try? steered?.setThermal(Thermal(ProcessInfo.processInfo.thermalState))
        }
        // States are notified of only once one was read, and one that changes in between must not be missed.
        _ = ProcessInfo.processInfo.thermalState
        token = NotificationCenter.default.addObserver(
            forName: ProcessInfo.thermalStateDidChangeNotification, object: nil, queue: nil
        ) { _ in tell() }
        tell()
    }

    deinit {
        NotificationCenter.default.removeObserver(token)
    }
}

/// Trims models and sessions when the system warns of low memory, for as long as this lives. It keeps none of
/// them alive. A session that generates throws `busy`, and keeps its cache; a trainer holds what its plan
/// says, so that saving its adapter and letting it go is the app's decision.
///
/// Unchecked, since Dispatch's sources are not marked as safe to share, and are.
public final class MemoryObserver: @unchecked Sendable {
    private let source: DispatchSourceMemoryPressure

    public init(_ trimmed: [any Trimmable]) {
        var trims: [@Sendable () -> Void] = []
        for object in trimmed {
            trims.append { [weak object] in try? object?.trim() }
        }
        source = DispatchSource.makeMemoryPressureSource(
            eventMask: [.warning, .critical], queue: DispatchQueue.global(qos: .userInitiated)
        )
        source.setEventHandler { [trims] in trims.forEach { $0() } }
        source.activate()
    }

    deinit {
        source.cancel()
    }
}
