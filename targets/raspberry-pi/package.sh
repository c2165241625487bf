#!/usr/bin/env bash
# Builds the binary for 64-bit ARM (or what ENGRAFT_ARM_TARGET names) in the profile dist and packs it with systemd
# units, man pages and completions: a tarball, and a .deb where dpkg-deb is there. Both are the same to the byte for
# the same commit and compiler.
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
# Where the README's links lead.
install -D -m 644 -t "$root/usr/share/doc/engraft/targets/cli/guide" targets/cli/guide/*
# The binary writes its own pages and completions, on this machine through the emulator.
made() { "$emulator" "$root/usr/bin/engraft" completions "$@"; }
made --man "$root/usr/share/man/man1"
gzip -9n "$root"/usr/share/man/man1/*.1
completions=(bash bash-completion/completions/engraft zsh zsh/vendor-completions/_engraft fish fish/vendor_completions.d/engraft.fish)
for ((i = 0; i < ${#completions[@]}; i += 2)); do
  install -D -m 644 /dev/null "$root/usr/share/${completions[i + 1]}"
  made "${completions[i]}" >"$root/usr/share/${completions[i + 1]}"
done
chmod 644 "$root"/usr/share/man/man1/*
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

mkdir -p "$out"
name=${target/-unknown/}
tarball=$out/engraft-$version-${name%-gnu*}.tar.gz
tar -C "$root" --sort=name --owner=0 --group=0 --numeric-owner -cf - . | gzip -9n >"$tarball"
printf '%s: %s bytes; the binary alone: %s\n' "$tarball" "$(stat -c %s "$tarball")" "$(stat -c %s "$root/usr/bin/engraft")"

if ! command -v dpkg-deb >/dev/null; then
  echo 'SKIPPED: the .deb, for want of dpkg-deb'
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
