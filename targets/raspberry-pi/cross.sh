# To be sourced, from the repository's root: sets what cargo needs to build for an ARM Linux, and `target`, `cc` (its C
# compiler), `unwinder` (what C programs link for Rust's panics) and `emulator`. ENGRAFT_ARM_TARGET names another one
# than 64-bit ARM with glibc. Uses rustup's target where it is installed, and elsewhere the Rust of toolchain.sh, which
# builds std from its sources where it brings none.
target=${ENGRAFT_ARM_TARGET:-aarch64-unknown-linux-gnu}
base=${CARGO_TARGET_DIR:-$PWD/target}
flags='-C target-feature=+crt-static' unwinder=-lgcc_eh
case $target in
  aarch64-unknown-linux-gnu) cc=aarch64-linux-gnu-gcc emulator=qemu-aarch64 ;;
  # The compiler's wrapper brings musl's own objects.
  aarch64-unknown-linux-musl)
    cc=aarch64-linux-musl-gcc emulator=qemu-aarch64 unwinder=-lunwind
    flags+=' -C link-self-contained=no -C relocation-model=static'
    ;;
  armv7-unknown-linux-gnueabihf) cc=arm-linux-gnueabihf-gcc emulator=qemu-arm ;;
  *)
    echo "ENGRAFT_ARM_TARGET: $target is none of those that are tried" >&2
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
# A folder of its own: another compiler's products would be rebuilt at every change between the two.
export CARGO_TARGET_DIR=$base/arm
upper=$(tr 'a-z-' 'A-Z_' <<<"$target")
export "CARGO_TARGET_${upper}_LINKER=$cc"
# Static: no loader to find for the emulator, and one file that runs on any Pi.
export "CARGO_TARGET_${upper}_RUSTFLAGS=$flags"
