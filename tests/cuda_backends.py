"""The attention backends that tests on a GPU compare."""

from __future__ import annotations

import importlib.util

# Without the package, torch's flash kernels are what runs: a test that needs another would fail for no fault.
CUDA_BACKENDS = ["sdpa", *(["flash_attn"] if importlib.util.find_spec("flash_attn") else [])]
