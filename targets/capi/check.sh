#!/usr/bin/env bash
# Runs tests/smoke.c with the static library twice: instrumented for addresses, undefined behaviour and leaks; and,
# with fewer rows and tokens, under valgrind, where errors and lost blocks end it with 9. If the host lacks a tool, the
# run is skipped with a message, which isn't a failure.
#
#   targets/capi/check.sh
#
# ENGRAFT_CC names a compiler (default: cc). The library is the one that the tests are built with.
set -euo pipefail
cd "$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)"
cc=${ENGRAFT_CC:-cc}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() {
  printf '\n== %s\n' "$*"
  "$@"
}

# smoke NAME PREFIX... runs the program NAME in a separate folder.
smoke() {
  local name=$1
  shift
  mkdir "$work/$name.files"
  step "$@" "$work/$name" targets/cli/seedling.gguf targets/cli/demo/private_train.jsonl "$work/$name.files"
}

compile() {
  local name=$1
  shift
  step "$cc" -std=c11 -Wall -Wextra -Wpedantic -Werror -g -DPANIC_INJECTION "$@" -Itargets/capi/include \
    targets/capi/tests/smoke.c "$library" -lgcc_s -lutil -lpthread -lm -ldl -o "$work/$name"
}

# must_fail NAME PREFIX... is smoke for a broken program: a tool that lets it pass proves nothing.
must_fail() {
  if smoke "$@" &>"$work/$1.log"; then
    echo "$1: a write past a block was not seen" >&2
    return 1
  fi
  grep -qi 'engraft_version' "$work/$1.log" || { cat "$work/$1.log" >&2 && return 1; }
}

if ! command -v "$cc" >/dev/null; then
  echo "SKIPPED: there is no C compiler ($cc)"
  exit 0
fi
# The whole workspace: another selection of packages would rebuild everything.
step cargo test --quiet --workspace --no-run
library=${CARGO_TARGET_DIR:-target}/debug/deps/libengraft.a

sanitizers=(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
compile sanitized "${sanitizers[@]}"
compile sanitized-broken "${sanitizers[@]}" -DBROKEN
# The program is instrumented; of the library only its allocations and libc calls are checked.
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1
smoke sanitized env
must_fail sanitized-broken env

if command -v valgrind >/dev/null; then
  compile plain -DBRIEF
  compile plain-broken -DBRIEF -DBROKEN
  # What a global of Rust holds by a pointer behind its count is "possibly lost" to valgrind, and is not counted;
  # the first program's leak check follows such pointers.
  tool=(valgrind --quiet --fair-sched=yes --leak-check=full --show-leak-kinds=definite,indirect
    --errors-for-leak-kinds=definite,indirect --error-exitcode=9)
  must_fail plain-broken "${tool[@]}" --exit-on-first-error=yes
  smoke plain "${tool[@]}"
else
  echo 'SKIPPED: there is no valgrind'
fi
printf '\nAll passed.\n'
