#!/usr/bin/env python3
"""Runs two builds of engraft on the same rows and seeds, and compares what they write, byte for byte.

    tests/same_results.py OLD NEW [--model MODEL.gguf] [--data DIR] [--isa avx2 --isa avx512] [--iters 12]

OLD and NEW are binaries. Without --model the built-in assistant is trained, on rows of this script. Adapters and
models must be equal, except that adapters stored as f16 are compared by their numbers: an old build may compress that
file. Verdicts must be equal, except for the digest of their settings and for their sentences. Exits with 1 if
anything else differs.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILT_IN = ROOT / "targets/cli/seedling.gguf"
# What a verdict may say differently: the digest of its settings, and words for people.
WORDS = {"sentence", "reasons", "undecided"}
F16 = "f16 file"

TRAIN = {
    "lora": [],
    "lora of batches": ["--batch-size", "3", "--grad-accumulation-steps", "2", "--dropout", "0.1"],
    "lora of some": ["--rank", "4", "--lora-modules", "q,v", "--num-layers", "2", "--keep", "inputs"],
    "lora in f32": ["--precision", "f32", "--keep", "all"],
    "lora kept in bf16": ["--keep", "all", "--keep-precision", "bf16", "--lora-plus-ratio", "8"],
    F16: ["--adapter-precision", "f16"],
    "dora": ["--fine-tune-type", "dora"],
    "rslora": ["--use-rslora", "--rank-pattern", "q=2,down=3"],
    "eva": ["--init", "eva", "--eva-batches", "2"],
    "replay": ["--replay", "base", "--replay-count", "6", "--replay-tokens", "12", "--replay-share", "0.3"],
    "kl": ["--kl-weight", "0.3"],
    "kl reverse": ["--kl-weight", "0.3", "--kl-direction", "reverse"],
    "full": ["--fine-tune-type", "full", "--type", "q8_0", "--learning-rate", "1e-4"],
}


def rows(folder):
    """Household commands for the built-in model, and everyday sentences for any other."""
    rooms = ["cave", "den", "loft", "nest", "burrow", "attic"]
    things = ["light", "heater", "fan", "radio", "blind", "lamp"]
    lines = []
    for i, room in enumerate(rooms):
        for j, thing in enumerate(things):
            state = "on" if (i + j) % 2 else "off"
            answer = json.dumps({"device": thing, "room": room, "state": state})
            lines.append(json.dumps({"prompt": f"turn {state} the {thing} in the {room}", "completion": answer}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def run(binary, words):
    done = subprocess.run([str(binary), *words], capture_output=True, text=True)
    if done.returncode not in (0, 4):
        sys.exit(f"{binary} {' '.join(words)}\nexited with {done.returncode}:\n{done.stderr}")


def files(folder):
    """What a run is for: adapters, models and verdicts, by their paths within the folder."""
    kept = ("adapter.engraft", "model.gguf", "verdict.json", "few_shot.json")
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.name in kept}


def verdict(path):
    found = json.loads(path.read_text(), object_hook=lambda o: {k: v for k, v in o.items() if k not in WORDS})
    found.get("binding", {}).pop("settings", None)
    return found


def differences(old, new):
    ours, theirs = files(old), files(new)
    if not ours:
        return ["nothing was written"]
    if ours.keys() != theirs.keys():
        return [f"files {sorted(ours)} and {sorted(theirs)}"]
    read = lambda path: verdict(path) if path.name == "verdict.json" else path.read_bytes()
    return [name for name in ours if read(ours[name]) != read(theirs[name])]


def by_numbers(binary, model, folder):
    """Puts the numbers of a folder's adapter in the place of its file, whatever that is packed in."""
    words = ["export", "-m", str(model), "--lora", str(folder), "--format", "peft", "-o", str(folder / "peft")]
    run(binary, words)
    (folder / "adapter.engraft").write_bytes((folder / "peft" / "adapter_model.safetensors").read_bytes())


def check_that_differences_are_found(folder, scratch):
    """The negative control: one bit of a file, and one number of a verdict."""
    changed = scratch / "changed"
    for name, path in files(folder).items():
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(folder, changed)
        if path.name == "verdict.json":
            found = json.loads(path.read_text())
            found["thresholds"]["alpha"] += 1e-9
            (changed / name).write_text(json.dumps(found))
        else:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            (changed / name).write_bytes(content)
        if differences(folder, changed) != [name]:
            sys.exit(f"{name}: a difference that this script made isn't found")


def cases(model, data, isa, iters):
    where = ["--isa", isa] if isa else []
    common = ["-m", str(model), "--data", str(data), "--threads", "2", *where]
    for name, words in TRAIN.items():
        words = ["--iters", str(iters), "--seed", "7", "--max-seq-length", "96", *words]
        yield name, lambda out, words=words: ["train", *common, "--adapter-path", str(out), *words]
    words = ["--iters", str(iters), "--metric", "json", "--answer-tokens", "24", "--examples-min", "2", "--max-seq-length", "200"]
    words += ["--valid-fraction", "0.2", "--resamples", "500", "--shots", "2", "--evaluations", "3"]
    yield "compare", lambda out: ["compare", *common, "--out", str(out), *words]
    yield "adapt", lambda out: ["adapt", *common, "--store", str(out), *words]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, default=BUILT_IN)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--isa", action="append")
    parser.add_argument("--iters", type=int, default=12)
    parser.add_argument("--only", action="append", help="these cases alone")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        data = options.data or scratch / "rows"
        if not options.data:
            data.mkdir()
            rows(data)
        todo = [(isa, *case) for isa in options.isa or [None] for case in cases(options.model, data, isa, options.iters)]
        if options.model == BUILT_IN:
            todo.append((None, "demo", lambda out: ["demo", "--store", str(out)]))
        for number, (isa, name, words) in enumerate(todo):
            if options.only and name not in options.only:
                continue
            folders = [scratch / f"{number}-{which}" for which in ("old", "new")]
            for binary, folder in zip((options.old, options.new), folders):
                run(binary, words(folder))
            if name == F16:
                for binary, folder in zip((options.old, options.new), folders):
                    by_numbers(binary, options.model, folder)
            differing = differences(*folders)
            check_that_differences_are_found(folders[1], scratch)
            failed += bool(differing)
            said = "DIFFERS: " + ", ".join(differing) if differing else "equal: " + ", ".join(files(folders[1]))
            print(f"{isa or 'widest':8} {name:18} {said}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
