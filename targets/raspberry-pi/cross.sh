# Source this from the repository's root. It sets what cargo needs to build for ARM Linux, and `target`, `cc` (its C
# compiler), `unwinder` (what C programs link for Rust's panics) and `emulator`. ENGRAFT_ARM_TARGET selects another
# target than 64-bit ARM with glibc. Uses rustup's target if it is installed, otherwise the Rust from toolchain.sh,
# which builds std from source if it has none.
target=${ENGRAFT_ARM_TARGET:-aarch64-unknown-linux-gnu}
base=${CARGO_TARGET_DIR:-$PWD/target}
flags='-C target-feature=+crt-static' unwinder=-lgcc_eh
case $target in
  aarch64-unknown-linux-gnu) cc=aarch64-linux-gnu-gcc emulator=qemu-aarch64 ;;
  # The compiler's wrapper supplies musl's objects.
  aarch64-unknown-linux-musl)
    cc=aarch64-linux-musl-gcc emulator=qemu-aarch64 unwinder=-lunwind
    flags+=' -C link-self-contained=no -C relocation-model=static'
    ;;
  armv7-unknown-linux-gnueabihf) cc=arm-linux-gnueabihf-gcc emulator=qemu-arm ;;
  *)
    echo "ENGRAFT_ARM_TARGET: $target isn't supported by this script" >&2
    exit 1
    ;;
esac
if [[ $target == *-musl || ! -d $(rustc --print target-libdir --target "$target") ]]; then
  # shellcheck source=/dev/null
  . "$(ENGRAFT_ARM_TOOLCHAIN=${ENGRAFT_ARM_TOOLCHAIN:-$base/arm-toolchain} targets/raspberry-pi/toolchain.sh "$target")"
  if [[ ! -d $(rustc --print target-libdir --target "$target") ]]; then
    export RUSTC_BOOTSTRAP=1 CARGO_UNSTABLE_BUILD_STD=std,panic_unwind
  fi
fi
# A separate folder: otherwise everything would be rebuilt whenever the compiler changes.
export CARGO_TARGET_DIR=$base/arm
upper=$(tr 'a-z-' 'A-Z_' <<<"$target")
export "CARGO_TARGET_${upper}_LINKER=$cc"
# Static: the emulator needs no loader, and one file runs on any Pi.
export "CARGO_TARGET_${upper}_RUSTFLAGS=$flags"
