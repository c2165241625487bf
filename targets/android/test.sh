#!/usr/bin/env bash
# Tests the Java classes on the host's JVM with the host's libengraft.so: a whole adaptation and every misuse
# (test/AdaptTest.java), under -Xcheck:jni. Then tests aar.sh on stand-ins, and Kotlin if there is a compiler. Each
# checker is also given something broken, which it must find.
#
#   targets/android/test.sh [FOLDER]
#
# FOLDER has libengraft.so (default: cargo's debug/deps, after `cargo build -p engraft-capi`). Without a JDK or a C
# compiler it prints SKIPPED, which isn't a failure; a missing library is.
set -euo pipefail
given=${1:+$(realpath -m "$1")}
cd "$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)"
libraries=${given:-$(realpath -m "${CARGO_TARGET_DIR:-target}")/debug/deps}
here=targets/android
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Names of files and the JVM's output in UTF-8.
export LC_ALL=C.UTF-8

for tool in javac java "${CC:-cc}"; do
  if ! command -v "$tool" >/dev/null; then
    echo "SKIPPED: there is no $tool; the Android layer was not tested" >&2
    exit 0
  fi
done
[[ -f $libraries/libengraft.so ]] ||
  { echo "$libraries: there is no libengraft.so; build it: cargo build -p engraft-capi" >&2 && exit 1; }

say() {
  printf '\n== %s\n' "$*"
}

# adapt BUILD ARGUMENTS...: the test program with the libraries and classes of BUILD.
adapt() {
  local build=$1
  shift
  mkdir "$work/files"
  LD_LIBRARY_PATH=$libraries java -Xcheck:jni -Xmx64m -XX:+UseSerialGC "-Djava.library.path=$build" \
    -cp "$work/build/classes:$work/test" AdaptTest "$@" &>"$work/log"
  local code=$?
  rm -rf "$work/files"
  return "$code"
}
life=(targets/cli/seedling.gguf targets/cli/demo/private_train.jsonl "$work/files")
jni_warning='WARNING in native|WARNING: JNI|FATAL ERROR in native'

# must_fail WORDS COMMAND...: a checker that lets something broken pass proves nothing.
must_fail() {
  local words=$1
  shift
  if "$@" &>"$work/broken.log" || ! grep -q -- "$words" "$work/broken.log"; then
    echo "was to fail with \"$words\": $*" >&2
    cat "$work/broken.log" >&2
    exit 1
  fi
}

say 'the JNI layer and the classes'
$here/build-jni.sh "$libraries" "$work/build"
javac -J-XX:TieredStopAtLevel=1 -Xlint:all -Werror -encoding UTF-8 -cp "$work/build/classes" -d "$work/test" $here/test/AdaptTest.java
passed=yes
adapt "$work/build" "${life[@]}" targets/capi/include/engraft.h $here/jni/engraft_jni.c || passed=no
cat "$work/log"
[[ $passed == yes ]] || exit 1
! grep -Eq "$jni_warning" "$work/log" || { echo 'JNI was misused: see above' >&2 && exit 1; }

say 'broken on purpose'
$here/build-jni.sh "$libraries" "$work/leaky" -DLEAKY
adapt "$work/leaky" steps "${life[@]}" || true
grep -Eq "$jni_warning" "$work/log" ||
  { cat "$work/log" && echo 'references that leak were not seen by -Xcheck:jni' >&2 && exit 1; }
mkdir "$work/empty"
if adapt "$work/empty" steps "${life[@]}" || ! grep -q 'UnsatisfiedLinkError.*engraft_jni' "$work/log"; then
  cat "$work/log"
  echo 'without the library it was to fail with UnsatisfiedLinkError' >&2
  exit 1
