#!/usr/bin/env bash
# What can be said about the ARM paths without a device, written to benches/record: the schedules of
# their inner loops by llvm-mca (Debian's llvm-19), and the instructions of one block's training step
# under QEMU, one thread. Set up the toolchain first: targets/raspberry-pi/toolchain.sh.
#
#   benches/arm/record.sh [SEQUENCE]      (default 64 tokens: 256 take QEMU four times as long)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$(git -C "$here" rev-parse --show-toplevel)"
seq=${1:-64}
target=aarch64-unknown-linux-gnu
base=${CARGO_TARGET_DIR:-$PWD/target}
record=benches/record/$target
mca=${LLVM_MCA:-llvm-mca-19}

if [[ ! -d $(rustc --print target-libdir --target $target) ]]; then
  # shellcheck source=/dev/null
  . "$(ENGRAFT_ARM_TOOLCHAIN=${ENGRAFT_ARM_TOOLCHAIN:-$base/arm-toolchain} targets/raspberry-pi/toolchain.sh)"
fi
export CARGO_TARGET_DIR=$base/arm
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS='-C target-feature=+crt-static'
work=$CARGO_TARGET_DIR/record
mkdir -p "$work" "$record"

# One codegen unit without LTO: the whole crate in one file of assembly, under names that keep the
# generic arguments.
schedules() {
  cargo rustc -p engraft-kernels --lib --release --target $target -- \
    --emit "asm=$work/kernels.s" -C codegen-units=1 -C lto=off -C symbol-mangling-version=v0
  python3 benches/arm/loops.py "$work/kernels.s" "$mca" >"$record/loops.csv"
}

# Instructions of a run of two steps (the bench's warm-up and one more) on a model of $1 blocks.
count() {
  local layers=$1 type=$2 cpu=$3 isa=$4 gradient=$5 said
  [[ -e $work/$type-$layers.gguf ]] || python3 benches/arm/model.py "$layers" "$type" "$work/$type-$layers.gguf"
  said=$(setarch -R qemu-aarch64 -cpu "$cpu" -plugin "$work/insn.so" "$step" "$work/$type-$layers.gguf" \
    --threads 1 --seq "$seq" --steps 1 --isa "$isa" --gradient-precision "$gradient" 2>&1 >/dev/null </dev/null)
  printf '%s\n' "${said##*instructions }"
}

counts() {
  cc -shared -fPIC -O2 -o "$work/insn.so" benches/arm/insn.c
  step=$(cargo bench --bench step --target $target --no-run 2>&1 | tee /dev/stderr |
    sed -n 's/.*Executable.*(\(.*\))$/\1/p')
  echo "type,core,instruction set,gradient,tokens,instructions of one block's step,per token"
  local type cpu isa gradient one two n
  for type in Q4_0 Q8_0; do
    while read -r cpu isa gradient; do
      one=$(count 1 $type "$cpu" "$isa" "$gradient")
      two=$(count 2 $type "$cpu" "$isa" "$gradient")
      n=$(((two - one) / 2))
      echo "$type,$cpu,$isa,$gradient,$seq,$n,$((n / seq))"
    done <<'RUNS'
cortex-a72 neon f32
cortex-a72 neon int8
cortex-a76 neon int8
cortex-a76 dotprod f32
cortex-a76 dotprod int8
max dotprod int8
max i8mm int8
RUNS
  done
}

schedules
counts >"$work/block_step.csv"
mv "$work/block_step.csv" "$record/block_step.csv"
cat "$record/loops.csv" "$record/block_step.csv"
