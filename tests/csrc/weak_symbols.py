"""Fails where a kernel's object file shares a function with the rest of the program.

A kernel file is compiled once for each instruction set. An inline function in it is a weak symbol,
of which the linker keeps one copy for everybody: perhaps the one that uses AVX-512, and the program
dies on a machine without it. So these object files may define nothing weak. ctest runs this.
"""

from __future__ import annotations

import subprocess
import sys

objects = sys.argv[1:]
if not objects:
    sys.exit("usage: weak_symbols.py OBJECT...")
shared = []
for path in objects:
    said = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
    for line in said.stdout.splitlines():
        kind, _, name = line[17:].partition(" ")
        # DW.ref.* is a pointer for the exception tables, the same whatever the instruction set.
        if kind in ("V", "W", "u") and line[:16].strip() and not name.startswith("DW.ref."):
            shared.append(f"{path}: {name}")
if shared:
    print(*shared, sep="\n")
    sys.exit(
        "error: these are shared with code for other instruction sets; give them internal linkage"
        " (an anonymous namespace, static) or keep them out of *_kernel.cpp"
    )
print(f"nothing weak in {len(objects)} object files")
