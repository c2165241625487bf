#!/usr/bin/env bash
# Lays out an XCFramework of static libraries on any machine, as `xcodebuild -create-xcframework` does. Refuses
# archives for the wrong platform, and those that lack a function of the header.
#
#   targets/ios/xcframework.sh [--any-format] DEVICE.a SIMULATOR.a [OUT.xcframework]
#
# OUT is targets/ios/CEngraft.xcframework by default, where Package.swift looks for it. --any-format accepts archives
# for any platform, to try the layout; Xcode can't use the result.
# Needs only what a stock Mac has: bash 3.2, Python 3.9, and BSD's tools.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

any_format=
if [[ ${1-} == --any-format ]]; then
  any_format=1
  shift
fi
if [[ $# -lt 2 || $# -gt 3 ]]; then
  echo "usage: xcframework.sh [--any-format] DEVICE.a SIMULATOR.a [OUT.xcframework]" >&2
  exit 2
fi
device=$1 simulator=$2 out=${3-$here/CEngraft.xcframework}
nm=$(command -v llvm-nm || command -v nm) || { echo 'neither llvm-nm nor nm is there' >&2; exit 1; }

refuse() {
  printf '%s: %s\n' "$1" "$2" >&2
  exit 1
}

# Checks that an archive defines every function of the header. In Mach-O, symbols start with an underscore.
check_symbols() {
  local archive=$1 defined missing
  [[ -f $archive ]] || refuse "$archive" 'is no file'
  # nm complains about members without symbols and about what it can't read; only what it lists counts.
  defined=$({ "$nm" -g "$archive" 2>/dev/null || true; } |
    awk 'NF == 3 && $2 ~ /[TW]/ { sub(/^_/, "", $3); print $3 }' | sort -u)
  missing=$(comm -23 <(printf '%s\n' "$functions") <(printf '%s\n' "$defined") | paste -sd, -)
  [[ -z $missing ]] || refuse "$archive" "lacks $missing"
  if grep -qx 'engraft_inject_panic' <<<"$defined"; then
    echo "$archive: built with debug assertions: not for an app" >&2
  fi
}

functions=$("$here/check.py" --functions | sort)
[[ -n $functions ]] || refuse engraft.h 'no functions were found'
check_symbols "$device"
check_symbols "$simulator"
if [[ -z $any_format ]]; then
  "$here/xcframework.py" platform "$device" ios
  "$here/xcframework.py" platform "$simulator" ios-simulator
fi

# All or nothing: an app's build mustn't find a half-written framework.
parent=$(dirname "$out")
mkdir -p "$parent"
new=$(mktemp -d "$parent/.xcframework.XXXXXX")
trap 'rm -rf "$new"' EXIT
chmod 755 "$new"
lay_out() {
  # A separate folder for the module, because Xcode copies the headers of all frameworks into one.
  install -d -m 755 "$new/$2/Headers/CEngraft"
  install -m 644 "$here/../capi/include/engraft.h" "$here/module.modulemap" "$new/$2/Headers/CEngraft"
  install -m 644 "$1" "$new/$2/libengraft.a"
}
lay_out "$device" ios-arm64
lay_out "$simulator" ios-arm64-simulator
"$here/xcframework.py" plist >"$new/Info.plist"
"$here/xcframework.py" check "$new"
rm -rf "$out"
mv "$new" "$out"
printf '%s: %d functions in each archive\n' "$out" "$(wc -l <<<"$functions")"
