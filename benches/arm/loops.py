"""Finds the kernels' inner loops in the compiler's assembly and asks llvm-mca for their cycles.

python3 loops.py ASSEMBLY LLVM_MCA > loops.csv

A loop is a stretch of code that a backward branch closes. Of each function named below, the loop with
the most multiplications of the wanted kind is taken; a loop over groups is one such loop with the one
inside it, each in its own steady state. The limit is what the core's vector pipes allow for the
multiplications alone; its share says how much of the loop's cycles they fill, as the model schedules
it from L1.
"""
import re
import subprocess
import sys

# (label, part of the symbol with its constants, multiplication, products in one, products in one pass
# of the loop over groups; 0 takes the innermost loop alone, −n one whose inner loop makes n passes)
WANTED = [
    ("f32 tile 8x8", "neon_table7nt_item", "fmla", 4, 0),
    ("int8 tile 4x8, a group of 32 codes of 4 or 5 bits", "neon_table7nt_item", "smlal", 8, 4 * 8 * 32),
    ("int8 tile 4x8, a group of 32 codes of 8 bits", "neon_table7nn_item", "smlal", 8, 4 * 8 * 32),
    ("int8 tile 6x8, a group of 32, sdot", "dotprod_table7nn_item", "sdot", 16, 6 * 8 * 32),
    ("int8 tile 6x8, a group of 32, smmla", "i8mm_table7nn_item", "smmla", 32, 6 * 8 * 32),
    ("bf16 tile 8x8, bfmmla", "i8mm_bf16_table7nn_item", "bfmmla", 16, 0),
    ("dot_rows Q4_0, 4 rows, neon", "dot_kernel_neon:2:18:4", "smlal", 8, 0),
    ("dot_rows Q4_1, 4 rows, neon", "dot_kernel_neon:3:20:4", "smlal", 8, 0),
    ("dot_rows Q4_K, 4 rows, neon", "dot_kernel_neon:12:144:4", "smlal", 8, -4),
    ("dot_rows Q4_0, 4 rows, dotprod", "dot_kernel_dotprod:2:18:4", "sdot", 16, 0),
    ("dot_rows Q4_1, 4 rows, dotprod", "dot_kernel_dotprod:3:20:4", "sdot", 16, 0),
    ("dot_rows Q4_K, 4 rows, dotprod", "dot_kernel_dotprod:12:144:4", "sdot", 16, -4),
]

# Model of the core: its scheduler in LLVM, and 128-bit multiplications a cycle it has for each kind.
# LLVM gives the Cortex-A72 and the Cortex-A76 its A57 model, which has one pipe for dot products. The
# Neoverse N1 is the Cortex-A76 for servers and has a model of its own: read that. i8mm's and bf16's first
# cores are those of the Neoverse N2.
MODELS = {
    "cortex-a72": {"fmla": 1, "smlal": 1},
    "cortex-a76": {"fmla": 2, "smlal": 1, "sdot": 2},
    "neoverse-n1": {"fmla": 2, "smlal": 1, "sdot": 2},
    "neoverse-n2": {"fmla": 2, "smlal": 1, "sdot": 2, "smmla": 2, "bfmmla": 2},
}
FEATURES = "+neon,+dotprod,+i8mm,+bf16"


def functions(path):
    """(symbol, lines) of every function."""
    name, lines = None, []
    for line in open(path):
        start = re.match(r"^([\w$.]+):", line)
        if start and not line.startswith(".L"):
            name, lines = start.group(1), []
        elif name and line.strip().startswith(".cfi_endproc"):
            yield name, lines
            name = None
        elif name:
            lines.append(line.rstrip())


def loops_of(lines):
    """(start, end) of every stretch that ends in a branch back to its start, inner ones first."""
    labels, loops = {}, set()
    for at, line in enumerate(lines):
        label = re.match(r"^(\.L\w+):", line)
        if label:
            labels[label.group(1)] = at
        branch = re.match(r"^\s+(?:b|b\.\w+|cbn?z|tbn?z)\s.*?(\.L\w+)$", line)
        if branch and branch.group(1) in labels:
            loops.add((labels[branch.group(1)], at))
    return sorted(loops, key=lambda l: l[1] - l[0])


def instructions(lines, start, end):
    return [l for l in lines[start : end + 1] if re.match(r"^\s+[a-z]", l)]


def count(loop, kind):
    kinds = ("smlal", "smlal2", "smull", "smull2") if kind == "smlal" else (kind,)
    return sum(l.split()[0] in kinds for l in loop)


def cycles(mca, model, loop):
    """Cycles of one pass in the steady state."""
    code = "\n".join(l for l in loop if not re.match(r"^\s+(b\.|cbn?z|tbn?z)", l)) + "\n"
    arguments = [mca, "-mtriple=aarch64", f"-mcpu={model}", f"-mattr={FEATURES}", "-iterations=200"]
    report = subprocess.run(arguments, input=code, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"Total Cycles:\s+(\d+)", report).group(1)) / 200


def wanted_loop(found, part, kind, products, group):
    """[(instructions, passes)] of the loop wanted; of several, the one with the most products."""
    symbol, *constants = part.split(":")
    best = []
    for name, lines in found:
        if symbol not in name or (constants and generic_constants(name) != constants):
            continue
        loops = loops_of(lines)
        for start, end in loops:
            inside = [l for l in loops if start <= l[0] and l[1] <= end and l != (start, end)]
            whole = instructions(lines, start, end)
            if not inside:
                parts = [(whole, 1)]
            elif group > 0 and len(inside) == 1:
                inner = instructions(lines, *inside[0])
                rest = instructions(lines, start, inside[0][0] - 1) + instructions(lines, inside[0][1] + 1, end)
                left = group - count(rest, kind) * products
                if count(inner, kind) == 0 or left % (count(inner, kind) * products):
                    continue
                parts = [(inner, left // (count(inner, kind) * products)), (rest, 1)]
            elif group < 0 and len(inside) == 1:
                inner = instructions(lines, *inside[0])
                rest = instructions(lines, start, inside[0][0] - 1) + instructions(lines, inside[0][1] + 1, end)
                parts = [(inner, -group), (rest, 1)]
            else:
                continue
            n = sum(count(l, kind) * times for l, times in parts) * products
            if n > best_products(best, kind, products) and (group <= 0 or n == group):
                best = parts
    return best


def best_products(parts, kind, products):
    return sum(count(l, kind) * times for l, times in parts) * products


def generic_constants(name):
    """The integers among a symbol's generic arguments, as the v0 mangling writes them: Km<hex>_."""
    return [str(int(c, 16)) for c in re.findall(r"K[mj]([0-9a-f]+)_", name)]


def main():
    found = list(functions(sys.argv[1]))
    print("loop,core model,instructions,products,cycles,products per cycle,limit per cycle,share")
    for label, part, kind, products, group in WANTED:
        parts = wanted_loop(found, part, kind, products, group)
        if not parts:
            sys.exit(f"no loop found for {label}")
        n, size = best_products(parts, kind, products), sum(len(l) * times for l, times in parts)
        for model, pipes in MODELS.items():
            if kind not in pipes:
                continue
            c = sum(cycles(sys.argv[2], model, l) * times for l, times in parts)
            limit = pipes[kind] * products
            print(f'"{label}",{model},{size},{n},{c:.1f},{n / c:.2f},{limit},{n / c / limit:.0%}')


main()
