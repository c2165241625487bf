"""Time llama.cpp's llama-finetune (full fine-tuning), one JSON object on stdout.

    python llama_finetune.py BUILD_DIR MODEL.gguf

BUILD_DIR is a CMake build tree of llama.cpp that holds bin/llama-finetune and bin/llama-quantize. The
model is converted to F32 first, for llama-finetune trains F32 tensors only; it leaves the token embedding
as it is. A step is one window of `--ctx-size` tokens, forward, backward and AdamW; windows overlap by half,
and every token that goes through the model counts. Times are those between the progress bar's updates.
The text is made of seeded random words: the time of a step does not depend on what they say.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "the a house river stone light under over goes comes small great evening water tree and of to".split()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build_dir", type=Path, help="build tree that holds bin/llama-finetune")
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("-c", "--ctx-size", type=int, default=256, help="tokens of a step (default 256)")
    parser.add_argument("-t", "--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after one that is not (default 8)")
    args = parser.parse_args()
    for name in ("ctx_size", "threads", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The model in F32, and a text of enough tokens."""
    model, text = folder / "f32.gguf", folder / "text.txt"
    quantize = [args.build_dir / "bin" / "llama-quantize", "--allow-requantize", args.model, model, "F32"]
    subprocess.run([str(part) for part in quantize], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    draw = random.Random(1)
    # At least one token a word; a twentieth of the windows is held out, and one more is cut off.
    words = (args.ctx_size // 2) * (args.steps + 4) * 12 // 10 + args.ctx_size
    text.write_text(" ".join(draw.choice(WORDS) for _ in range(words)))
    return model, text


def run(args: argparse.Namespace, model: Path, text: Path, folder: Path) -> tuple[list[float], float]:
    """Seconds of each step, and the peak resident MiB of the process."""
    command = [args.build_dir / "bin" / "llama-finetune", "-m", model, "-f", text, "-c", args.ctx_size]
    command += ["-b", args.ctx_size, "-ub", args.ctx_size, "-t", args.threads, "-tb", args.threads]
    command += ["--epochs", 1, "-o", folder / "out.gguf"]
    child = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0
    )
    seen, shown = {}, b""
    while part := os.read(child.stderr.fileno(), 4096):
        now = time.perf_counter()
        shown = (shown + part)[-8192:]
        for step in re.findall(rb"train: [^\r\n]*? data=(\d+)/", shown):
            seen.setdefault(int(step), now)
    # wait4 gives this child's own peak; getrusage would give the largest of all children so far.
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"llama-finetune failed with status {child.returncode}")
    times = [seen[step] for step in sorted(seen)]
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return [b - a for a, b in zip(times, times[1:])], usage.ru_maxrss / unit


def main() -> int:
    args = parse_args()
    if not (args.build_dir / "bin" / "llama-finetune").is_file():
        print(f"no bin/llama-finetune in {args.build_dir}; README.md beside this file tells how", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        model, text = prepare(args, Path(folder))
        seconds, peak_mib = run(args, model, text, Path(folder))
    if not seconds:
        print("llama-finetune told of no step", file=sys.stderr)
        return 1
    rates = [args.ctx_size / s for s in seconds]
    print(json.dumps({
        "system": "llama.cpp",
        "method": "full, embedding frozen",
        "model": args.model.name,
        "dtype": "f32",
        "batch": 1,
        "seq": args.ctx_size,
        "threads": args.threads,
        "tokens_per_second_median": round(statistics.median(rates), 2),
        "tokens_per_second": [round(r, 2) for r in rates],
        "peak_rss_mib": round(peak_mib, 1),
    }))
    return 0


if __name__ == "__main__":
    sys.exit(main())
