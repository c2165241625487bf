#!/usr/bin/env bash
# Looks for data races with ThreadSanitizer: in 10,000 swaps of adapters under four generating sessions, the same in
# the runtime, and trainings with several threads that are interrupted and resumed. It rebuilds everything, so it isn't
# part of CI.
#
#   targets/capi/tsan.sh
#
# Needs a Rust with the sanitizer's runtime, such as rustup's. Its standard library isn't instrumented;
# tests/tsan/suppressions allows for that.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$(git -C "$here" rev-parse --show-toplevel)"

target=$(rustc --print host-tuple)
libraries=$(rustc --print target-libdir)
if ! compgen -G "$libraries/librustc-*_rt.tsan.a" >/dev/null; then
  echo "no ThreadSanitizer in $libraries: a Rust of rustup's has it" >&2
  exit 1
fi
# This lets a stable compiler accept unstable flags.
export RUSTC_BOOTSTRAP=1 RUSTFLAGS='-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer'
export TSAN_OPTIONS="suppressions=$here/tests/tsan/suppressions history_size=7"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/tsan

run() {
  cargo test --target "$target" -p engraft-capi -p engraft-runtime "$@"
}

run --test swaps
run --test runtime -- swapping:: resume::
# The control: the same compiler, flags and suppressions must find a real race.
control=$CARGO_TARGET_DIR/control.log
if run --test race >"$control" 2>&1 || ! grep -q 'WARNING: ThreadSanitizer: data race' "$control"; then
  echo "the race in tests/tsan/race.rs wasn't found: $control" >&2
  exit 1
fi
printf '\nNo data race; the control is found.\n'
