import CEngraft

/// An error from the library.
public struct EngraftError: Error, Sendable, Equatable, CustomStringConvertible {
    /// A code of the C interface. Later versions may have more than those named here.
    public struct Code: RawRepresentable, Sendable, Hashable {
        public let rawValue: Int32
        public init(rawValue: Int32) { self.rawValue = rawValue }

        /// The operating system failed to read or write.
        public static let io = Code(rawValue: ENGRAFT_IO)
        /// The disk or a quota is full.
        public static let full = Code(rawValue: ENGRAFT_FULL)
        /// Out of memory.
        public static let noMemory = Code(rawValue: ENGRAFT_NOMEM)
        /// A file doesn't match its format.
        public static let corrupt = Code(rawValue: ENGRAFT_CORRUPT)
        /// An argument is out of range or contradicts another.
        public static let misuse = Code(rawValue: ENGRAFT_MISUSE)
        /// Another call runs on the object, or another writer uses the folder or store.
        public static let busy = Code(rawValue: ENGRAFT_BUSY)
        /// The caller asked to stop.
        public static let cancelled = Code(rawValue: ENGRAFT_CANCELLED)
        /// The library and this wrapper have different versions.
        public static let unsupportedVersion = Code(rawValue: ENGRAFT_UNSUPPORTED_VERSION)
        /// An adapter and a model don't belong together.
        public static let baseMismatch = Code(rawValue: ENGRAFT_BASE_MISMATCH)
        /// NaN or infinity where a finite number is needed.
        public static let nonFinite = Code(rawValue: ENGRAFT_NONFINITE)
        /// The memory plan exceeds the budget. The message says what would fit.
        public static let doesNotFit = Code(rawValue: ENGRAFT_DOES_NOT_FIT)
        /// The gate didn't promote.
        public static let gateRefused = Code(rawValue: ENGRAFT_GATE_REFUSED)
        /// A bug in the library. The object can't be used any more.
        public static let panic = Code(rawValue: ENGRAFT_PANIC)
        /// The data is malformed or leaves nothing to train on.
        public static let badData = Code(rawValue: ENGRAFT_BAD_DATA)
        /// The file is good, but this version can't handle its contents.
        public static let unsupported = Code(rawValue: ENGRAFT_UNSUPPORTED)
    }

    public let code: Code
    /// Names the file or setting and the remedy.
    public let message: String

    public var description: String { message.isEmpty ? "Engraft error \(code.rawValue)" : message }

    init(code: Code, message: String) {
        self.code = code
        self.message = message
    }

    /// The error of the call that just failed on this thread. No other call may come in between.
    init(ofThisThread code: Int32) {
        // If getting the message fails, don't ask for that failure's message: it would never end.
        let (_, message) = copied { engraft_message(nil, $0, $1, $2) }
        self.init(code: Code(rawValue: code), message: message)
    }
}

/// Throws what a call returned, unless it was 0. Use it on the thread of the call, right after it.
func check(_ code: Int32) throws {
    if code != ENGRAFT_OK { throw EngraftError(ofThisThread: code) }
}

/// Refuses a library with another interface version than this file was written for.
func checkVersion() throws {
    let (library, header) = (engraft_abi_version(), UInt32(ENGRAFT_ABI_VERSION))
    guard library >> 16 == header >> 16, library & 0xffff >= header & 0xffff else {
        let message = "the library's interface is \(library >> 16).\(library & 0xffff), "
            + "the wrapper's \(header >> 16).\(header & 0xffff): take both from one release"
        throw EngraftError(code: .unsupportedVersion, message: message)
    }
}

/// Owns a handle of the library and frees it when nobody needs it any more.
///
/// Unchecked, because the compiler can't know that the library looks up handles as numbers and accepts calls from
/// several threads at once, with `busy` if one would have to wait.
final class Handle: @unchecked Sendable {
    private let pointer: OpaquePointer
    private let free: @Sendable (OpaquePointer) -> Int32

    init(
        free: @escaping @Sendable (OpaquePointer) -> Int32,
        make: (UnsafeMutablePointer<OpaquePointer?>) throws -> Int32
    ) throws {
        var made: OpaquePointer?
        try check(make(&made))
        guard let live = made else {
            throw EngraftError(code: .panic, message: "the library made nothing and called that a success")
        }
        pointer = live
        self.free = free
    }

    deinit {
        // Calls keep their handle alive with `use`, so none can be running here.
        _ = free(pointer)
    }

    /// The pointer, valid within `body`. Without this, Swift might free a handle after its last mention, before the
    /// call that it was passed to returns.
    func use<R>(_ body: (OpaquePointer) throws -> R) rethrows -> R {
        try withExtendedLifetime(self) { try body(pointer) }
    }

    /// A call that returns a code.
    func call(_ body: (OpaquePointer) throws -> Int32) throws {
        try check(use(body))
    }
}

/// Like `Handle.use`, with NULL for nil.
func use<R>(_ handle: Handle?, _ body: (OpaquePointer?) throws -> R) rethrows -> R {
    guard let handle else { return try body(nil) }
    return try handle.use { try body($0) }
}

// MARK: - Texts

/// A text in the form that the library takes, valid within `body`; NULL for nil.
func withText<R>(_ text: String?, _ body: (UnsafePointer<CChar>?, Int) throws -> R) rethrows -> R {
    guard let text else { return try body(nil, 0) }
    // The uncounted NUL at the end gives an empty text an address, too.
    return try text.utf8CString.withUnsafeBufferPointer { try body($0.baseAddress, $0.count - 1) }
}

/// A text from the library, not NUL-terminated; nil for NULL.
func string(_ text: UnsafePointer<CChar>?, _ length: Int) -> String? {
    guard let text else { return nil }
    return String(decoding: UnsafeRawBufferPointer(start: text, count: length), as: UTF8.self)
}

/// A call that copies a text: buffer, capacity, length.
typealias CopyText = (UnsafeMutablePointer<CChar>?, Int, UnsafeMutablePointer<Int>?) -> Int32

/// The text that a call copies, with the code of the last try.
func copied(_ copy: CopyText) -> (Int32, String) {
    var length = 0
    var code = copy(nil, 0, &length)
    // A longer message may arrive meanwhile, so each try has more room than the one before.
    while code == ENGRAFT_OK && length > 0 {
        var buffer = [CChar](repeating: 0, count: length + 1)
        code = copy(&buffer, buffer.count, &length)
        if code == ENGRAFT_OK {
            return (code, buffer.withUnsafeBufferPointer { string($0.baseAddress, length) } ?? "")
        }
        if code == ENGRAFT_TOO_SMALL { code = ENGRAFT_OK }
    }
    return (code, "")
}

/// The text that a call copies.
func text(_ copy: CopyText) throws -> String {
    let (code, text) = copied(copy)
    try check(code)
    return text
}

// MARK: - Structs

/// Settings with their size, everything else at its default.
func defaults<P>(_ zero: P, _ fill: (UnsafeMutablePointer<P>, Int) -> Int32) throws -> P {
    var params = zero
    try check(fill(&params, MemoryLayout<P>.stride))
    return params
}

/// C's `sizeof`: Swift's stride, which includes padding at the end.
func size<T>(of value: T) -> UInt32 {
    UInt32(MemoryLayout<T>.stride)
}

extension Bool {
    /// 1 or 0, for C.
    var flag: UInt32 { self ? 1 : 0 }
}

/// The library's version, such as "0.1.0".
public func engraftVersion() throws -> String {
    try text { engraft_version($0, $1, $2) }
}
