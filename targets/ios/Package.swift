// swift-tools-version:5.9
// CEngraft.xcframework lies beside this file once xcframework.sh has put it there.
import PackageDescription

let package = Package(
    name: "Engraft",
    platforms: [.iOS(.v15)],
    products: [.library(name: "Engraft", targets: ["Engraft"])],
    targets: [
        .binaryTarget(name: "CEngraft", path: "CEngraft.xcframework"),
        .target(
            name: "Engraft",
            dependencies: ["CEngraft"],
            swiftSettings: [.enableExperimentalFeature("StrictConcurrency")]
        ),
    ]
)
