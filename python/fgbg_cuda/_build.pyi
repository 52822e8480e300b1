"""Of the module that CMake writes when the package is built."""

TORCH_VERSION: str
CUDA_MISSING: str | None
