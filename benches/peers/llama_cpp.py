"""Time llama.cpp's prefill and decode with its own llama-bench, one JSON object per model on stdout.

    python llama_cpp.py BUILD_DIR MODEL.gguf [MODEL.gguf ...]

BUILD_DIR is a CMake build tree of llama.cpp that holds bin/llama-bench. llama-bench runs each test once
unmeasured and then `--repetitions` times; the median of those is reported beside all of them, because on
a shared machine the mean follows the worst outlier.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build_dir", type=Path, help="build tree that holds bin/llama-bench")
    parser.add_argument("models", type=Path, nargs="+", help="GGUF files")
    parser.add_argument("-p", "--n-prompt", type=int, default=256, help="tokens of prefill (default 256)")
    parser.add_argument("-n", "--n-gen", type=int, default=64, help="tokens of decode (default 64)")
    parser.add_argument("-t", "--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, help="measured runs of each test (default 5)")
    args = parser.parse_args()
    for name in ("n_prompt", "n_gen", "threads", "repetitions"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def run_bench(program: Path, model: Path, args: argparse.Namespace) -> tuple[list[dict], float]:
    """llama-bench's records for one model, and the peak resident MiB of that process."""
    command = [program, "-m", model, "-p", args.n_prompt, "-n", args.n_gen, "-t", args.threads]
    command += ["-r", args.repetitions, "-o", "jsonl"]
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    output = child.stdout.read()
    # wait4 gives this child's own peak; getrusage would give the largest of all children so far.
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"{program} failed on {model} with status {child.returncode}; its message is above")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return [json.loads(line) for line in output.splitlines() if line.strip()], usage.ru_maxrss / unit


def report(records: list[dict], model: Path, peak_mib: float, args: argparse.Namespace) -> dict:
    """One flat record: prefill and decode rates in tokens per second."""
    result = {
        "system": "llama.cpp",
        "commit": records[0]["build_commit"],
        "model": model.name,
        "type": records[0]["model_type"],
        "threads": args.threads,
        "n_prompt": args.n_prompt,
        "n_gen": args.n_gen,
    }
    for record in records:
        phase = "prefill" if record["n_gen"] == 0 else "decode"
        rates = record["samples_ts"]
        result[f"{phase}_tokens_per_second_median"] = round(statistics.median(rates), 2)
        result[f"{phase}_tokens_per_second"] = [round(r, 2) for r in rates]
    result["peak_rss_mib"] = round(peak_mib, 1)
    return result


def main() -> int:
    args = parse_args()
    program = args.build_dir / "bin" / "llama-bench"
    if not program.is_file():
        print(f"{program} is missing; README.md beside this file tells how to build it", file=sys.stderr)
        return 2
    for model in args.models:
        try:
            records, peak_mib = run_bench(program, model, args)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        if not records:
            print(f"{program} reported nothing for {model}", file=sys.stderr)
            return 1
        print(json.dumps(report(records, model, peak_mib, args)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
