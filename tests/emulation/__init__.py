"""Runs the CUDA kernels without CUDA: the sources of csrc/cuda compiled by g++, behind the real ops.

    with emulation.load().running(seed=1):
        fgbg_cuda.gaussian_kl(mu, logvar)  # on CPU tensors, by the CUDA kernels

- cuda.h, cuda.cpp: the language: threads, barriers, shuffles, launches. Blocks, warps and threads take
  turns in an order drawn from `seed`.
- torch.h, torch.cpp: csrc/eager.cpp and csrc/ops in their CUDA configuration, an extension module that
  stands in for fgbg_cuda._C while running (and its kernels for those of the dispatcher); and an allocator
  that puts every tensor, filled with NaN, next to an inaccessible page.

Two things in the sources are not C++, and are rewritten in the copy that is compiled: a launch, and shared
memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import itertools
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pybind11
import torch
from torch.utils import cpp_extension

from fgbg_cuda.functional import _routes

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "emulation"
# The slowest to compile first.
SOURCES = (
    "torch.cpp",
    "reconstruction_backward.cu",
    "reconstruction_forward.cu",
    "slot_mixture.cu",
    "slot_blend.cu",
    "latents.cu",
    "categorical.cu",
    "reconstruction.cu",
    "scaling.cu",
    "slots.cu",
    "cuda.cpp",
)

_FLAGS = ["-fPIC", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-w"]
_TRAPS = ["-fsanitize=alignment,bounds,integer-divide-by-zero", "-fsanitize-undefined-trap-on-error"]
# As differently from the CPU kernels as g++ can: with contraction, and all that this processor has.
_ARITHMETIC = ["-march=native", "-ffp-contract=fast", "-DFGBG_CUDA_MATH"]
_KERNEL_FLAGS = ["-std=c++17", "-O1", *_ARITHMETIC, *_TRAPS, "-include", HERE / "cuda.h", "-x", "c++"]
_REWRITES = (
    (re.compile(r"([\w:]+(?:<\w+>)?)<<<(.+?)>>>\("), r"emulation::launch(\1, \2)("),
    (re.compile(r"extern __shared__ (\w+) (\w+)\[\];"), r"\1* const \2 = emulation::dynamic_shared<\1>();"),
    (re.compile(r"__shared__ (\w+) (\w+)\[(.+?)\];"), r"\1* const \2 = emulation::shared<\1>(\3);"),
    (re.compile(r"__shared__ (\w+) (\w+);"), r"\1& \2 = emulation::shared_variable<\1>();"),
)


class Emulation:
    """A library of kernels, and the ops that call them."""

    def __init__(self, path: Path):
        self._path = path
        # A name for each, since pybind11 gives back the module it knows by a name.
        name = f"emulation.{path.stem}._C"
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        self._module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(self._module)
        self._library = ctypes.CDLL(str(path))
        self._library.emulation_kernels.restype = ctypes.c_size_t

    @contextlib.contextmanager
    def running(self, seed: int = 0, capturing: bool = False) -> Iterator[None]:
        """Meanwhile the public functions run these kernels, and new tensors lie between guard pages.

        `capturing`: as if the launches were captured into a graph.
        """
        self._library.emulation_start(ctypes.c_uint64(seed), ctypes.c_bool(capturing))
        try:
            with mock.patch.object(_routes, "eager", self._module):
                yield
        finally:
            self._library.emulation_stop()

    def counts(self) -> dict[str, int]:
        """How many kernels, memsets and allocations there were since running() was entered."""
        numbers = (ctypes.c_size_t * 3)()
        self._library.emulation_counts(numbers)
        return dict(zip(("launches", "memsets", "allocations"), numbers, strict=True))

    def spoilt(self) -> int:
        """How many tensors, freed since the last call, had been written to outside their bounds."""
        return self._library.emulation_spoilt()

    @functools.cached_property
    def _symbols(self) -> dict[int, str]:
        lines = subprocess.check_output(["nm", "-C", self._path], text=True).splitlines()
        symbols = {int(a, 16): name for a, _, name in (s.split(" ", 2) for s in lines if s[0] != " ")}
        start = next(a for a, name in symbols.items() if name == "emulation_start")
        base = ctypes.cast(self._library.emulation_start, ctypes.c_void_p).value - start
        return {base + a: name for a, name in symbols.items()}

    def kernels(self) -> set[str]:
        """The instantiated kernels: name<type, elements per thread, ...>."""
        return {n for n in map(_kernel_name, self._symbols.values()) if n}

    def kernels_run(self) -> set[str]:
        """Those that were launched since running() was last entered."""
        room = 1000
        addresses = (ctypes.c_void_p * room)()
        count = self._library.emulation_kernels(addresses, ctypes.c_size_t(room))
        return {_kernel_name(self._symbols[a]) for a in addresses[:count]}


def _kernel_name(symbol: str) -> str:
    match = re.search(r"(\w+_kernel<.+>)\(fgbg::\w+Args\)$", symbol)
    return match[1].replace("fgbg::", "").replace("math::portable::", "") if match else ""


def load(changes: Mapping[str, tuple[str, str]] | None = None, seen_by: str = "") -> Emulation:
    """Builds what is not built yet. `changes` plants defects, {file: (text, other text)}, in a copy of the
    sources that only the kernels of the file `seen_by` are compiled from."""
    return _load(tuple((changes or {}).items()), seen_by)


@functools.cache
def _load(changes: tuple[tuple[str, tuple[str, str]], ...], seen_by: str) -> Emulation:
    plain, changed = _sources({}), _sources(dict(changes))
    jobs = [_command(name, changed if name == seen_by else plain) for name in SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(_run, jobs))
    paths = [a for p in cpp_extension.library_paths() for a in ("-L", p, f"-Wl,-rpath,{p}")]
    link = ["g++", "-shared", "-Wl,-Bsymbolic", *objects, *paths, "-lc10", "-ltorch_cpu", "-ltorch_python"]
    return Emulation(_run((link, BUILD / f"{_hash(link)}.so")))


@functools.cache
def _texts() -> dict[Path, str]:
    """The sources as they were at first, should they be edited meanwhile."""
    return {p.relative_to(CSRC): p.read_text() for p in sorted(CSRC.rglob("*.*"))}


def _sources(changes: dict[str, tuple[str, str]]) -> Path:
    """A copy of csrc that g++ understands, in a folder named after its content."""
    BUILD.mkdir(parents=True, exist_ok=True)
    texts = dict(_texts())
    for file, (before, after) in changes.items():
        assert texts[Path(file)].count(before) == 1, f"{file} has not one {before!r}"
        texts[Path(file)] = texts[Path(file)].replace(before, after)
    folder = BUILD / _hash(itertools.chain(*texts.items(), *_REWRITES))
    if folder.exists():
        return folder
    unfinished = Path(tempfile.mkdtemp(dir=BUILD))
    for path, text in texts.items():
        if path.parts[0] == "cuda":
            for pattern, replacement in _REWRITES:
                text = pattern.sub(replacement, text)
        (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / path).write_text(text)
    # Empty in the place of those of torch, which want the CUDA toolkit; torch.h has what is used of them.
    (unfinished / "c10/cuda").mkdir(parents=True)
    for name in ("Exception", "GraphsC10Utils", "Guard", "Stream"):
        (unfinished / f"c10/cuda/CUDA{name}.h").touch()
    (unfinished / "ATen/cuda").mkdir(parents=True)
    (unfinished / "ATen/cuda/CUDAGeneratorImpl.h").touch()
    with contextlib.suppress(OSError):  # another process was faster
        unfinished.rename(folder)
    return folder


def _command(name: str, sources: Path) -> tuple[list, Path]:
    """How an object is compiled, and its path, which is named after all that it depends on."""
    headers = [p for p in sorted(sources.rglob("*.*")) if p.suffix in (".h", ".cuh")]
    if name == "torch.cpp":
        paths = [*cpp_extension.include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
        includes = [a for p in paths for a in ("-isystem", p)]
        command = ["-std=c++20", "-include", HERE / "torch.h", "-I", sources, *includes, HERE / name]
        parts = [sources / "eager.cpp", sources / "cpu/caching_allocator.cpp"]
        depends = [*headers, *parts, *sorted((sources / "ops").glob("*.cpp")), *sorted(HERE.glob("*.*"))]
    elif name == "cuda.cpp":
        command = ["-std=c++17", "-O1", HERE / name]
        depends = sorted(HERE.glob("cuda.*"))
    else:
        command = [*_KERNEL_FLAGS, sources / "cuda" / name]
        depends = [*headers, sources / "cuda" / name, HERE / "cuda.h"]
    command = ["g++", "-c", *_FLAGS, *command]
    key = [str(a).replace(str(sources), "") for a in command] + [p.read_text() for p in depends]
    return command, BUILD / f"{Path(name).stem}-{_hash([torch.__version__, *key])}.o"


def _run(job: tuple[list, Path]) -> Path:
    """Makes the file unless it is there."""
    command, path = job
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}{path.suffix}")
        done = subprocess.run([*map(str, command), "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, done.args))}\n{done.stderr}")
        unfinished.replace(path)
    return path


def _hash(parts: Iterable[object]) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
