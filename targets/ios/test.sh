#!/usr/bin/env bash
# The tests of this folder that run without a Mac: the Swift code against the header, the module map under clang, and
# the framework's layout with archives of empty functions compiled for iOS.
# Needs python3, clang (for any platform), llvm-ar and llvm-nm. Ends with the number of checks that passed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

# What is said to succeed: a text for the reader, and a command.
passes() {
  if "${@:2}" >"$work/said" 2>&1; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    printf 'FAILED: %s\n' "$1" >&2
    cat "$work/said" >&2
  fi
}

# What is said to be refused: a text for the reader, a part of what is said then, and a command.
refuses() {
  if "${@:3}" >"$work/said" 2>&1; then
    printf 'FAILED: not refused: %s\n' "$1" >&2
    failed=$((failed + 1))
  elif ! grep -qF -- "$2" "$work/said"; then
    printf 'FAILED: %s: refused for another reason:\n' "$1" >&2
    cat "$work/said" >&2
    failed=$((failed + 1))
  else
    passed=$((passed + 1))
  fi
}

# An archive of empty functions. Target, file, and the names to leave out.
archive() {
  "$here/check.py" --functions | grep -vxF -e "${3-none}" | sed 's/.*/void &(void) {}/' >"$work/stub.c"
  clang -target "$1" -ffreestanding -c "$work/stub.c" -o "$work/stub.o"
  rm -f "$2"
  llvm-ar rcs "$2" "$work/stub.o"
}

# The Python of a stock Mac, by its grammar.
passes 'the scripts are Python 3.9' python3 -c '
import ast, sys
for path in sys.argv[1:]:
    ast.parse(open(path, encoding="utf-8").read(), path, feature_version=(3, 9))
' "$here/check.py" "$here/xcframework.py"
passes 'the Swift code fits the header' "$here/check.py"
if ! command -v clang >/dev/null || ! command -v llvm-ar >/dev/null; then
  printf 'SKIPPED: module map and framework, for want of clang and llvm-ar\n' >&2
  printf '%d passed, %d failed\n' "$passed" "$failed"
  exit "$((failed > 0))"
fi

device=arm64-apple-ios15.0 simulator=arm64-apple-ios15.0-simulator
archive "$device" "$work/device.a"
archive "$simulator" "$work/simulator.a"
archive "$device" "$work/short.a" engraft_gate_run
archive x86_64-linux-gnu "$work/host.a"
out=$work/CEngraft.xcframework
make_it() { "$here/xcframework.sh" "$@" "$out"; }

passes 'a framework' make_it "$work/device.a" "$work/simulator.a"
passes 'over the one before' make_it "$work/device.a" "$work/simulator.a"
refuses 'an archive that lacks a function' 'lacks engraft_gate_run' \
  make_it "$work/short.a" "$work/simulator.a"
refuses 'archives in the wrong places' 'for ios-simulator, not for ios' \
  make_it "$work/simulator.a" "$work/device.a"
refuses "the host's archive" "no 64-bit ARM object of Apple's" \
  make_it "$work/host.a" "$work/simulator.a"
refuses 'no archive at all' 'is no file' make_it "$work/none.a" "$work/simulator.a"
refuses 'what is no archive' 'lacks' make_it "$here/test.sh" "$work/simulator.a"
passes 'the refused leave the framework as it was' "$here/xcframework.py" check "$out"
passes 'archives of any platform, if asked' \
  "$here/xcframework.sh" --any-format "$work/host.a" "$work/host.a" "$work/x"
touch "$work/x/ios-arm64/stray"
refuses 'a file that Info.plist does not know' 'ios-arm64/stray' "$here/xcframework.py" check "$work/x"

# As Swift's importer reads it: as a module, for the device and for the simulator.
cat >"$work/use.m" <<'CODE'
@import CEngraft;
int32_t f(engraft_model *m) { return engraft_model_free(m) + ENGRAFT_ABI_VERSION; }
CODE
printf '@import CEngraft;\nint32_t f(void) { return engraft_made_up(); }\n' >"$work/misuse.m"
# Target, slice, source.
import_it() {
  clang -target "$1" -ffreestanding -fmodules -fmodules-cache-path="$work/cache" -Werror -fsyntax-only \
    -I "$out/$2/Headers" "$3"
}
passes 'the module on the device' import_it "$device" ios-arm64 "$work/use.m"
passes 'the module in the simulator' import_it "$simulator" ios-arm64-simulator "$work/use.m"
refuses 'a function that the module lacks' engraft_made_up import_it "$device" ios-arm64 "$work/misuse.m"

printf '%d passed, %d failed\n' "$passed" "$failed"
exit "$((failed > 0))"
