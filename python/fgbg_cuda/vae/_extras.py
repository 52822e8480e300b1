"""Says in one sentence that the extras are not installed, before something else says it in many."""

from importlib.util import find_spec

NAMES = (
    "lightning",
    "jsonargparse",
    "tensorboard",
    "matplotlib",
    "skimage",
    "tifffile",
    "imagecodecs",
    "sklearn",
    "tqdm",
)

if missing := [name for name in NAMES if find_spec(name) is None]:
    raise ImportError(
        f'fgbg_cuda.vae needs the extras: pip install "fgbg_cuda[train]" (missing: {", ".join(missing)})'
    )
