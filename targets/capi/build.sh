#!/usr/bin/env bash
# Builds the C interface for a phone with the profile `dist`: an archive, and for Android a shared library, which needs
# a linker. Uses rustup's target if it is installed, otherwise Debian's Rust (see
# targets/raspberry-pi/toolchain.sh), which has the sources of std, to build that, too.
#
#   targets/capi/build.sh TARGET [FOLDER]
#
# TARGET is aarch64-linux-android, x86_64-linux-android, aarch64-apple-ios, aarch64-apple-ios-sim, or any other that
# Rust knows; FOLDER (default: cargo's target folder) receives libengraft.a and, for Android, libengraft.so.
# CARGO_TARGET_<TARGET>_LINKER names the NDK's clang. Without it the shared library is left out, unless
# ENGRAFT_STAND_IN_LINKER names a compiler that links for the machine. Then the system's libraries are stand-ins
# without symbols: the result shows exports, pages and undefined symbols, but can't be shipped.
set -euo pipefail
cd "$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)"
phone=${1:?usage: build.sh TARGET [FOLDER]}
base=${CARGO_TARGET_DIR:-$PWD/target}
out=${2:-$base/$phone/dist}
upper=$(tr 'a-z-' 'A-Z_' <<<"$phone")

cargo=(cargo rustc --profile dist --locked -p engraft-capi --target "$phone")
types=staticlib
if [[ ! -d $(rustc --print target-libdir --target "$phone" 2>/dev/null) ]]; then
  # shellcheck source=/dev/null
  . "$(ENGRAFT_ARM_TOOLCHAIN=${ENGRAFT_ARM_TOOLCHAIN:-$base/arm-toolchain} targets/raspberry-pi/toolchain.sh)"
  # A separate folder: otherwise everything would be rebuilt whenever the compiler changes.
  export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$base/phones
  # With unwinding: each export catches panics.
  [[ -d $(rustc --print target-libdir --target "$phone") ]] || cargo+=(-Zbuild-std=std,panic_unwind)
fi

linker=CARGO_TARGET_${upper}_LINKER
if [[ $phone == *-android && -n ${!linker:-${ENGRAFT_STAND_IN_LINKER:-}} ]]; then
  types+=,cdylib
  flags='-C link-arg=-Wl,-z,max-page-size=16384 -C link-arg=-Wl,-soname,libengraft.so'
  if [[ -z ${!linker:-} ]]; then
    stubs=$(mktemp -d)
    trap 'rm -rf "$stubs"' EXIT
    for name in c m dl log unwind gcc; do
      "$ENGRAFT_STAND_IN_LINKER" -shared -nostdlib -Wl,-soname,lib$name.so -x c /dev/null -o "$stubs/lib$name.so"
    done
    flags+=" -C link-arg=-nostdlib -C link-arg=-nostartfiles -C link-arg=-L$stubs"
    export "$linker=$ENGRAFT_STAND_IN_LINKER"
  fi
  export "CARGO_TARGET_${upper}_RUSTFLAGS=$flags"
fi

"${cargo[@]}" --crate-type "$types"
mkdir -p "$out"
for file in libengraft.a libengraft.so; do
  built=${CARGO_TARGET_DIR:-$base}/$phone/dist/$file
  [[ -f $built ]] || continue
  [[ $built -ef $out/$file ]] || cp "$built" "$out/$file"
  printf '%s: %s bytes\n' "$out/$file" "$(wc -c <"$out/$file")"
done
