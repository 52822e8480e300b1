"""tools/gpu_check.py where there is no GPU: its parts are rehearsed, so that no slip costs a rented hour."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What the machine has: a bare one, with torch for CUDA, the build tools and these.
THERE = {"torch", "numpy", "pybind11", "pytest", "hypothesis", "triton", "xdist", "fgbg_cuda"}


def _check():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import gpu_check
    finally:
        sys.path.pop(0)
    return gpu_check


def _imported(path: Path) -> set[str]:
    """The top-level packages a file needs: not those that it tries to import."""
    tree = ast.parse(path.read_text())
    tried = {node for t in ast.walk(tree) if isinstance(t, ast.Try) for node in ast.walk(t)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in tried:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


def test_all_that_is_imported_is_there():
    files = [*_check().tests_of_ops(), *(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    files += [*(ROOT / "tests").glob("[!t]*.py"), *(ROOT / "tests" / "emulation").glob("*.py")]
    files += [p for p in (ROOT / "python/fgbg_cuda").glob("*.py") if p.name != "__main__.py"]
    left_out = {"fit_polynomials.py", "docs_site.py", "plots.py", "ome_files.py"}  # not part of it
    local = {p.stem for p in (ROOT / "tests").glob("*.py")} | {"emulation", "benchmarks", "check_cuda_binary"}
    missing = {
        f"{path.name}: {name}"
        for path in files
        if path.name not in left_out
        for name in _imported(path) - THERE - local
    }
    assert not missing


def test_the_tests_are_those_of_the_ops():
    names = {path.name for path in _check().tests_of_ops()}
    assert {"test_cuda.py", "test_values.py", "test_layouts.py", "test_errors.py"} <= names
    assert not {"test_vae.py", "test_cli.py", "test_cuda_kernels.py"} & names


def test_a_rehearsal_runs_every_part(tmp_path):
    command = [sys.executable, "tools/gpu_check.py", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    logs = {path.name: path.read_text()[-2000:] for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, (done.stdout, logs)
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert [part["part"] for part in verdict["parts"]] == list(_check().PARTS)
    assert all(part["passed"] and part["rehearsed"] for part in verdict["parts"])
    assert verdict["package"][1]["torch"]
    figures = json.loads((tmp_path / "bandwidth-figures.json").read_text())
    assert {row["dtype"] for row in figures["sections"]["bandwidth"]} == {"float32", "bfloat16"}
    assert {"peers", "small", "step"} <= set(
        json.loads((tmp_path / "peers-figures.json").read_text())["sections"]
    )


def test_a_part_that_fails_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    check = _check()

    def broken(out, rehearse):
        return [check.Command("no such program", ["fgbg-no-such-program"], 5)]

    def without_commands(out, rehearse):
        raise RuntimeError("no GPU")

    def sound(out, rehearse):
        return [check.Command("fine", check.python("-c", "print(1)"), 60), check.Command("late", check.python(
            "-c", "import time; time.sleep(9)"), 0.5)]  # fmt: skip

    monkeypatch.setattr(check, "PARTS", {"a": broken, "b": without_commands, "c": sound})
    monkeypatch.setattr(check, "machine", dict)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        check.main()
    assert exit.value.code == 1
    a, b, c = json.loads((tmp_path / "verdict.json").read_text())["parts"]
    assert [command["exit_code"] for command in a["commands"]] == [127]
    assert b["error"] == "RuntimeError: no GPU"
    assert [command["exit_code"] for command in c["commands"]] == [0, 124]
    assert not any(part["passed"] for part in (a, b, c))
    assert "FAILED" in capsys.readouterr().out
