#!/usr/bin/env python3
"""Tables of a comparison for RESULTS.md: table.py DIR/report.json"""
import json
import re
import statistics
import sys


def number(value, digits=4, sign=False):
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def interval(comparison):
    if comparison is None:
        return "–"
    low, high = (number(comparison[end], 3, True) for end in ("lower", "upper"))
    return f"{number(comparison['gain'], 3, True)} [{low}, {high}]"


def rows(report):
    runs = {run["arm"]: run for run in report["runs"]}
    scoring = {one["arm"]: one for one in report["scoring"]}
    for arm in report["verdict"]["arms"]:
        against = {c["against"]: c for c in arm["comparisons"]}
        zero = against.get("zero-shot")
        shots = [c for name, c in against.items() if name != "zero-shot"]
        hardest = min(shots, key=lambda c: c["gain"] if c["gain"] is not None else -1e9, default=None)
        forgot = arm["retention"][0] if arm["retention"] else None
        run = runs.get(arm["name"])
        share = arm["accuracy"]
        yield [
            arm["name"],
            number(arm["nll"]),
            interval(zero),
            interval(hardest),
            "–" if share is None else f"{100 * share:.2f} %",
            "–" if zero is None or zero["accuracy"] is None else
            f"{zero['accuracy']['only_arm']} : {zero['accuracy']['only_rival']}, p = {zero['accuracy']['p_mid']:.3f}",
            "–" if forgot is None else number(forgot["delta_nll"], 4, True),
            "–" if forgot is None else number(forgot["kl"]),
            number(arm["task_kl"]),
            "–" if run is None else f"{run['best_step']} of {run['steps']}",
            "–" if run is None else f"{run['tokens'] / run['seconds']:.0f}",
            "–" if run is None else f"{run['planned_bytes'] / 2**20:.0f} / {(run['peak_bytes'] or 0) / 2**20:.0f}",
            "–" if scoring[arm["name"]]["generated_tokens"] == 0 else
            f"{scoring[arm['name']]['generated_tokens']}",
            "yes" if arm["eligible"] else "no",
        ]


HEAD = ["arm", "held-out NLL", "gain on zero-shot, interval", "gain on the best few-shot, interval", "solved",
        "solved only by it : only by zero-shot", "retention ΔNLL", "retention KL", "task KL", "best step",
        "tokens/s", "MiB planned / measured", "tokens generated", "may be promoted"]


def line(cells):
    return "| " + " | ".join(cells) + " |"


def main():
    report = json.load(open(sys.argv[1], encoding="utf-8"))
    verdict = report["verdict"]
    print(line(HEAD))
    print(line(["---"] * len(HEAD)))
    for row in rows(report):
        print(line(row))
    groups = {}
    for arm in verdict["arms"]:
        groups.setdefault(re.sub(r"(-\d+| seed \d+)$", "", arm["name"]), []).append(arm["nll"])
    several = {name: [v for v in values if v is not None] for name, values in groups.items() if len(values) > 1}
    if several:
        print("\nOver seeds (mean, lowest to highest held-out NLL): " + "; ".join(
            f"{name} {statistics.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})" for name, v in several.items() if v) + ".")
    print(f"\nVerdict: `{verdict['decision']}`. {verdict['sentence']}")
    if verdict["undecided"]:
        print("\nUndecided: " + " ".join(verdict["undecided"]))
    print(f"\nHeld out: {verdict['held_out']['examples']} rows, {verdict['held_out']['targets']} targets. "
          f"Model {verdict['binding']['model'][:12]}, split {verdict['binding']['data_split'][:12]}, "
          f"settings {verdict['binding']['settings'][:12]}; {report['seconds'] / 60:.0f} minutes in all.")


main()
