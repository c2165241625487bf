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
        // An unknown state of a later system may be hot, so don't work at full speed.
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

/// Frees memory when it is scarce: models and sessions.
public protocol Trimmable: AnyObject, Sendable {
    func trim() throws
}

extension Model: Trimmable {}

/// Tells a trainer or gate how hot the device is, now and at every change, as long as this lives. It doesn't keep
/// them alive.
///
/// Unchecked, because the compiler can't know that any thread may use the notification centre's token.
public final class ThermalObserver: @unchecked Sendable {
    private let token: NSObjectProtocol

    public init(_ steered: any ThermalSteered) {
        let tell: @Sendable () -> Void = { [weak steered] in
            // This fails only for an object that can't be used any more.
            try? steered?.setThermal(Thermal(ProcessInfo.processInfo.thermalState))
        }
        // The system notifies of changes only after the state was read once, and no change may be missed.
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

/// Trims models and sessions when the system warns of low memory, as long as this lives. It doesn't keep them
/// alive. A generating session throws `busy` and keeps its cache. A trainer can't be trimmed: the app must decide
/// whether to save its adapter and release it.
///
/// Unchecked, because Dispatch's sources aren't marked as safe to share although they are.
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
