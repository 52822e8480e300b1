"""Checks the machine code of every CUDA kernel in the built extension for what its speed rests on:

- no float32 or half-precision kernel uses local memory (spills, or a stack frame), but for a few bytes
  outside of the loop;
- vector kernels load and store 16 bytes at a time (8, where they take half precision four at a time);
- registers (that is, the warps that a multiprocessor has room for), instructions and accesses of the loop
  that does the work are no worse than tools/cuda_limits.json says, which --write writes anew;
- nor does it wait for one load of a step before the next is under way, but where that file says so ("waits").

And that the CUDA runtime is the one that torch has loaded: a second one would keep a state of its own.

    python tools/check_cuda_binary.py path/to/_C.so [--write]

Needs cuobjdump: on PATH, or the one that triton (which a CUDA torch depends on) ships.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

LIMITS = Path(__file__).with_name("cuda_limits.json")
LIMITS_ARCH = "sm_90"
SLACK = 1.05  # another patch release of nvcc may do a little worse
THREADS = 256  # of a block
NAME = re.compile(
    r"(\w+_kernel)<(?:[\w:]*::Format<)?(\w+)(?:, (\d), (?:[\w:]*::)?(\w+)>)? ?"
    r"(?:, (true|false))?(?:, (true|false))?(?:, [\w:]*::(LogSpread<\d>|Std))?"
    r"(?:, [\w:]*::(\w+)(?:, [^>]*\)(\d))?(?:, (true|false))?)? ?>"
)
# What the first flag of a kernel says; of the others, whether there are draws.
FLAGS = {
    "log_prob_kernel": ("gradients", "no gradients"),
    "categorical_kernel": ("with a prior", "uniform"),
}
SECOND_FLAGS = {"gaussian_forward_kernel": ("kl", "no kl"), "gaussian_backward_kernel": ("kl", "no kl")}
SPREADS = {"LogSpread<1>": "logvar", "LogSpread<2>": "log_std", "Std": "std"}
COMPOSITIONS = ("masked", "blended", "mixture", "mixture", "plain")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x([0-9a-f]{16}) \*/")
ENCODING = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


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
    """For instance "backward_kernel float V=4 of Any, Gaussian masked"."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    # Of kernels that take weights and maps of scales.
    plain = re.sub(r"[\w:]*::WithMaps<([\w:]*::Format<[^<>]*>) ?>", r"\1", name)
    match = NAME.search(plain)
    if not match:
        raise SystemExit(f"a kernel whose name is not understood: {name}")
    kernel, dtype, width, storage, flag, second_flag, spread, likelihood, composition, last_flag = (
        match.groups()
    )
    parts = [kernel, dtype, *(["with maps"] if plain != name else [])]
    if width:
        parts += [f"V={width}", "of", storage]
    on, off = FLAGS.get(kernel, ("draws", "no draws"))
    if flag:
        parts.append(on if flag == "true" else off)
    on, off = SECOND_FLAGS.get(kernel, ("gradients", "no gradients"))
    if second_flag:
        parts.append(on if second_flag == "true" else off)
    if spread:
        parts.append(SPREADS[spread])
    if likelihood:
        parts.append(likelihood)
    if composition:
        parts.append(COMPOSITIONS[int(composition)])
    if last_flag:
        parts.append("gradients" if last_flag == "true" else "no gradients")
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


@dataclass
class Instruction:
    address: int
    text: str
    control: int  # the upper half of its encoding, which holds the control code

    @property
    def sets_barrier(self) -> int:
        """The barrier that its result is waited for at; 7 is none."""
        return self.control >> 46 & 7

    @property
    def waits_for(self) -> int:
        """A bit for each barrier."""
        return self.control >> 52 & 63

    def accesses(self, kind: str) -> bool:
        return re.match(rf"(@!?U?P\d+ )?{kind}\b", self.text) is not None

    @functools.cached_property
    def target(self) -> int | None:
        match = re.search(r"\bBRA\S* (?:!?U?P\w+, )?`?\(?(0x[0-9a-f]+)", self.text)
        return int(match[1], 16) if match else None


def code(binary: str, arch: str) -> dict[str, list[Instruction]]:
    out: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in lines("-sass", "-arch", arch, binary):
        if "Function :" in line:
            current = out.setdefault(readable(line.split(":")[1].strip()), [])
        elif match := INSTRUCTION.search(line):
            current.append(Instruction(int(match[1], 16), match[2], 0))
        elif (match := ENCODING.match(line)) and current:
            current[-1].control = int(match[1], 16)
    return out


def bits(kernel: str) -> int:
    """Of the wide loads and stores of a kernel."""
    return 64 if re.search("V=4 of b?f16", kernel) else 128


def work_loop(instructions: list[Instruction], bits: int) -> list[Instruction]:
    """The innermost of the loops with the most wide loads or stores."""
    wide = [i.text.count(f"LDG.E.{bits}") + i.text.count(f"STG.E.{bits}") for i in instructions]
    before = [0, *itertools.accumulate(wide)]  # how many there are ahead of each instruction
    place = {i.address: k for k, i in enumerate(instructions)}
    loops = []
    for last, i in enumerate(instructions):
        first = place.get(i.target) if i.target is not None else None
        if first is not None and first <= last:
            loops.append((before[first] - before[last + 1], last - first, first, last))
    _, _, first, last = min(loops, default=(0, 0, 0, -1))
    return instructions[first : last + 1]


