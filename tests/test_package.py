"""The package as a newcomer meets it: import, documentation that runs, typed names, clear failures."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import shutil
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import pytest
import torch
from tools import make_wheel

import fgbg_cuda
from fgbg_cuda import functional, nn
from fgbg_cuda.functional import _routes

PACKAGE = Path(fgbg_cuda.__file__).parent
ROOT = Path(__file__).parent.parent


def _run(code: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, with the package at ``path`` if one is given."""
    prefix = "import sys; "
    if path is not None:
        # The import hook of an editable install comes before any path.
        prefix += "sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
        prefix += f"sys.path.insert(0, {str(path)!r}); "
    return subprocess.run([sys.executable, "-c", prefix + code], capture_output=True, text=True, cwd="/")


def test_every_docstring_example_holds():
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    names = {"torch": torch, "fgbg_cuda": fgbg_cuda}
    functions = [name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))]
    for name in functions:
        examples = [t for t in finder.find(getattr(functional, name), name, globs=names) if t.examples]
        assert examples, f"{name} has no example"
        for test in examples:
            runner.run(test)
    assert runner.summarize().failed == 0


def test_public_names_are_documented_and_typed():
    assert (PACKAGE / "py.typed").exists()
    for name in functional.__all__:
        public = getattr(functional, name)
        assert public.__doc__, name
        if inspect.isfunction(public):
            hints = typing.get_type_hints(public)
            assert set(inspect.signature(public).parameters) <= set(hints), name
            assert "return" in hints, name
    for name in nn.__all__:
        assert getattr(nn, name).__doc__, name


def test_the_readme_example_trains():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    scope: dict = {}
    exec(code, scope)
    pixels, latents = 3 * 8 * 8, 4
    encode = torch.nn.Linear(pixels, 2 * latents)
    decode = torch.nn.Linear(latents, 2 * pixels + 64)

    def decoder(z):
        fg, bg, logits = decode(z).split((pixels, pixels, 64), dim=1)
        return fg.view(-1, 3, 8, 8), bg.view(-1, 3, 8, 8), logits.view(-1, 1, 8, 8)

    loss = scope["loss_of"](lambda x: encode(x.flatten(1)), decoder, torch.rand(5, 3, 8, 8))
    loss.backward()
    for parameter in (*encode.parameters(), *decode.parameters()):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_the_core_imports_without_the_extras():
    extras = ("lightning", "tensorboard", "matplotlib", "skimage", "sklearn", "mlxtend")
    block = "".join(f"sys.modules[{name!r}] = None; " for name in extras)
    result = _run(
        block + "import fgbg_cuda, torch; print(fgbg_cuda.gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2)))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "tensor(1.)"


def test_the_import_leaves_the_compiler_unloaded():
    """It takes longer to load than all the rest; whoever compiles loads it, and gets right answers."""
    lines = (
        "import sys, torch, fgbg_cuda",
        "x = torch.ones(2, 3)",
        "kl = lambda x: fgbg_cuda.gaussian_kl(x, torch.zeros_like(x))",
        "print(kl(x).item(), 'torch._dynamo' in sys.modules)",
        "tangent = lambda x: torch.func.jvp(kl, (x,), (x,))[1]",
        "compiled = torch.compile(tangent, fullgraph=True, backend='eager')",
        "print(compiled(x).item(), 'torch._dynamo' in sys.modules)",
    )
    result = _run("\n".join(lines))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["1.5 False", "3.0 True"]


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """The Python side of the package where nothing compiled stands beside it."""
    ignored = shutil.ignore_patterns("*.so", "_build.py", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fgbg_cuda", ignore=ignored)
    return tmp_path


def test_another_torch_is_named_in_one_sentence(copied_package: Path):
    (copied_package / "fgbg_cuda/_build.py").write_text('TORCH_VERSION = "1.2.3+cpu"\n')
    result = _run("import fgbg_cuda", copied_package)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fgbg_cuda was built for torch 1.2.3+cpu"), last
    assert torch.__version__ in last
    # pip and uv keep the wheel of a commit, and would install it again.
    assert "--no-build-isolation --no-cache-dir --no-deps --force-reinstall" in last
    assert "--no-cache --reinstall-package" in last
    troubleshooting = (ROOT / "docs/troubleshooting.md").read_text()
    commands = re.findall("`(.*?) SOURCE`", last)
    assert len(commands) == 2
    assert all(command in troubleshooting for command in commands)


def test_an_unbuilt_package_says_how_to_build_it(copied_package: Path):
    # With torch there already, the folders of what is installed are not needed any more.
    gone = (
        "import torch, os; sys.path = [p for p in sys.path if not os.path.exists(p + '/fgbg_cuda/_build.py')]"
    )
    result = _run(f"{gone}; import fgbg_cuda", copied_package)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fgbg_cuda is not built"), last


def test_sources_that_hide_an_installed_package_are_named(copied_package: Path, tmp_path: Path):
    installed = tmp_path / "site-packages/fgbg_cuda"
    installed.mkdir(parents=True)
    (installed / "_build.py").touch()
    result = _run(f"sys.path.insert(1, {str(installed.parent)!r}); import fgbg_cuda", copied_package)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: fgbg_cuda is read from its sources in {copied_package}/fgbg_cuda"
    ), last
    assert f"hide the installed package {installed}: start Python in another folder" in last


def test_build_info_says_what_runs():
    info = fgbg_cuda.build_info()
    assert info["torch"] == torch.__version__
    assert info["cpu_capability"] in ("portable", "avx2", "avx512")
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)
    torch_has_cuda_in_vain = torch.version.cuda is not None and info["cuda"] is None
    assert (info["cuda_missing"] is not None) == torch_has_cuda_in_vain


