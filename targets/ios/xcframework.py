#!/usr/bin/env python3
"""What xcframework.sh needs of an XCFramework's list of contents and of Apple's object files.

    xcframework.py plist                  prints Info.plist
    xcframework.py check FRAMEWORK        holds a folder against its Info.plist
    xcframework.py platform ARCHIVE WHAT  refuses an archive with an object that is not 64-bit ARM, or not for
                                          WHAT: ios, or ios-simulator
"""

import plistlib
import struct
import sys
from pathlib import Path

LIBRARY = "libengraft.a"
# LC_BUILD_VERSION's numbers.
PLATFORMS = {"ios": 2, "ios-simulator": 7}
MH_MAGIC_64, CPU_TYPE_ARM64, MH_OBJECT = 0xFEEDFACF, 0x0100000C, 1
LC_BUILD_VERSION, LC_VERSION_MIN_IPHONEOS = 0x32, 0x25
# Of an object that leaves it open, which linkers take for any.
UNSAID = 0


class Refused(Exception):
    """What is wrong, for the user."""


def main(arguments):
    try:
        if arguments == ["plist"]:
            sys.stdout.buffer.write(plistlib.dumps(plist()))
        elif len(arguments) == 2 and arguments[0] == "check":
            check(Path(arguments[1]))
        elif len(arguments) == 3 and arguments[0] == "platform" and arguments[2] in PLATFORMS:
            check_platform(Path(arguments[1]), PLATFORMS[arguments[2]], arguments[2])
        else:
            sys.exit(__doc__)
    except Refused as refusal:
        sys.exit(str(refusal))


def library(identifier, variant=None):
    entry = {
        "BinaryPath": LIBRARY,
        "HeadersPath": "Headers",
        "LibraryIdentifier": identifier,
        "LibraryPath": LIBRARY,
        "SupportedArchitectures": ["arm64"],
        "SupportedPlatform": "ios",
    }
    return entry | ({"SupportedPlatformVariant": variant} if variant else {})


def plist():
    return {
        "AvailableLibraries": [library("ios-arm64"), library("ios-arm64-simulator", "simulator")],
        "CFBundlePackageType": "XFWK",
        "XCFrameworkFormatVersion": "1.0",
    }


def check(folder):
    """All that Info.plist names is there, and nothing else."""
    info = plistlib.loads((folder / "Info.plist").read_bytes())
    if (info.get("CFBundlePackageType"), info.get("XCFrameworkFormatVersion")) != ("XFWK", "1.0"):
        raise Refused(f"{folder}: Info.plist is of no XCFramework")
    wanted = {Path("Info.plist")}
    for entry in info["AvailableLibraries"]:
        root = Path(entry["LibraryIdentifier"])
        parts = [entry["SupportedPlatform"], *entry["SupportedArchitectures"]]
        platform = "-".join(parts + [entry[key] for key in ["SupportedPlatformVariant"] if key in entry])
        if platform != str(root):
            raise Refused(f"{folder}: {root} is said to be {platform}")
        headers = root / entry["HeadersPath"] / "CEngraft"
        wanted |= {root / entry["LibraryPath"], headers / "engraft.h", headers / "module.modulemap"}
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    if found != wanted:
        raise Refused(f"{folder}: differs from Info.plist in {', '.join(sorted(map(str, found ^ wanted)))}")


def check_platform(archive, platform, what):
    """Every object is for 64-bit ARM, none for another platform, and some say that they are for this one."""
    names = {number: name for name, number in PLATFORMS.items()}
    said = 0
    for name, data in members(archive):
        if data[:4] in (b"BC\xc0\xde", b"\xde\xc0\x17\x0b"):
            raise Refused(f"{archive}: {name} is LLVM bitcode: build with lto = \"fat\" or false")
        found = platform_of(data)
        if found is None:
            raise Refused(f"{archive}: {name} is no 64-bit ARM object of Apple's")
        if found not in (platform, UNSAID):
            raise Refused(f"{archive}: {name} is for {names.get(found, f'platform {found}')}, not for {what}")
        said += found == platform
    if said == 0:
        raise Refused(f"{archive}: no object says that it is for {what}")


def platform_of(data):
    """The platform of a 64-bit ARM object; nothing for other files."""
    if len(data) < 32:
        return None
    magic, cpu, _, kind, commands, _, _, _ = struct.unpack_from("<8I", data)
    if (magic, cpu, kind) != (MH_MAGIC_64, CPU_TYPE_ARM64, MH_OBJECT):
        return None
    at = 32
    for _ in range(commands):
        if at + 12 > len(data):
            return None
        command, size, platform = struct.unpack_from("<3I", data, at)
        if command == LC_BUILD_VERSION:
            return platform
        if command == LC_VERSION_MIN_IPHONEOS:
            return PLATFORMS["ios"]
        at += max(size, 8)
    return UNSAID


def members(archive):
    """Names and contents of an archive's objects, symbol tables and tables of names aside."""
    data = archive.read_bytes()
    if data[:8] != b"!<arch>\n":
        raise Refused(f"{archive}: is no archive (a thin one can't be copied)")
    at, names = 8, b""
    while at + 60 <= len(data):
        name, size = data[at : at + 16].rstrip(), int(data[at + 48 : at + 58])
        content, at = data[at + 60 : at + 60 + size], at + 60 + size + size % 2
        if name.startswith(b"#1/"):
            length = int(name[3:])
            name, content = content[:length].rstrip(b"\0"), content[length:]
        if name == b"//":
            names = content
        elif name not in (b"/", b"/SYM64/") and not name.startswith(b"__.SYMDEF"):
            if name[:1] == b"/" and name[1:].isdigit():
                name = names[int(name[1:]) :].split(b"\n")[0]
            yield name.rstrip(b"/").decode(errors="replace"), content


if __name__ == "__main__":
    main(sys.argv[1:])