def waits_between_loads(loop: list[Instruction], bits: int) -> str | None:
    """The instruction that waits for one of the wide loads of a step while another is still to come."""
    loads = [k for k, i in enumerate(loop) if i.accesses("LDG") and f".{bits}" in i.text]
    # A step's loads stand together; a loop that loads a step ahead, or twice, has several such groups.
    for first, second in itertools.pairwise(loads):
        if second - first > 40:
            continue
        barrier = loop[first].sets_barrier
        for i in loop[first + 1 : second]:
            if barrier < 6 and i.waits_for >> barrier & 1:
                return i.text
    return None


@dataclass
class Figures:
    registers: int
    warps: int  # resident on a multiprocessor
    instructions: int  # of the loop that does the work
    loads: int  # wide ones, in it
    stores: int
    waits: int  # 1 if it waits for one load of a step before the next is under way


def figures(registers: int, loop: list[Instruction], bits: int) -> Figures:
    room = 65536 // ((registers + 7) // 8 * 8 * THREADS)
    wide = [i for i in loop if f".{bits}" in i.text]
    loads, stores = (sum(i.accesses(kind) for i in wide) for kind in ("LDG", "STG"))
    waits = int(waits_between_loads(loop, bits) is not None)
    return Figures(registers, min(64, room * THREADS // 32), len(loop), loads, stores, waits)


def worse(found: Figures, limit: dict[str, int]) -> list[str]:
    least = ("instructions", "loads", "stores", "waits")
    out = [f"{name} {value}, was {limit[name]}" for name, value in asdict(found).items()
           if name in least and value > SLACK * limit[name]]  # fmt: skip
    return out + ([f"warps {found.warps}, were {limit['warps']}"] if found.warps < limit["warps"] else [])


def local_memory(kernel: str, stack: int, loop: list[Instruction]) -> str | None:
    """What is wrong with its use of local memory. float64 is for checking and may spill; the others may keep
    a few bytes there that their loop does not touch."""
    if "double" in kernel or not stack:
        return None
    if stack <= 48 and not any(i.accesses("LDL") or i.accesses("STL") for i in loop):
        return None
    return f"uses {stack} bytes of local memory"


def check_access(kernel: str, instructions: list[Instruction]) -> list[str]:
    # normal_kernel reads nothing, and a forward kernel that sums writes nothing but in the general case.
    wanted = ["STG"] if kernel.startswith("normal_kernel") else ["LDG", "STG"]
    wide = f".{bits(kernel)}"
    return [k for k in wanted if not any(i.accesses(k) and wide in i.text for i in instructions)]


def shares_the_runtime(binary: str) -> bool:
    dynamic = subprocess.run(["readelf", "--dynamic", binary], capture_output=True, text=True, check=True)
    return re.search(r"NEEDED.*\[libcudart\.so", dynamic.stdout) is not None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("binary")
    parser.add_argument("--write", action="store_true", help="the limits, as they are now")
    args = parser.parse_args()
    failures = []
    if not shares_the_runtime(args.binary):
        failures.append("a CUDA runtime is linked statically, beside torch's")
    table = resources(args.binary)
    archs = sorted({arch for arch, _ in table})
    limits = json.loads(LIMITS.read_text()) if LIMITS.exists() and not args.write else {}
    now: dict[str, dict[str, int]] = {}
    print(f"{'kernel':64} {'arch':6} {'registers':>9} {'warps':>6} {'stack':>6} {'loop':>6}")
    for arch in archs:
        for kernel, instructions in sorted(code(args.binary, arch).items()):
            registers, stack = table[arch, kernel]
            loop = work_loop(instructions, bits(kernel))
            found = figures(registers, loop, bits(kernel))
            print(f"{kernel:64} {arch:6} {registers:9} {found.warps:6} {stack:6} {len(loop):6}")
            where = f"{kernel} ({arch})"
            if text := local_memory(kernel, stack, loop):
                failures.append(f"{where} {text}")
            if not re.search("V=[48] of (float|bf16|f16)", kernel):
                continue
            for access in check_access(kernel, instructions):
                failures.append(f"{where} has no {access} of {bits(kernel) // 8} bytes")
            if arch == LIMITS_ARCH:
                now[kernel] = asdict(found)
                if kernel in limits:
                    failures += [f"{where}: {text}" for text in worse(found, limits[kernel])]
                elif not args.write:
                    failures.append(f"{where} has no limits: write them with --write")
    print(f"{len(table)} kernels for {', '.join(archs)}")
    if args.write:
        LIMITS.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        print(f"wrote {LIMITS}")
    if failures:
        raise SystemExit("\n".join(failures))
    print("No float32 or half kernel uses local memory in its loop; vector kernels move 16 or 8 bytes.")


if __name__ == "__main__":
    main()
