#!/usr/bin/env python3
"""Holds the Swift code against engraft.h, for want of a Swift compiler: every function, type and constant
that it names exists, every call has as many arguments as the header says, every field of a struct exists; and
every function and every setting of the header is used.

    targets/ios/check.py              checks Sources, and this checker with bad code
    targets/ios/check.py --functions  prints the header's functions, one a line

It sees names and counts, not types: a compiler is still wanted.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADER = HERE.parent / "capi" / "include" / "engraft.h"

# What the wrapper does without.
UNWRAPPED = set()
UNSET = {"struct_size", "reserved"}


def main():
    header = Header(HEADER.read_text())
    if sys.argv[1:] == ["--functions"]:
        print("\n".join(sorted(header.functions)))
        return 0
    files = sorted((HERE / "Sources").rglob("*.swift"))
    if not files:
        sys.exit("no Swift files were found")
    findings, called, fields = [], set(), []
    for file in files:
        file_findings, file_called, file_fields = check(file.read_text(), header, file.name)
        findings += file_findings
        called |= file_called
        fields += file_fields
    for name in sorted(set(header.functions) - called - UNWRAPPED):
        findings.append(f"{name}: no Swift code calls it")
    for struct in (name for name in header.structs if name.endswith("_params")):
        unset = header.structs[struct] - UNSET - {field for of, field in fields if of == struct}
        findings += [f"{struct}.{field}: no Swift code sets it" for field in sorted(unset)]
    findings += blindness(header)
    for finding in findings:
        print(finding, file=sys.stderr)
    print(
        f"{len(files)} Swift files: {len(called)} of {len(header.functions)} functions called, "
        f"{len(fields)} uses of fields, {len(findings)} findings"
    )
    return 1 if findings else 0


class Header:
    """Functions with their number of arguments, structs with their fields, other types, constants."""

    def __init__(self, text):
        text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.S)
        self.constants = set(re.findall(r"#define\s+(ENGRAFT_\w+)\s+\S", text))
        self.types = set(re.findall(r"typedef\s+struct\s+(engraft_\w+)\s+\1\s*;", text))
        self.types |= set(re.findall(r"\(\*(engraft_\w+)\)", text))
        self.structs = {}
        for body, name in re.findall(r"typedef\s+struct\s*\{(.*?)\}\s*(engraft_\w+)\s*;", text, flags=re.S):
            self.structs[name] = set(re.findall(r"(\w+)(?:\[\d+\])?\s*;", body))
        self.functions = {}
        function = re.compile(r"^u?int32_t\s+(engraft_\w+)\s*\(([^;]*)\)\s*;", flags=re.M)
        for name, arguments in function.findall(text):
            self.functions[name] = 0 if arguments.strip() == "void" else arguments.count(",") + 1
        if not (len(self.functions) > 50 and len(self.structs) > 10 and len(self.constants) > 50):
            sys.exit(f"{HEADER}: not understood")


def check(swift, header, name):
    """Findings, the functions called, and the fields used, each with its struct."""
    code = without_comments_and_texts(swift)
    findings, called, fields = [], set(), []

    def find(at, what):
        findings.append(f"{name}:{code.count(chr(10), 0, at) + 1}: {what}")

    for match in re.finditer(r"\bENGRAFT_\w+", code):
        if match[0] not in header.constants:
            find(match.start(), f"{match[0]} is no constant")
    for match in re.finditer(r"\bengraft_\w+", code):
        word = match[0]
        if word in header.functions:
            called.add(word)
            given = arguments(code, match.end())
            if given is None:
                find(match.start(), f"{word} is named without being called")
            elif given != header.functions[word]:
                find(match.start(), f"{word} takes {header.functions[word]} arguments, not {given}")
        elif word not in header.structs and word not in header.types:
            find(match.start(), f"{word} is not in the header")
    for variable, struct, begin, end in variables(code, header):
        use = re.compile(rf"(?<![\w.]){variable}\.(?:pointee\.)?(?!pointee\b)(\w+)")
        for match in use.finditer(code, begin, end):
            fields.append((struct, match[1]))
            if match[1] not in header.structs[struct]:
                find(match.start(), f"{struct} has no field {match[1]}")
    return findings, called, fields


def without_comments_and_texts(swift):
    """The code with as many lines. What texts interpolate goes with them: nothing of the header is there."""
    pattern = r'//[^\n]*|/\*.*?\*/|"""(?:.*?)"""|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), swift, flags=re.S)


def arguments(code, at):
    """The number of arguments of the call whose bracket is at `at`; nothing where there is none."""
    if code[at : at + 1] != "(":
        return None
    depth, commas, empty = 0, 0, True
    for letter in code[at:]:
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth == 0:
                return 0 if empty else commas + 1
        elif letter == "," and depth == 1:
            commas += 1
        if depth > 0 and not letter.isspace() and not (depth == 1 and letter == "("):
            empty = False
    return None


def variables(code, header):
    """Variables and parameters of a struct's type, and the part of the code in which they are seen."""
    declared = r"\b(?:var|let)\s+(\w+)\s*(?:=\s*(?:try\s+defaults\(\s*)?(?=\w+\(\))|:\s*)(engraft_\w+)"
    parameter = r"(?<!var )(?<!let )\b(\w+)\s*:\s*(?:inout\s+)?(?:Unsafe(?:Mutable)?Pointer<)?(engraft_\w+)\b"
    for match in re.finditer(declared, code):
        if match[2] in header.structs:
            yield match[1], match[2], match.end(), block_end(code, match.end())
    for match in re.finditer(parameter, code):
        if match[2] in header.structs:
            body = code.find("{", match.end())
            yield match[1], match[2], match.end(), block_end(code, body + 1) if body >= 0 else len(code)


