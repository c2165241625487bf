#!/usr/bin/env bash
# Checks the shared libraries of each ABI and packs them with the Java classes as an AAR.
#
#   targets/android/aar.sh OUT.aar CLASSES ABI=FOLDER...
#
# CLASSES is OUT/classes from build-jni.sh. Each FOLDER has libengraft.so and libengraft_jni.so for an ABI, arm64-v8a
# or x86_64:
#
#   targets/android/aar.sh engraft.aar build/classes arm64-v8a=build/arm64 x86_64=build/x86_64
#
# For each library it checks the machine, pages of 16 KiB, no text relocations, the libraries it needs (listed), and
# its exports, which must be exactly the functions of engraft.h or the native methods of Native.java.
set -euo pipefail
usage='usage: aar.sh OUT.aar CLASSES ABI=FOLDER...'
out=$(realpath -m "${1:?$usage}")
classes=$(realpath "${2:?$usage}")
shift 2
[[ $# -gt 0 ]] || { echo "$usage" >&2 && exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export LC_ALL=C

# The libraries that Android offers to every app.
system='libc.so libm.so libdl.so liblog.so'
page=16384

fail() {
  echo "$*" >&2
  exit 1
}

# symbols FILE UND|defined: names of a library's dynamic symbols, without versions.
symbols() {
  readelf --dyn-syms -W "$1" | awk -v what="$2" '
    $1 ~ /^[0-9]+:$/ && $8 != "" && $5 != "LOCAL" && (($7 == "UND") == (what == "UND")) { sub(/@.*/, "", $8); print $8 }' |
    sort -u
}

# check FILE MACHINE EXPORTS: EXPORTS is a sorted list of what must be exported.
check() {
  local file=$1 machine=$2 exports=$3 align name
  [[ -f $file ]] || fail "$file is missing"
  readelf -hW "$file" | grep -q "Machine: *$machine" || fail "$file: not for $machine"
  readelf -lW "$file" | awk '$1 == "LOAD" { print $NF }' >"$work/aligns"
  [[ -s $work/aligns ]] || fail "$file: no LOAD segment"
  while read -r align; do
    ((align >= page && (align & (align - 1)) == 0)) ||
      fail "$file: a LOAD segment is aligned to $((align)) bytes, and must be to $page (-Wl,-z,max-page-size=$page)"
  done <"$work/aligns"
  readelf -dW "$file" >"$work/dynamic"
  ! grep -q 'TEXTREL' "$work/dynamic" || fail "$file: text relocations"
  sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' "$work/dynamic" >"$work/needed"
  while read -r name; do
    [[ " $system libengraft.so " == *" $name "* ]] || fail "$file: needs $name, which Android doesn't offer to apps"
  done <"$work/needed"
  symbols "$file" defined >"$work/defined"
  comm -13 "$exports" "$work/defined" >"$work/extra"
  comm -23 "$exports" "$work/defined" >"$work/absent"
  [[ ! -s $work/extra ]] || fail "$file: exports what it should not: $(tr '\n' ' ' <"$work/extra")"
  [[ ! -s $work/absent ]] || fail "$file: does not export $(tr '\n' ' ' <"$work/absent")"
  symbols "$file" UND >"$work/undefined"
  printf '%s\n  %s bytes, pages of %s, %s exports; needs %s\n' "$file" "$(stat -c %s "$file")" \
    "$(sort -u "$work/aligns" | tr '\n' ' ')" "$(wc -l <"$work/defined")" "$(tr '\n' ' ' <"$work/needed")"
  printf '  undefined: %s of engraft.h; %s\n' "$(grep -c '^engraft_' "$work/undefined" || true)" \
    "$(grep -v '^engraft_' "$work/undefined" | tr '\n' ' ')" | fold -s -w 110
}

grep -o '^\(int32_t\|uint32_t\) engraft_[a-z0-9_]*(' "$here/../capi/include/engraft.h" |
  sed 's/.* \(.*\)(/\1/' | sort -u >"$work/functions"
{
  echo JNI_OnLoad
  javap -p -cp "$classes" dev.engraft.Native | sed -n 's/.* native .* \([A-Za-z0-9]*\)(.*/Java_dev_engraft_Native_\1/p'
} | sort -u >"$work/natives"
[[ $(wc -l <"$work/functions") -gt 50 && $(wc -l <"$work/natives") -gt 50 ]] || fail 'the header or Native.class was not understood'

root=$work/aar
mkdir -p "$root"
for pair in "$@"; do
  abi=${pair%%=*} folder=${pair#*=}
  case $abi in
    arm64-v8a) machine=AArch64 ;;
    x86_64) machine='Advanced Micro Devices X86-64' ;;
    *) fail "$abi: not arm64-v8a and not x86_64" ;;
  esac
  check "$folder/libengraft.so" "$machine" "$work/functions"
  check "$folder/libengraft_jni.so" "$machine" "$work/natives"
  grep '^engraft_' "$work/undefined" | comm -13 "$work/functions" - >"$work/unknown"
  [[ ! -s $work/unknown ]] || fail "$folder/libengraft_jni.so: unknown to the header: $(tr '\n' ' ' <"$work/unknown")"
  install -D -m 644 -t "$root/jni/$abi" "$folder/libengraft.so" "$folder/libengraft_jni.so"
done

cp "$here/AndroidManifest.xml" "$here/proguard.txt" "$root/"
: >"$root/R.txt"
jar --create --no-manifest --file "$root/classes.jar" -C "$classes" dev
rm -f "$out"
jar --create --no-manifest --file "$out" -C "$root" .
printf '%s\n' "$out"
jar --list --file "$out" | grep -v '/$'
