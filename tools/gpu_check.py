"""What a machine with an NVIDIA GPU is asked, in parts that run alone and in any order:

    build      this package, for the GPU that is present (at most 90 s on 16 cores)
    tests      the tests of the ops on CUDA, by several processes (120 s)
    bandwidth  ours, eager and a copy at the largest sizes, every op, float32 and bfloat16 (60 s)
    peers      torch.compile, Triton and CUDA graphs on a few cases, small sizes, a training step (120 s)
    sanitizer  compute-sanitizer over a short run of every kernel (90 s)

    python tools/gpu_check.py [PART ...] --out FOLDER       (default: all, in this order)

A part writes FOLDER/PART.log and FOLDER/PART.json as it goes, beside what its commands write there; one
that fails does not stop the next. FOLDER/verdict.json lists every part that the folder has results of. Exits
with 0 only if all that was asked passed. Needs the build tools, pytest, pytest-xdist and hypothesis alone.

--rehearse runs the same commands where there is no GPU: on the CPU, small, and with the CUDA kernels
emulated. Its results mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Command:
    name: str
    words: list[str]
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)


def python(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def build(out: Path, rehearse: bool) -> list[Command]:
    if rehearse:
        return [Command("import", python("-c", "import fgbg_cuda; print(fgbg_cuda.build_info())"), 60)]
    import torch

    major, minor = torch.cuda.get_device_capability()
    words = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--force-reinstall"]
    words += ["-C", "cmake.define.FGBG_CUDA=ON", "-C", "build-dir=build/gpu", "."]
    cores = str(os.cpu_count())
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "CMAKE_BUILD_PARALLEL_LEVEL": cores}
    return [Command("install", python(*words), 200, environment)]


def tests_of_ops() -> list[Path]:
    """The test files with something to say about a GPU: not those of the training package."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    texts = {file: file.read_text() for file in files}
    asks = re.compile(r"def test_\w+\([^)]*\bdevice\b|pytest\.mark\.gpu")
    return [file for file, text in texts.items() if asks.search(text) and "vae" not in text]


def tests(out: Path, rehearse: bool) -> list[Command]:
    words = ["-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]
    # In a rehearsal some are enough: `make emulate` is all.
    emulated = ["-n", "2", "--devices", "emulated", "-k", "value"]
    words += emulated if rehearse else ["-n", "8", "--dist", "worksteal", "--devices", "cuda"]
    return [Command("pytest", python(*words, *tests_of_ops()), 240)]


def _benchmark(out: Path, rehearse: bool, *sections: str, budget: int) -> Command:
    words = ["-m", "benchmarks", *sections, "--out", out / f"{sections[0]}-figures.json", "--budget", budget]
    words += ["--device", "cpu", "--quick"] if rehearse else ["--device", "cuda"]
    return Command(" ".join(sections), python(*words), budget + 40)


def bandwidth(out: Path, rehearse: bool) -> list[Command]:
    return [_benchmark(out, rehearse, "bandwidth", budget=60)]


def peers(out: Path, rehearse: bool) -> list[Command]:
    return [_benchmark(out, rehearse, "peers", "small", "step", "determinism", budget=100)]


def sanitizer(out: Path, rehearse: bool) -> list[Command]:
    every_kernel = python(ROOT / "tools" / "every_kernel.py", *(["--emulated"] if rehearse else []))
    if rehearse:
        return [Command("every kernel", every_kernel, 280)]
    tool = shutil.which("compute-sanitizer") or "compute-sanitizer"
    # torch's own kernels, and its probing of what the driver can do, are not ours to check.
    ours = ["--kernel-name", "kns=fgbg", "--report-api-errors", "no", "--error-exitcode", "1"]
    # Each tensor in memory of its own, so that what is beyond it is nobody's.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tools = {"memcheck": alone, "racecheck": {}, "synccheck": {}}
    return [Command(t, [tool, "--tool", t, *ours, *every_kernel], 80, env) for t, env in tools.items()]


PARTS: dict[str, Callable[[Path, bool], list[Command]]] = {
    "build": build,
    "tests": tests,
    "bandwidth": bandwidth,
    "peers": peers,
    "sanitizer": sanitizer,
}


def run(command: Command, log: Path) -> dict:
    print(f"--- {command.name}", flush=True)
    started = time.monotonic()
    with log.open("a") as file:
        file.write(f"$ {' '.join(command.words)}\n")
        file.flush()
        try:
            # In a session of its own: what runs out of time goes with all that it has started.
            with subprocess.Popen(
                command.words,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | command.environment,
                start_new_session=True,
            ) as process:
                try:
                    code = process.wait(command.limit)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    code = 124
        except OSError as error:  # not installed
            file.write(f"{error}\n")
            code = 127
    return {"command": command.name, "exit_code": code, "seconds": round(time.monotonic() - started, 1)}


def run_part(name: str, out: Path, rehearse: bool) -> bool:
    """Runs the commands of a part and writes what came of each at once."""
    log = out / f"{name}.log"
    log.write_text("")
    result: dict = {"part": name, "rehearsed": rehearse, "commands": [], "passed": False}
    try:
        commands = PARTS[name](out, rehearse)
    except Exception as error:  # the next part may work
        commands, result["error"] = [], f"{type(error).__name__}: {error}"
    for command in commands:
        result["commands"].append(run(command, log))
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    result["passed"] = bool(commands) and all(c["exit_code"] == 0 for c in result["commands"])
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result["passed"]


def machine() -> dict:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    about = "import json, torch, fgbg_cuda; print(json.dumps([torch.__version__, fgbg_cuda.build_info()]))"
    known = subprocess.run(python("-c", about), capture_output=True, text=True, cwd=ROOT / "tests").stdout
    date = datetime.date.today().isoformat()
    return {"date": date, "gpu": found, "package": json.loads(known) if known else None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU; the results mean nothing")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}, expected some of {list(PARTS)}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    passed = []
    about = {}
    for name in args.parts or list(PARTS):
        passed.append(run_part(name, out, args.rehearse))
        about = about or machine()
        found = [json.loads(f.read_text()) for f in (out / f"{name}.json" for name in PARTS) if f.exists()]
        (out / "verdict.json").write_text(json.dumps({**about, "parts": found}, indent=1) + "\n")
    for part in found:
        seconds = sum(c["seconds"] for c in part["commands"])
        print(f"{part['part']:10} {'passed' if part['passed'] else 'FAILED'} {seconds:6.1f} s")
    print(f"wrote {out}")
    raise SystemExit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
