"""Models on an NVIDIA GPU (docs/cuda.md). CuPy, the only thing it needs, is imported when a device is opened."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvrun.errors import OptionError

if TYPE_CHECKING:
    from kvrun.cuda.device import CudaDevice

INSTALL = "pip install 'kvrun[cuda]' for a driver of CUDA 13, 'kvrun[cuda12]' for one of CUDA 12"


def open_device(memory_limit: int | None = None) -> CudaDevice:
    """The current CUDA device. OptionError that says in one line what is missing: CuPy, a driver, a device."""
    try:
        importlib.import_module("cupy")
    except ImportError as error:
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded: {error}"
        raise OptionError(f"device: cuda needs CuPy, which {reason} ({INSTALL})") from None
    from kvrun.cuda.device import CudaDevice

    return CudaDevice(memory_limit)