MISSING = "torch 9.9.9+cu130 has CUDA but no nvcc was found"


@pytest.fixture
def without_cuda_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_routes, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(_routes, "CUDA_MISSING", MISSING)
    _routes.warn_without_cuda_kernels.cache_clear()
    yield
    _routes.warn_without_cuda_kernels.cache_clear()


def test_a_cuda_tensor_without_kernels_is_told_of_once(without_cuda_kernels):
    device = torch.device("cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert _routes.traced_op("gaussian_kl", device) is None
        assert _routes.traced_op("reparameterize", device) is None
        assert _routes.traced_op("gaussian_kl", torch.device("meta")) is None
    assert [(w.category, str(w.message)) for w in caught] == [(UserWarning, MISSING)]


def test_a_cuda_tensor_without_kernels_is_told_of_while_compiling(without_cuda_kernels):
    def without_op(x):
        return x + 1 if _routes.traced_op("gaussian_kl", torch.device("cuda")) is None else x

    with pytest.warns(UserWarning, match=re.escape(MISSING)):
        y = torch.compile(without_op, fullgraph=True, backend="eager")(torch.zeros(1))
    assert y == 1


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def _choose_cuda(path: Path, torch_cuda: str, **options: str) -> tuple[str, str]:
    """What cmake/ChooseCuda.cmake decides where ``path`` holds the nvcc: what was chosen, and the error."""
    cmake = _tool("cmake")
    assert cmake, "cmake is one of the build tools"
    options = {"TORCH_VERSION": f"9.9.9+{torch_cuda}", "TORCH_CUDA": torch_cuda, **options}
    result = subprocess.run(
        [cmake, *(f"-D{k}={v}" for k, v in options.items()), "-P", str(ROOT / "cmake/ChooseCuda.cmake")],
        capture_output=True,
        text=True,
        env={"PATH": f"{path}:/usr/bin:/bin", "CUDA_HOME": str(path)},
    )
    assert (result.returncode == 0) == (not result.stderr), result
    return result.stdout, " ".join(result.stderr.split())


@pytest.fixture
def nvcc_12(tmp_path: Path) -> Path:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 12.4, V12.4.99"\n')
    nvcc.chmod(0o755)
    return tmp_path


def test_cuda_kernels_are_built_where_torch_and_nvcc_agree(nvcc_12: Path):
    chosen, _ = _choose_cuda(nvcc_12, "12.8")
    assert f"nvcc: {nvcc_12}/nvcc, kernels: ON, missing: \n" in chosen
    chosen, _ = _choose_cuda(nvcc_12, "12.8", FGBG_CUDA="OFF")
    assert "kernels: OFF, missing: torch 9.9.9+12.8 has CUDA but" in chosen
    assert "built with FGBG_CUDA=OFF" in chosen


def test_without_nvcc_only_the_cpu_kernels_are_built(tmp_path: Path):
    chosen, _ = _choose_cuda(tmp_path, "13.0", NVCC="")
    assert "kernels: OFF, missing: torch 9.9.9+13.0 has CUDA but no nvcc was found" in chosen
    assert "put nvcc of CUDA 13 on PATH" in chosen
    _, error = _choose_cuda(tmp_path, "13.0", NVCC="", FGBG_CUDA="ON")
    assert "FGBG_CUDA is ON and torch 9.9.9+13.0 has CUDA but no nvcc was found" in error


def test_nvcc_of_another_major_version_is_an_error_that_names_both(nvcc_12: Path):
    for options in ({}, {"FGBG_CUDA": "ON"}):
        _, error = _choose_cuda(nvcc_12, "13.0", **options)
        assert f"torch 9.9.9+13.0 has CUDA 13.0 but {nvcc_12}/nvcc is of CUDA 12.4" in error
        assert "FGBG_CUDA=OFF" in error
    chosen, _ = _choose_cuda(nvcc_12, "13.0", FGBG_CUDA="OFF")
    assert "kernels: OFF" in chosen


def test_a_torch_without_cuda_gets_cpu_kernels(nvcc_12: Path):
    chosen, _ = _choose_cuda(nvcc_12, "")
    assert "kernels: OFF, missing: \n" in chosen
    _, error = _choose_cuda(nvcc_12, "", FGBG_CUDA="ON")
    assert "has no CUDA" in error


def _configuring_stops(path: Path, **environment: str) -> str:
    """The error with which cmake refuses to go on, before anything is compiled."""
    if not (_tool("cmake") and _tool("ninja") and _tool("g++")):
        pytest.skip("cmake, ninja and g++ are needed to configure a build")
    options = [
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    result = subprocess.run(
        [_tool("cmake"), *options, "-S", str(ROOT), "-B", str(path / "build")],
        capture_output=True,
        text=True,
        env={**variables, "CXX": "g++", **environment},
    )
    assert result.returncode != 0
    return " ".join(result.stderr.split())


def test_another_compiler_than_gcc_is_refused(tmp_path: Path):
    # What cmake takes for clang.
    version = {"": 1, "major__": 17, "minor__": 0, "patchlevel__": 0}
    clang = " ".join(f"-D__clang_{name or '_'}={number}" for name, number in version.items())
    error = _configuring_stops(tmp_path, CXX=f"g++ {clang}")
    assert "fgbg_cuda is built with g++ but the C++ compiler here is Clang" in error
    assert "set CXX=g++" in error


@pytest.mark.parametrize("variable", ["CXXFLAGS", "LDFLAGS"])
@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-funsafe-math-optimizations"])
def test_flags_that_break_arithmetic_are_refused(tmp_path: Path, variable: str, flag: str):
    error = _configuring_stops(tmp_path, **{variable: f"-g {flag}"})
    assert f"take {flag} out of CXXFLAGS and LDFLAGS" in error


@pytest.mark.skipif(_tool("g++") is None, reason="needs g++")
@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-ffinite-math-only", "-fno-signed-zeros", ""])
def test_the_kernels_do_not_compile_with_flags_that_break_arithmetic(flag: str):
    kept = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]  # those of CMakeLists.txt
    command = ["g++", *kept, *flag.split(), "-fsyntax-only", "-x", "c++", str(ROOT / "csrc/math/config.h")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert ("relies on IEEE arithmetic" in result.stderr) == bool(flag)


@pytest.mark.parametrize(
    ("package", "cure"), [("pybind11", 'pip install "pybind11>='), ("torch", "Install torch")]
)
def test_what_the_build_needs_of_python_is_named(tmp_path: Path, package: str, cure: str):
    (tmp_path / f"{package}.py").write_text("raise ImportError('is not there')")
    error = _configuring_stops(tmp_path, PYTHONPATH=str(tmp_path))
    assert "ImportError: is not there" in error
    assert cure in error


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Folders of sources without sources, and two environments, of which one is of the Makefile's making."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("benchmarks", "examples", "python", "tests", "tools", "runs", "build", "theirs", "ours"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    (tmp_path / "ours/made-by-fgbg_cuda").touch()
    return tmp_path


def _make(path: Path, *arguments: str) -> subprocess.CompletedProcess:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    variables = {k: v for k, v in os.environ.items() if "VENV" not in k and "MAKE" not in k}
    return subprocess.run(
        ["make", "-C", str(path), *arguments], env=variables, capture_output=True, text=True
    )


def test_cleaning_leaves_what_others_made(checkout: Path):
    result = _make(checkout, "clean", "VENV=theirs", "CUDA_VENV=ours")
    assert result.returncode == 0, result.stderr
    assert (checkout / "runs/file").exists()  # trained models
    assert (checkout / "theirs/file").exists()
    assert not (checkout / "ours").exists()
    assert not (checkout / "build").exists()


@pytest.mark.parametrize("target", ["test", "floor"])
def test_an_environment_of_others_is_not_installed_into(checkout: Path, target: str):
    result = _make(checkout, target, "VENV=theirs", "FLOOR_VENV=theirs")
    assert result.returncode != 0
    assert "theirs was not made by this Makefile and is left alone" in result.stdout
    assert [path.name for path in (checkout / "theirs").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("torch_version", "cuda", "ending"),
    [
        ("2.13.0+cpu", None, "pt213cpu"),
        ("2.11.0", "13.0", "pt211cu130"),
        ("2.9.1+cu128", "12.8", "pt29cu128"),
    ],
)
def test_a_wheel_is_named_after_its_torch(torch_version: str, cuda: str | None, ending: str):
    text = make_wheel.for_one_torch((ROOT / "pyproject.toml").read_text(), torch_version, cuda)
    assert re.search(rf'^version = "\d+\.\d+\.\d+\+{ending}"$', text, flags=re.MULTILINE)
    release = torch_version.partition("+")[0]
    assert f'dependencies = ["torch=={release}", ' in text
