#!/usr/bin/env bash
# A cross toolchain for ARM Linux on a Debian 12 (x86-64) machine where rustup can't fetch a target. It unpacks
# Debian's newer Rust, with std for 64-bit ARM and its sources, into a folder without installing it; for musl, also
# Debian's musl. Prints the path of a file to source. Running it again repeats nothing that is done.
#
#   targets/raspberry-pi/toolchain.sh [TARGET]     (default: aarch64-unknown-linux-gnu)
#
#   ENGRAFT_ARM_TOOLCHAIN   the folder (default: arm-toolchain in cargo's target folder)
set -euo pipefail
repository=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
target=${1:-aarch64-unknown-linux-gnu}
folder=${ENGRAFT_ARM_TOOLCHAIN:-${CARGO_TARGET_DIR:-$repository/target}/arm-toolchain}

packages=(
  rustc-web cargo-web rust-web-src libstd-rust-web-1.96:amd64 libstd-rust-web-dev:amd64
  libstd-rust-web-dev:arm64 libllvm22 libgit2-1.5 libhttp-parser2.9 libmbedcrypto7 libmbedtls14
  libmbedx509-1
)

say() { printf '%s\n' "$*" >&2; }

# The C compiler links and QEMU runs the result; both are ordinary packages of the host.
install_host_tools() {
  local missing=() system=aarch64-linux-gnu libc=arm64
  [[ $target != armv7-* ]] || system=arm-linux-gnueabihf libc=armhf
  command -v $system-gcc >/dev/null || missing+=("gcc-$system" "libc6-dev-$libc-cross")
  command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
  [[ ${#missing[@]} -eq 0 ]] && return
  if [[ $(id -u) -ne 0 ]]; then
    say "as root, run: apt-get install --no-install-recommends ${missing[*]}"
    return 1
  fi
  say "installing ${missing[*]}"
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

# A separate apt configuration with both architectures and the machine's package sources. Adding a foreign
# architecture to the host would put a second libc in the linker's way.
private_apt() {
  local apt=$folder/apt
  mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
  : >"$apt/status"
  cat >"$apt/apt.conf" <<CONF
APT::Architectures { "amd64"; "arm64"; };
APT::Sandbox::User "root";
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
CONF
  APT_CONFIG=$apt/apt.conf apt-get "$@"
}

# unpack INTO PACKAGE... fetches packages and unpacks them into a new folder.
unpack() {
  local into=$1 debs=$folder/debs
  shift
  rm -rf "$debs" "$into"
  mkdir -p "$debs" "$into"
  private_apt update -qq >&2
  (cd "$debs" && private_apt download -qq "$@" >&2)
  for deb in "$debs"/*.deb; do
    dpkg -x "$deb" "$into"
  done
  rm -rf "$debs" "$folder/apt"
}

# musl's specs for gcc, with the paths used here, and LLVM's unwinder, because gcc's needs functions of glibc. LLVM's
# was compiled against glibc, too, so what it prints before aborting is dropped.
write_musl_compiler() {
  local lib=$folder/musl/usr/lib/aarch64-linux-musl unwinder=$folder/musl/usr/lib/llvm-14/lib/libunwind.a
  sed -i "s#/usr/\(lib\|include\)/aarch64-linux-musl#$folder/musl&#g" "$lib/musl-gcc.specs"
  echo 'int __fprintf_chk(void *file, int flag, const char *format, ...) { return 0; }' |
    aarch64-linux-gnu-gcc -O2 -c -o "$lib/fprintf_chk.o" -x c -
  cp "$unwinder" "$lib/libunwind.a"
  aarch64-linux-gnu-ar rs "$lib/libunwind.a" "$lib/fprintf_chk.o" 2>/dev/null
  local compiler=$folder/bin/aarch64-linux-musl-gcc
  printf '#!/bin/sh\nexec aarch64-linux-gnu-gcc -specs "%s" "$@"\n' "$lib/musl-gcc.specs" >"$compiler"
  chmod +x "$compiler"
}

# The unpacked programs only need to be told where their libraries are.
write_wrappers() {
  mkdir -p "$folder/bin"
  for tool in cargo rustc rustdoc; do
    cat >"$folder/bin/$tool" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH="$folder/unpacked/usr/lib/x86_64-linux-gnu" exec "$folder/unpacked/usr/bin/$tool" "\$@"
WRAPPER
    chmod +x "$folder/bin/$tool"
  done
  cat >"$folder/env.sh" <<ENV
export PATH="$folder/bin:\$PATH" RUSTC="$folder/bin/rustc" RUSTDOC="$folder/bin/rustdoc"
unset RUSTUP_TOOLCHAIN RUSTC_WRAPPER
ENV
}

[[ $(dpkg --print-architecture) == amd64 ]] || { say "this recipe is for Debian on x86-64"; exit 1; }
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
install_host_tools
if [[ ! -e $folder/complete ]]; then
  say "fetching Debian's Rust for amd64 and arm64"
  unpack "$folder/unpacked" "${packages[@]}"
  write_wrappers
  "$folder/bin/rustc" --version >&2
  touch "$folder/complete"
fi
if [[ $target == *-musl && ! -e $folder/musl/complete ]]; then
  say "fetching Debian's musl for arm64"
  unpack "$folder/musl" musl:arm64 musl-dev:arm64 libunwind-14-dev:arm64
  write_musl_compiler
  touch "$folder/musl/complete"
fi
printf '%s\n' "$folder/env.sh"