fi
must_fail 'no libengraft.so' $here/build-jni.sh "$work/empty" "$work/none"
# Of the same size, so that only the type tells them apart.
sed 's/vocab, "vocab", INT/vocab, "vocab", FLOAT/' $here/jni/engraft_jni.c >"$work/wrong.c"
home=${JAVA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")}
must_fail 'engraft_model_info.vocab is not of the kind FLOAT' "${CC:-cc}" -std=c11 -fsyntax-only \
  -I"$work/build/include" -Itargets/capi/include -I"$home/include" -I"$home/include/linux" "$work/wrong.c"
echo 'leaking references, a missing library and a wrong kind of a field are seen'

# stand_in FOLDER CC PAGE UNWANTED: a libengraft.so as Android has it, of empty functions, as no NDK is at hand: those of
# engraft.h but the one named UNWANTED, and one of that name where the header has none.
stand_in() {
  local folder=$1 cc=$2 page=$3 unwanted=$4 flags
  flags=(-shared -fPIC -nostdlib -w -fno-builtin -Wl,-z,max-page-size="$page")
  mkdir -p "$folder"
  {
    grep -o '^u\?int32_t engraft_[a-z0-9_]*' targets/capi/include/engraft.h | sed 's/.* //'
    echo "$unwanted"
  } | sort | uniq -u | sed '/./s/.*/void &(void) {}/' >"$folder/engraft.c"
  printf 'void %s(void) {}\n' malloc free memcpy memset strlen __tls_get_addr __stack_chk_fail >"$folder/c.c"
  "$cc" "${flags[@]}" -Wl,-soname,libc.so "$folder/c.c" -o "$folder/libc.so"
  "$cc" "${flags[@]}" "$folder/engraft.c" -o "$folder/libengraft.so"
}

say 'the AAR'
pairs=()
for machine in x86_64 aarch64; do
  abi=${machine/aarch64/arm64-v8a}
  cc=$machine-linux-gnu-gcc
  if ! command -v "$cc" >/dev/null; then
    echo "SKIPPED: $abi, for want of $cc" >&2
    continue
  fi
  stand_in "$work/$abi" "$cc" 16384 ''
  CC=$cc $here/build-jni.sh "$work/$abi" "$work/$abi" -nostdlib "-L$work/$abi" -Wl,--no-as-needed -lc
  pairs+=("$abi=$work/$abi")
  must_fail 'not for' $here/aar.sh "$work/bad.aar" "$work/build/classes" "${abi/x86_64/arm64-v8a}=$work/${abi/arm64-v8a/x86_64}"
done
if [[ ${#pairs[@]} -gt 0 ]]; then
  $here/aar.sh "$work/engraft.aar" "$work/build/classes" "${pairs[@]}"
fi
if [[ -d $work/x86_64 ]]; then
  aar=($here/aar.sh "$work/bad.aar" "$work/build/classes")
  stand_in "$work/bad" x86_64-linux-gnu-gcc 4096 ''
  must_fail 'aligned to 4096' "${aar[@]}" "x86_64=$work/bad"
  stand_in "$work/bad" x86_64-linux-gnu-gcc 16384 engraft_inject_panic
  must_fail 'should not: engraft_inject_panic' "${aar[@]}" "x86_64=$work/bad"
  stand_in "$work/bad" x86_64-linux-gnu-gcc 16384 engraft_plan_pool
  must_fail 'does not export engraft_plan_pool' "${aar[@]}" "x86_64=$work/bad"
  cp "$work/x86_64/libengraft.so" "$work/build/libengraft_jni.so" "$work/bad/"
  must_fail 'needs libc.so.6' "${aar[@]}" "x86_64=$work/bad"
  echo 'small pages, foreign machines, exports and needs are seen'
fi
say 'Kotlin'
if command -v kotlinc >/dev/null; then
  # Compiled against our own declarations: this finds mismatches with the Java classes, but none with the real
  # kotlinx.coroutines and androidx.work.
  mapfile -t declared < <(find $here/test/stand-ins -name '*.java')
  javac -J-XX:TieredStopAtLevel=1 --release 8 -Xlint:-options -d "$work/android" "${declared[@]}"
  JAVA_OPTS=-XX:TieredStopAtLevel=1 kotlinc -jvm-target 1.8 -cp "$work/build/classes:$work/android" -d "$work/kotlin" \
    $here/kotlin/dev/engraft/*.kt $here/test/stand-ins/*.kt 2>"$work/log" || { cat "$work/log" >&2 && exit 1; }
  [[ -f $work/kotlin/dev/engraft/FlowsKt.class ]]
  echo 'Flows.kt and AdaptWorker.kt fit the Java classes (the libraries below them were stand-ins)'
else
  echo 'SKIPPED: there is no kotlinc; Flows.kt and AdaptWorker.kt were not compiled' >&2
fi
printf '\nAll passed.\n'
