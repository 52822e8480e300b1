"""Writes a wheel whose version and requirement name the torch that it is built for, and prints its path:

    python tools/make_wheel.py --out dist      # dist/fgbg_cuda-0.2.0+pt213cpu-cp311-cp311-linux_x86_64.whl

A binary runs with one version of torch alone. So the wheel requires that one, where the sources take any that
is new enough. It is built from an sdist, which is tried on the way.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def local_version(torch_version: str, cuda: str | None) -> str:
    """How the wheel's version ends: pt213cpu for torch 2.13.0, pt211cu130 for torch 2.11.0 with CUDA 13.0."""
    major, minor = torch_version.split(".")[:2]
    return f"pt{major}{minor}" + ("cpu" if cuda is None else "cu" + cuda.replace(".", ""))


def for_one_torch(pyproject: str, torch_version: str, cuda: str | None) -> str:
    """The text of pyproject.toml, bound to one torch."""
    release = torch_version.partition("+")[0]
    changes = (
        (r'^(version = "[^"+]*)"', rf'\1+{local_version(torch_version, cuda)}"'),
        (r'^(dependencies = \["torch)>=[^"]*"', rf'\1=={release}"'),
    )
    for pattern, replacement in changes:
        pyproject, count = re.subn(pattern, replacement, pyproject, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"pyproject.toml has {count} lines of the form {pattern}, expected 1")
    return pyproject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheel")
    out = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        build = "import sys, scikit_build_core.build as b; print(b.build_sdist(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", build, folder], cwd=ROOT, check=True, stdout=sys.stderr)
        (archive,) = Path(folder).glob("*.tar.gz")
        shutil.unpack_archive(archive, folder)
        (source,) = (path for path in Path(folder).iterdir() if path.is_dir())
        pyproject = source / "pyproject.toml"
        pyproject.write_text(for_one_torch(pyproject.read_text(), torch.__version__, torch.version.cuda))
        pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v"]
        subprocess.run([*pip, "--wheel-dir", out, source], check=True, stdout=sys.stderr)
        version = re.search(r'^version = "(.*)"$', pyproject.read_text(), flags=re.MULTILINE)[1]
    (wheel,) = out.glob(f"fgbg_cuda-{version}-cp{sys.version_info.major}{sys.version_info.minor}-*.whl")
    print(wheel)


if __name__ == "__main__":
    main()
