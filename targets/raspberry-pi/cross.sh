# To be sourced, from the repository's root: sets `target` and what cargo needs to build for 64-bit ARM. Uses
# rustup's target where it is installed, and the Rust of toolchain.sh elsewhere.
target=aarch64-unknown-linux-gnu
base=${CARGO_TARGET_DIR:-$PWD/target}
if [[ ! -d $(rustc --print target-libdir --target $target) ]]; then
  # shellcheck source=/dev/null
  . "$(ENGRAFT_ARM_TOOLCHAIN=${ENGRAFT_ARM_TOOLCHAIN:-$base/arm-toolchain} targets/raspberry-pi/toolchain.sh)"
fi
# A folder of its own: another compiler's products would be rebuilt at every change between the two.
export CARGO_TARGET_DIR=$base/arm
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
# Static: no loader to find for the emulator, and one file that runs on any Pi.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS='-C target-feature=+crt-static'
