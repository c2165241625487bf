#!/usr/bin/env bash
# Compiles the Java classes (Java 8) and the JNI layer against one libengraft.so.
#
#   targets/android/build-jni.sh LIBFOLDER OUT [CFLAGS...]
#
# LIBFOLDER has libengraft.so; OUT receives classes/ and libengraft_jni.so. CC names the compiler: for Android the
# NDK's, such as $NDK/toolchains/llvm/prebuilt/linux-x86_64/bin/aarch64-linux-android24-clang. jni.h comes from the
# JDK (JAVA_HOME) for the host and from the NDK for Android.
set -euo pipefail
libraries=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")"
cc=${CC:-cc}

[[ -f $libraries/libengraft.so ]] || { echo "$libraries: there is no libengraft.so" >&2 && exit 1; }

rm -rf "$out/classes" "$out/include"
# One compilation is over before the second compiler of the JVM pays.
javac -J-XX:TieredStopAtLevel=1 -Xlint:all,-options -Werror --release 8 -encoding UTF-8 -h "$out/include" \
  -d "$out/classes" java/dev/engraft/*.java
mv "$out/include/dev_engraft_Native.h" "$out/include/engraft_native.h"

includes=("-I$out/include" -I../capi/include)
if ! "$cc" -E -x c - <<<'#include <jni.h>' &>/dev/null; then
  home=${JAVA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")}
  includes+=("-I$home/include" "-I$home/include/linux")
fi
# -l, not the file: the loader then looks for the name beside this library, and not for the path of today.
# shellcheck disable=SC2016
"$cc" -std=c11 -O2 -g -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror "$@" "${includes[@]}" jni/engraft_jni.c \
  -L"$libraries" -lengraft -Wl,-z,max-page-size=16384 -Wl,-z,defs -Wl,-soname,libengraft_jni.so \
  -Wl,-rpath,'$ORIGIN' -o "$out/libengraft_jni.so"
