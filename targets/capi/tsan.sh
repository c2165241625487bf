#!/usr/bin/env bash
# Looks for data races with ThreadSanitizer: 10,000 swaps of adapters under four sessions that generate, the
# same in the runtime, and trainings of several threads, interrupted and resumed. Builds everything anew, so
# it's no part of CI.
#
#   targets/capi/tsan.sh
#
# Needs a Rust with the sanitizer's runtime, as rustup's are. Its standard library is not instrumented, for which
# tests/tsan/suppressions makes allowance.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$(git -C "$here" rev-parse --show-toplevel)"

target=$(rustc --print host-tuple)
libraries=$(rustc --print target-libdir)
if ! compgen -G "$libraries/librustc-*_rt.tsan.a" >/dev/null; then
  echo "no ThreadSanitizer in $libraries: a Rust of rustup's has it" >&2
  exit 1
fi
# A stable compiler takes the flags of an unstable one where it's told to.
export RUSTC_BOOTSTRAP=1 RUSTFLAGS='-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer'
export TSAN_OPTIONS="suppressions=$here/tests/tsan/suppressions history_size=7"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/tsan

run() {
  cargo test --target "$target" -p engraft-capi -p engraft-runtime "$@"
}

run --test swaps
run --test runtime -- swapping:: resume::
# The same compiler, flags and suppressions must find a race where there is one.
control=$CARGO_TARGET_DIR/control.log
if run --test race >"$control" 2>&1 || ! grep -q 'WARNING: ThreadSanitizer: data race' "$control"; then
  echo "the race of tests/tsan/race.rs was not seen: $control" >&2
  exit 1
fi
printf '\nNo data race; the control is found.\n'
