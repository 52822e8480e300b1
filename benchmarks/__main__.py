"""Times forward + backward of every case for every peer, interleaved in one run, and prints medians.

    python -m benchmarks [--device cpu|cuda] [--dtype float32] [--quick] [--out results.json]

Peers are plain PyTorch (eager) and torch.compile of the same function. Each peer's result is compared
with ours before anything is timed. GB/s counts the bytes a perfect fused kernel would move, against the
copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

import fgbg_cuda

from .cases import Case, cases


def step(function: Callable, inputs: list[torch.Tensor]) -> Callable[[], Any]:
    wanted = [t for t in inputs if t.requires_grad]
    return lambda: torch.autograd.grad(function(*inputs), wanted)


def check(case: Case, name: str, function: Callable) -> None:
    """A peer that computes something else is not a peer."""
    if not case.comparable:
        return
    ours, theirs = case.ours(*case.inputs), function(*case.inputs)
    eps = torch.finfo(case.inputs[0].dtype).eps
    # A sum of n rounded values is off by up to eps * sqrt(n) relative, if their signs agree.
    n = case.inputs[0].numel()
    if not torch.isclose(ours.float(), theirs.float(), rtol=4 * eps * n**0.5, atol=0):
        raise AssertionError(f"{case.name} {case.size}: {name} gives {theirs}, ours {ours}")


def measure(functions: dict[str, Callable[[], Any]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Seconds per call; one block of every peer in turn, so that drift of the machine meets all."""
    timers = {name: Timer("f()", globals={"f": f}) for name, f in functions.items()}
    numbers = {}
    for name, timer in timers.items():
        timer.timeit(2)  # warm-up: compilation, first touch
        once = timer.timeit(3).mean
        numbers[name] = max(1, int(seconds / rounds / once))
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(numbers[name]).mean)
    return times


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, counting what is read and what is written."""
    source = torch.rand(64 * 2**20, device=device)
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, 1.0, 5)["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(times)


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quick", action="store_true", help="smallest sizes, short: a function check")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    seconds, rounds = (0.05, 2) if args.quick else (0.5, 7)

    bandwidth = copy_bandwidth(args.device)
    machine = {
        "device": processor(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "build": fgbg_cuda.build_info(),
        "date": datetime.date.today().isoformat(),
        "dtype": args.dtype,
        "copy_gb_per_s": bandwidth / 1e9,
    }
    print(json.dumps(machine, indent=2))
    columns = ("ours", "/eager", "/compile", "GB/s", "of copy")
    print(f"{'forward + backward':24} {'size':18}" + "".join(f"{c:>9}" for c in columns))
    rows = []
    for case in cases(getattr(torch, args.dtype), args.device, args.quick):
        torch._dynamo.reset()
        peers = {"eager": case.eager, "compile": torch.compile(case.eager)}
        for name, peer in peers.items():
            check(case, name, peer)
        functions = {"ours": step(case.ours, case.inputs)}
        functions |= {name: step(peer, case.inputs) for name, peer in peers.items()}
        times = measure(functions, seconds, rounds)
        median = {name: statistics.median(t) for name, t in times.items()}
        rate = case.perfect_bytes / median["ours"]
        rows.append(
            {
                "case": case.name,
                "size": case.size,
                "seconds": median,
                "spread": {name: [min(t), max(t)] for name, t in times.items()},
                "perfect_bytes": case.perfect_bytes,
            }
        )
        print(
            f"{case.name:24} {'x'.join(map(str, case.size)):18}{median['ours'] * 1e6:7.0f}us"
            f"{median['eager'] / median['ours']:8.1f}x{median['compile'] / median['ours']:8.1f}x"
            f"{rate / 1e9:9.1f}{rate / bandwidth:9.0%}",
            flush=True,
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
