"""The package as a newcomer meets it: import, documentation that runs, typed names, clear failures."""

from __future__ import annotations

import doctest
import inspect
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import fgbg_cuda
from fgbg_cuda import functional, nn

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
    extras = ("lightning", "tensorboard", "matplotlib", "torchmetrics", "skimage", "mlxtend")
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
    assert "pip install" in last


def test_an_unbuilt_package_says_how_to_build_it(copied_package: Path):
    result = _run("import fgbg_cuda", copied_package)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fgbg_cuda is not built"), last


def test_build_info_says_what_runs():
    info = fgbg_cuda.build_info()
    assert info["torch"] == torch.__version__
    assert info["cpu_capability"] in ("portable", "avx2", "avx512")
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)
