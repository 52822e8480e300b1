"""The verdict on a machine with an NVIDIA GPU: the tests on CUDA, compute-sanitizer over a short run of every
kernel, the benchmark; one JSON with the machine and every result, and the benchmark's own beside it. Exits
with 0 only if all passed.

    python tools/gpu_check.py [OUT.json]        (`make gpu-check` builds first)
"""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

import fgbg_cuda

SECONDS = 460  # for everything: with the start of python and the writing of the result, eight minutes


def run(name: str, command: list[str], limit: float) -> dict:
    print(f"--- {name}", flush=True)
    started = time.monotonic()
    try:
        code = subprocess.run(command, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = 124
    return {"name": name, "exit_code": code, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    if not torch.cuda.is_available() or fgbg_cuda.build_info()["cuda"] is None:
        raise SystemExit("gpu_check needs a GPU that torch sees and a build with CUDA kernels")
    gpu = torch.cuda.get_device_name()
    today = datetime.date.today().isoformat()
    default = f"benchmarks/results/{gpu.replace(' ', '-')}-{today}.json"
    out = Path(sys.argv[1] if len(sys.argv) > 1 else default)
    out.parent.mkdir(parents=True, exist_ok=True)
    steps = []
    started = time.monotonic()
    bench = out.with_name(f"{out.stem}-benchmark.json")  # kept beside, with its plots
    bench.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch, "junit.xml")
        python = [sys.executable, "-m"]
        # The tests of the training package and of the emulation say nothing about a GPU.
        silent = {
            Path("tests", f"test_{name}.py") for name in ("cuda_kernels", "fuzz", "benchmarks", "examples")
        }
        silent |= {p for p in Path("tests").glob("test_*.py") if "vae" in p.read_text()}
        skip = [f"--ignore={path}" for path in sorted(silent)]
        steps.append(run("tests", [*python, "pytest", "tests", *skip, f"--junitxml={junit}"], 220))
        if shutil.which("compute-sanitizer"):
            for tool in ("memcheck", "racecheck"):
                command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
                command += [sys.executable, "tools/every_kernel.py"]
                steps.append(run(tool, command, 60))
        else:
            steps.append(
                {"name": "compute-sanitizer", "exit_code": None, "seconds": 0, "note": "not installed"}
            )
        # What the others left of the time; the benchmark starts no case in the last half minute of it.
        left = SECONDS - (time.monotonic() - started)
        command = [*python, "benchmarks", "determinism", "ops", "step", "growth", "--device", "cuda"]
        command += ["--budget", str(left - 30), "--out", str(bench)]
        steps.append(run("benchmark", command, left))
        counts = ElementTree.parse(junit).getroot().find("testsuite").attrib if junit.exists() else {}
        figures = json.loads(bench.read_text()) if bench.exists() else None
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    passed = all(step["exit_code"] in (0, None) for step in steps)
    result = {
        "passed": passed,
        "date": today,
        "gpu": gpu,
        "driver": driver,
        "torch": torch.__version__,
        "build": fgbg_cuda.build_info(),
        "steps": steps,
        "tests": {key: counts.get(key) for key in ("tests", "failures", "errors", "skipped", "time")},
        "benchmark": figures,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    for step in steps:
        print(f"{step['name']:18} {step.get('note') or ('passed' if step['exit_code'] == 0 else 'FAILED')}")
    print(f"wrote {out}")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