def block_end(code, at):
    """Where the block ends that `at` is in."""
    depth = 0
    for i in range(at, len(code)):
        depth += {"{": 1, "}": -1}.get(code[i], 0)
        if depth < 0:
            return i
    return len(code)


def blindness(header):
    """What this checker fails to see in code that is wrong, or complains of in code that is right."""
    right = """
        // engraft_made_up() in a comment, and "engraft_made_up()" in a text
        func f(_ p: engraft_progress) -> UInt64 { p.step }
        func g() throws {
            var params = try defaults(engraft_train_params()) { engraft_train_default_params($0, $1) }
            params.rank = 1
            try handle.call { engraft_trainer_step($0, f(1, 2)) }
            _ = engraft_abi_version() + ENGRAFT_OK
        }
        func h(_ params: Other) { params.anything = 1 }
    """
    wrong = {
        "try handle.call { engraft_made_up($0) }": "engraft_made_up is not in the header",
        "engraft_trainer_step(trainer)": "engraft_trainer_step takes 2 arguments, not 1",
        "engraft_trainer_step(trainer, f(1, 2), 3)": "engraft_trainer_step takes 2 arguments, not 3",
        "engraft_abi_version(1)": "engraft_abi_version takes 0 arguments, not 1",
        "let free = engraft_model_free": "engraft_model_free is named without being called",
        "let code = ENGRAFT_MADE_UP": "ENGRAFT_MADE_UP is no constant",
        "func f() { var params = engraft_train_params(); params.made_up = 1 }":
            "engraft_train_params has no field made_up",
        "func f() { var p = try defaults(engraft_data_params()) { g($0) }; p.made_up = 1 }":
            "engraft_data_params has no field made_up",
        "func f() { var p: engraft_data_params = try g(); p.made_up = 1 }":
            "engraft_data_params has no field made_up",
        "func f(_ p: UnsafePointer<engraft_progress>) { g(p.pointee.made_up) }":
            "engraft_progress has no field made_up",
    }
    findings, _, fields = check(right, header, "right")
    missed = [f"check.py finds fault with right code: {finding}" for finding in findings]
    if fields != [("engraft_train_params", "rank"), ("engraft_progress", "step")]:
        missed.append(f"check.py sees these fields: {fields}")
    for code, finding in wrong.items():
        if check(code, header, "wrong")[0] != [f"wrong:1: {finding}"]:
            missed.append(f"check.py does not find that {finding}: {check(code, header, 'wrong')[0]}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
