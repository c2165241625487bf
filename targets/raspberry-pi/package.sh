#!/usr/bin/env bash
# Builds the binary for 64-bit ARM (or ENGRAFT_ARM_TARGET) with the profile dist and packs it with its systemd units:
# a tarball and, if dpkg-deb is available, a .deb. The same commit and compiler give the same bytes.
#
#   targets/raspberry-pi/package.sh [FOLDER]     (default: cargo's target folder)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$(git -C "$here" rev-parse --show-toplevel)"

# shellcheck source=targets/raspberry-pi/cross.sh
. "$here/cross.sh"
cargo build --profile dist --locked --target "$target" -p engraft
out=${1:-$CARGO_TARGET_DIR}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
install -D -m 755 "$CARGO_TARGET_DIR/$target/dist/engraft" "$root/usr/bin/engraft"
install -D -m 644 -t "$root/lib/systemd/system" "$here"/systemd/engraft-adapt@.*
install -D -m 644 -t "$root/usr/share/doc/engraft" README.md SECURITY.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT "$here/example.toml"
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

mkdir -p "$out"
name=${target/-unknown/}
tarball=$out/engraft-$version-${name%-gnu*}.tar.gz
tar -C "$root" --sort=name --owner=0 --group=0 --numeric-owner -cf - . | gzip -9n >"$tarball"
printf '%s: %s bytes; the binary alone: %s\n' "$tarball" "$(stat -c %s "$tarball")" "$(stat -c %s "$root/usr/bin/engraft")"

if ! command -v dpkg-deb >/dev/null; then
  echo 'SKIPPED: no .deb, because dpkg-deb is missing'
  exit
fi
architecture=arm64
[[ $target != armv7-* ]] || architecture=armhf
install -d -m 755 "$root/DEBIAN"
cat >"$root/DEBIAN/control" <<CONTROL
Package: engraft
Version: $version
Architecture: $architecture
Maintainer: The Engraft authors <engraft@localhost>
Section: science
Priority: optional
Description: Adapts small language models on the device they run on
 Trains LoRA and DoRA adapters on quantized GGUF models, compares them with doing nothing and with
 prompting, and promotes only what is better. One static program; a timer adapts at night.
CONTROL
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
dpkg-deb --root-owner-group -Zxz --build "$root" "$out/engraft_${version}_$architecture.deb"
