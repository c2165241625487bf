"""Finds the kernels' inner loops in the compiler's assembly and asks llvm-mca for their cycles.

python3 loops.py ASSEMBLY LLVM_MCA > loops.csv

A loop is a stretch of code that a backward branch closes and no other backward branch divides. Of
each function named below, the loop with the most instructions of the wanted kind is taken. The limit
is what the model's vector pipes allow for the multiplications alone; its share says how much of the
loop's cycles they fill, as the model schedules it from L1.
"""
import re
import subprocess
import sys

# (label, part of the symbol, instruction whose loop is wanted, products in one of them)
WANTED = [
    ("f32 tile 8x8", "neon_table7nt_item", "fmla", 4),
    ("int8 tile 4x8, codes of few bits", "neon_table7nt_item", "smlal", 8),
    ("int8 tile 4x8, codes of 8 bits", "neon_table7nn_item", "smull", 8),
    ("int8 tile 8x8, sdot", "dotprod_table7nt_item", "sdot", 16),
    ("int8 tile 8x8, smmla", "i8mm_table7nt_item", "smmla", 32),
    ("dot_rows Q4_0, neon", "dot_kernel_neon:2:18:4", "smlal", 8),
    ("dot_rows Q4_1, neon", "dot_kernel_neon:3:20:4", "smlal", 8),
    ("dot_rows Q4_K, neon", "dot_kernel_neon:12:144:4", "smlal", 8),
    ("dot_rows Q4_0, dotprod", "dot_kernel_dotprod:2:18:4", "sdot", 16),
    ("dot_rows Q4_1, dotprod", "dot_kernel_dotprod:3:20:4", "sdot", 16),
    ("dot_rows Q4_K, dotprod", "dot_kernel_dotprod:12:144:4", "sdot", 16),
]
# Model of the core: its scheduler in LLVM, and 128-bit multiplications a cycle it has for each kind.
# LLVM knows the Cortex-A72 by its A57 model and the Cortex-A76 best by that of the Neoverse N1, which
# is the same core for servers; i8mm's first cores are those of the Neoverse N2.
MODELS = {
    "cortex-a72": {"fmla": 1, "smlal": 1, "smull": 1},
    "neoverse-n1": {"fmla": 2, "smlal": 1, "smull": 1, "sdot": 2},
    "neoverse-n2": {"fmla": 2, "smlal": 1, "smull": 1, "sdot": 2, "smmla": 2},
}
FEATURES = "+neon,+dotprod,+i8mm"


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


def inner_loops(lines):
    """Stretches of code from a label to the branch back to it, with no other backward branch inside."""
    labels = {}
    loops = []
    for at, line in enumerate(lines):
        label = re.match(r"^(\.L\w+):", line)
        if label:
            labels[label.group(1)] = at
        branch = re.match(r"^\s+(?:b\.?\w*|cbn?z|tbn?z)\s.*?(\.L\w+)$", line)
        if branch and branch.group(1) in labels:
            start = labels[branch.group(1)]
            if not any(start <= other < at for other, _ in loops):
                loops.append((start, at))
    for start, end in loops:
        yield [l for l in lines[start + 1 : end + 1] if re.match(r"^\s+[a-z]", l)]


def count(loop, kind):
    kinds = {"smlal": ("smlal", "smlal2", "smull", "smull2")}
    kinds = {**kinds, "smull": kinds["smlal"]}.get(kind, (kind,))
    return sum(l.split()[0] in kinds for l in loop)


def cycles(mca, model, loop):
    """Cycles of one pass in the steady state."""
    code = "\n".join(l for l in loop if not re.match(r"^\s+(b\.|cbn?z|tbn?z)", l)) + "\n"
    arguments = [mca, "-mtriple=aarch64", f"-mcpu={model}", f"-mattr={FEATURES}", "-iterations=200"]
    report = subprocess.run(arguments, input=code, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"Total Cycles:\s+(\d+)", report).group(1)) / 200


def wanted_loop(found, part, kind):
    symbol, *constants = part.split(":")
    loops = []
    for name, lines in found:
        if symbol in name and all(f"{int(c):x}" in name for c in constants):
            if not constants or generic_constants(name) == constants:
                loops += inner_loops(lines)
    return max(loops, key=lambda l: count(l, kind), default=None)


def generic_constants(name):
    """The integers of a symbol's generic arguments, as the v0 mangling writes them: Km<hex>_."""
    legacy = re.findall(r"K[mj]([0-9a-f]+)_", name)
    return [str(int(c, 16)) for c in legacy]


def main():
    found = list(functions(sys.argv[1]))
    print("loop,core model,instructions,products,cycles,products per cycle,limit per cycle,share")
    for label, part, kind, products in WANTED:
        loop = wanted_loop(found, part, kind)
        if loop is None:
            sys.exit(f"no loop found for {label}")
        for model, pipes in MODELS.items():
            if kind not in pipes:
                continue
            n, c = count(loop, kind) * products, cycles(sys.argv[2], model, loop)
            limit = pipes[kind] * products
            print(f"{label},{model},{len(loop)},{n},{c:.1f},{n / c:.2f},{limit},{n / c / limit:.0%}")


main()
