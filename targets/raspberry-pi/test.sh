#!/usr/bin/env bash
# Builds the workspace's tests for 64-bit ARM once and runs them on emulated cores: the Pi 4's (cortex-a72: only
# NEON), the Pi 5's (cortex-a76: dot products), and one with everything (max: int8 matrix products).
#
#   targets/raspberry-pi/test.sh [--whole] [CPU ...]
#
# ENGRAFT_ARM_TARGET selects another target: aarch64-unknown-linux-musl, on the same cores, or
# armv7-unknown-linux-gnueabihf, on the Pi 2's (cortex-a7). With --whole, every test of the workspace runs on every
# core, including trainings and the command line. That takes hours.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$(git -C "$here" rev-parse --show-toplevel)"
whole=
if [[ ${1-} == --whole ]]; then
  whole=1
  shift
fi
# shellcheck source=targets/raspberry-pi/cross.sh
. "$here/cross.sh"
cpus=("$@")
if [[ ${#cpus[@]} -eq 0 ]]; then
  cpus=(cortex-a72 cortex-a76 max)
  [[ $target != armv7-* ]] || cpus=(cortex-a7)
fi
export "CARGO_TARGET_${upper}_RUNNER=$emulator"
# For tests that start the command line, or themselves: the host's kernel can't start ARM programs.
export ENGRAFT_TEST_EMULATOR=$emulator ENGRAFT_TEST_CC=$cc
# Files beside the repository are the host's tests' affair: a whole text through an emulated model takes
# an hour. Any folder can be named to do it nevertheless.
export ENGRAFT_SHARED=${ENGRAFT_EMULATED_SHARED:-/nonexistent}
unset ENGRAFT_MODEL ENGRAFT_MODELS_DIR

step() {
  printf '\n== %s\n' "$*"
  "$@"
}

# The command line itself.
smoke() {
  step on_arm --version
  step on_arm plan --model "$model"
  step on_arm selftest --threads 2
  train on_arm "$folder/$QEMU_CPU"
  losses_agree "$folder/$QEMU_CPU"
  [[ ! -x $host ]] || losses_agree "$folder/host"
}

on_arm() {
  "$emulator" "$CARGO_TARGET_DIR/$target/debug/engraft" "$@"
}

train() {
  step "$1" train --model "$model" --data targets/cli/demo/private_train.jsonl --iters 2 --threads 2 \
    --adapter-path "$2"
}

loss() {
  "$1" eval --model "$model" --data targets/cli/demo/private_train.jsonl --threads 2 --json \
    --lora "$2/adapter.engraft" | sed -n 's/.*"nll":\([0-9.]*\).*/\1/p'
}

# An adapter works on the other machine, too. Sums have another order there, and where a rounding flips, int8
# activations differ by a step, so the losses may differ by a thousandth.
losses_agree() {
  if [[ ! -x $host ]]; then
    echo "SKIPPED: adapters on the host: $host is missing" >&2
    return
  fi
  printf '\n== losses of %s: ' "$1"
  awk -v arm="$(loss on_arm "$1")" -v host="$(loss "$host" "$1")" 'BEGIN {
    printf "%s on ARM, %s on the host\n", arm, host
    apart = (arm - host) / host
    exit !(host > 0 && apart < 0.001 && apart > -0.001)
  }'
}

# The C program with the archive that the tests were built with: a whole life, with misuse at every step.
c_program() {
  step "$cc" -std=c11 -Wall -Wextra -Wpedantic -Werror -static -DBRIEF -DPANIC_INJECTION \
    -Itargets/capi/include targets/capi/tests/smoke.c "$CARGO_TARGET_DIR/$target/debug/deps/libengraft.a" \
    "$unwinder" -lpthread -lm -ldl -o "$folder/smoke"
  mkdir "$folder/files"
  step "$emulator" "$folder/smoke" "$model" targets/cli/demo/private_train.jsonl "$folder/files"
}

# The test programs to run under emulation, which is slow: no whole trainings, and on all cores but the first only
# what depends on the instruction set. Always build the whole workspace: selecting packages changes features, which
# would rebuild everything.
touched=(--lib --test decode --test isas)
programs=("${touched[@]}" --bins --test frame)
parts=(forward:: adapter_file:: data:: gguf:: exchange::)
[[ -z $whole ]] || programs=()

model=targets/cli/seedling.gguf host=$base/debug/engraft
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[[ ! -x $host ]] || train "$host" "$folder/host"

step cargo test --target "$target" --workspace --no-run
for cpu in "${cpus[@]}"; do
  export QEMU_CPU=$cpu
  printf '\n==== %s\n' "$cpu"
  step cargo test --no-fail-fast --target "$target" --workspace "${programs[@]}"
  if [[ -z $whole ]]; then
    step cargo test --no-fail-fast --target "$target" --workspace --test runtime -- "${parts[@]}"
    programs=("${touched[@]}") parts=(forward::)
  fi
  smoke
done
c_program
printf '\nPassed on: %s.' "${cpus[*]}"
[[ -n $whole ]] || printf ' Left out (--whole runs them): whole trainings, and the tests of the command line, for
which its smoke run stands in; on all cores but the first, what no instruction set touches.'
printf '\n'
