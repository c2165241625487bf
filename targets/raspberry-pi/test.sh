#!/usr/bin/env bash
# Builds the workspace's tests for 64-bit ARM once and runs them on emulated cores: the Pi 4's
# (cortex-a72: NEON alone), the Pi 5's (cortex-a76: dot products), and one with everything (max: int8
# matrix products).
#
#   targets/raspberry-pi/test.sh [CPU ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$(git -C "$here" rev-parse --show-toplevel)"
cpus=("$@")
[[ ${#cpus[@]} -gt 0 ]] || cpus=(cortex-a72 cortex-a76 max)

# shellcheck source=targets/raspberry-pi/cross.sh
. "$here/cross.sh"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64
# Files beside the repository are the host's tests' affair: a whole text through an emulated model takes
# an hour. Any folder can be named to do it nevertheless.
export ENGRAFT_SHARED=${ENGRAFT_EMULATED_SHARED:-/nonexistent}
unset ENGRAFT_MODEL ENGRAFT_MODELS_DIR

step() {
  printf '\n== %s\n' "$*"
  "$@"
}

# The command line itself: a test that starts it as another program would need the host's kernel to
# know ARM, so the emulator is named here.
smoke() {
  local engraft=$CARGO_TARGET_DIR/$target/debug/engraft model=targets/cli/seedling.gguf folder
  folder=$(mktemp -d)
  step qemu-aarch64 "$engraft" --version
  step qemu-aarch64 "$engraft" plan --model "$model"
  step qemu-aarch64 "$engraft" train --model "$model" --data targets/cli/demo/private_train.jsonl \
    --iters 2 --threads 2 --adapter-path "$folder/adapter"
  rm -rf "$folder"
}

# The test programs that run under emulation, which is slow: not whole trainings, and on all cores but the
# first only what an instruction set touches. Always the whole workspace, since another choice of packages
# is another choice of features, for which everything would be built anew.
touched=(--lib --test decode --test isas --test forward)
programs=("${touched[@]}" --bins --test frame --test adapter_file --test data --test gguf --test exchange)

step cargo test --target $target --workspace --no-run
for cpu in "${cpus[@]}"; do
  export QEMU_CPU=$cpu
  printf '\n==== %s\n' "$cpu"
  step cargo test --no-fail-fast --target $target --workspace "${programs[@]}"
  programs=("${touched[@]}")
  smoke
done
printf '\nPassed on: %s. Left out under emulation: the tests of the command line (they start it as a\n' "${cpus[*]}"
printf 'program of its own; its smoke run stands in), tests/tidy.rs, which reads sources only, and those of\n'
printf 'whole trainings; on all cores but the first, what no instruction set touches.\n'
