"""Run Engraft's benches and its peers in turns and write one CSV of medians.

    python benches/record.py --out benches/record/TARGET/DATE.csv --model Q4_1.gguf \
        [--models Q4_0.gguf ...] [--peft-python PYTHON] [--llama-build DIR] [--rounds 3]

Systems run in turns, round by round, so that a shared machine's quiet and loud stretches meet all of
them; every figure is the median over the rounds of each run's own median. Build first:
`cargo bench --no-run`. Peers are optional; peers/README.md tells how to install them.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--model", type=Path, required=True, help="the model of the training step (GGUF)")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="more models, for prefill and decode")
    parser.add_argument("--peft-python", type=Path, help="Python that has torch, transformers and peft")
    parser.add_argument("--llama-build", type=Path, help="build tree of llama.cpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["step", "full", "decode", "kernels"], help="a part of it")
    return parser.parse_args()


def bench(name: str) -> list[str]:
    """The command that runs a bench that is built already."""
    return ["cargo", "bench", "--quiet", "--bench", name, "--"]


def lines(command: list, env: dict | None = None) -> list[dict]:
    """The JSON lines a command prints."""
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
    )
    if done.returncode != 0:
        print(f"failed: {' '.join(map(str, command))}", file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


STEPS = {
    "engraft 1x256": [],
    "engraft 1x256, all kept": ["--keep", "all"],
    "engraft 1x256, all kept in bf16": ["--keep", "all", "--keep-precision", "bf16"],
    "engraft 1x256, one thread": ["--threads", "1"],
    "engraft 1x256, avx2": ["--isa", "avx2"],
    "engraft 1x256, avx2, all kept": ["--isa", "avx2", "--keep", "all"],
    "engraft 4x256": ["--batch", "4"],
    "engraft 4x256, all kept": ["--batch", "4", "--keep", "all"],
    "engraft 1x1024": ["--seq", "1024"],
    "engraft 1x1024, all kept": ["--seq", "1024", "--keep", "all"],
}
PEFT = {
    "peft bf16 1x256": (["--dtype", "bf16"], {}),
    "peft f32 1x256": (["--dtype", "f32"], {}),
    "peft f32 1x256, avx2": (["--dtype", "f32"], {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}),
    "peft bf16 4x256": (["--dtype", "bf16", "--batch", "4"], {}),
    "peft f32 4x256": (["--dtype", "f32", "--batch", "4"], {}),
    "peft bf16 1x1024": (["--dtype", "bf16", "--seq", "1024"], {}),
    "peft f32 1x1024": (["--dtype", "f32", "--seq", "1024"], {}),
}


def step_round(args: argparse.Namespace, put) -> None:
    for case, flags in STEPS.items():
        for line in lines([*bench("step"), args.model, "--steps", "5", *flags]):
            put("step", case, "tokens_per_s", line["tokens_per_s"])
            for op, share in line["shares"].items():
                put("step", case, f"share_{op}", share)
            if "planned_private_bytes" in line:
                put("step", case, "planned_private_bytes", line["planned_private_bytes"])
    for case, (flags, env) in PEFT.items() if args.peft_python else []:
        script = [args.peft_python, "benches/peers/peft_step.py", "--steps", "3", "--warmup", "2", *flags]
        for line in lines(script, env):
            put("step", case, "tokens_per_s", line["tokens_per_second_median"])
            put("step", case, "peak_rss_mib", line["peak_rss_mib"])


FULL = {
    "engraft full 1x256": [],
    "engraft full 1x256, all kept": ["--keep", "all"],
    "engraft full 1x256, all kept, updated at once": ["--keep", "all", "--max-grad-norm", "0"],
}


def full_round(args: argparse.Namespace, put) -> None:
    for case, flags in FULL.items():
        for line in lines([*bench("step"), args.model, "--fine-tune-type", "full", "--steps", "5", *flags]):
            put("full", case, "tokens_per_s", line["tokens_per_s"])
            put("full", case, "planned_private_bytes", line["planned_private_bytes"])
            if line["peak_rss_mib"] is not None:
                put("full", case, "peak_rss_mib", line["peak_rss_mib"])
    if args.llama_build:
        for line in lines([sys.executable, "benches/peers/llama_finetune.py", args.llama_build, args.model]):
            put("full", "llama-finetune 1x256", "tokens_per_s", line["tokens_per_second_median"])
            put("full", "llama-finetune 1x256", "peak_rss_mib", line["peak_rss_mib"])


def decode_round(args: argparse.Namespace, put) -> None:
    for model in [args.model, *args.models]:
        found = lines([*bench("decode"), model])
        if args.llama_build:
            found += lines([sys.executable, "benches/peers/llama_cpp.py", args.llama_build, model])
        for line in found:
            for phase in ("prefill", "decode"):
                rate = line[f"{phase}_tokens_per_second_median"]
                put("decode", f"{line['system']} {model.name}", f"{phase}_tokens_per_s", rate)


def kernels_round(_: argparse.Namespace, put) -> None:
    for line in lines([*bench("kernels"), "--m", "256"]):
        case = " ".join(str(line[k]) for k in ("op", "type", "isa", "m") if k in line)
        for metric in ("gflop_per_s", "share_of_peak", "gb_per_s", "elements_per_s"):
            if line.get(metric) is not None:
                put("kernels", case, metric, line[metric])


def main() -> int:
    args = parse_args()
    figures = defaultdict(list)

    def put(part: str, case: str, metric: str, value: float) -> None:
        figures[part, case, metric].append(value)

    parts = {"step": step_round, "full": full_round, "decode": decode_round, "kernels": kernels_round}
    for _ in range(args.rounds):
        for name, run in parts.items():
            if args.only in (None, name):
                run(args, put)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["bench", "case", "metric", "median", "min", "max", "runs"])
        for (part, case, metric), values in figures.items():
            digits = [f"{v:.6g}" for v in (statistics.median(values), min(values), max(values))]
            table.writerow([part, case, metric, *digits, len(values)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
