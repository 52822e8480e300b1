"""Reports registers and stack of every CUDA kernel in the built extension, and fails where a float32
kernel (half precision runs in the same ones) uses local memory, that is spills or a stack frame, or where
a vector kernel does not load and store 16 bytes at a time.

    python tools/check_cuda_binary.py path/to/_C.so

Needs cuobjdump: on PATH, or the one that triton (which a CUDA torch depends on) ships.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

NAME = re.compile(r"(\w+_kernel)<(\w+)(?:, (\d+))?(?:, [\w:]*::(\w+), [^>]*\)(\d))?>")
COMPOSITIONS = ("masked", "blended", "mixture")


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def lines(*args: str) -> Iterator[str]:
    tool = cuobjdump()
    # cuobjdump looks for nvdisasm on PATH; triton ships both side by side.
    env = {"PATH": f"{Path(tool).parent}:/usr/local/bin:/usr/bin:/bin"}
    with subprocess.Popen(
        [tool, *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise SystemExit(f"cuobjdump {' '.join(args)} failed")


@functools.cache
def readable(mangled: str) -> str:
    """For instance "backward_kernel float V=4 Gaussian masked"."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    match = NAME.search(name)
    if not match:
        raise SystemExit(f"a kernel whose name is not understood: {name}")
    kernel, dtype, width, likelihood, composition = match.groups()
    parts = [kernel, dtype]
    if width:
        parts.append(f"V={width}")
    if likelihood:
        parts += [likelihood, COMPOSITIONS[int(composition)]]
    return " ".join(parts)


def resources(binary: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(architecture, kernel) -> (registers, bytes of stack and local memory)."""
    out, arch, kernel = {}, "", ""
    for line in lines("-res-usage", binary):
        if line.startswith("arch ="):
            arch = line.split("=")[1].strip()
        elif "Function " in line:
            kernel = readable(line.split("Function ")[1].strip().rstrip(":"))
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            out[arch, kernel] = (numbers["REG"], numbers["STACK"] + numbers["LOCAL"])
    return out


def accesses(binary: str, arch: str) -> dict[str, Counter]:
    """kernel -> how many global loads (LDG) and stores (STG) of each width in bits its code has."""
    out: dict[str, Counter] = defaultdict(Counter)
    kernel = ""
    for line in lines("-sass", "-arch", arch, binary):
        if "Function :" in line:
            kernel = readable(line.split(":")[1].strip())
        else:
            match = re.search(r"\b(LDG|STG)\.E\S*?(?:\.(64|128|U8|U16))?(?:\.CONSTANT)?\s", line)
            if match:
                out[kernel][f"{match[1]}.{match[2] or 32}"] += 1
    return out


def main() -> None:
    binary = sys.argv[1]
    failures = []
    table = resources(binary)
    print(f"{'kernel':58} {'arch':7} {'registers':>9} {'stack':>6}")
    for (arch, kernel), (registers, stack) in sorted(table.items(), key=lambda item: item[0][::-1]):
        print(f"{kernel:58} {arch:7} {registers:9} {stack:6}")
        if stack and "double" not in kernel:
            failures.append(f"{kernel} ({arch}) uses {stack} bytes of local memory")
    archs = sorted({arch for arch, _ in table})
    for arch in archs:
        for kernel, counts in sorted(accesses(binary, arch).items()):
            if not re.search("V=[48]", kernel):
                continue
            # normal_kernel reads nothing but its seed.
            wanted = ("STG.128",) if kernel.startswith("normal_kernel") else ("LDG.128", "STG.128")
            for access in wanted:
                if not counts[access]:
                    failures.append(f"{kernel} ({arch}) has no {access}: {dict(counts)}")
    print(f"{len(table)} kernels for {', '.join(archs)}")
    for width in ("V=4", "V=8"):
        if not any(width in kernel for _, kernel in table):
            failures.append(f"there is no kernel with {width}")
    if failures:
        raise SystemExit("\n".join(failures))
    print("No float32 or half kernel uses local memory; every vector kernel moves 16 bytes at a time.")


if __name__ == "__main__":
    main()
