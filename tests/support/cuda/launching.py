"""Launches of single kernels on the host, and matrices for them."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from kvrun import _core
from kvrun.cuda import abi
from kvrun.cuda.abi import PANEL, TYPE_IDS
from support.cuda.host_device import compiled

JUNK = 0xFF  # NaN as a float, -1 as a number
SUPER_TYPES = ("q4_k", "q6_k")
SHAPES = [(40, 576), (33, 100), (16, 577), (1, 1), (20, 1100), (7, 31)]
SUPER_SHAPES = [(40, 256), (16, 768), (17, 1280)]
CASES = [(kind, *shape) for kind in _core.WEIGHT_TYPES for shape in (SUPER_SHAPES if kind in SUPER_TYPES else SHAPES)]


@cache
def kernels(module):
    """Launchers by name."""
    text = abi.source(module)
    library = compiled(module, text)
    return {name: getattr(library, f"launch_{name}") for name in abi.kernel_names(text)}


def run(module, launch):
    args = (ctypes.c_void_p * len(launch.args))(*(a.ctypes.data for a in launch.args))
    kernels(module)[launch.kernel](
        *map(ctypes.c_uint, (*launch.grid, *launch.block)), ctypes.c_size_t(launch.shared), args
    )


def aligned(n_bytes):
    """uint8 [n_bytes] of junk, aligned like a GPU's memory."""
    raw = np.full(n_bytes + 256, JUNK, np.uint8)
    return raw[-raw.ctypes.data % 256 :][:n_bytes]


def array(values, dtype=np.float32):
    """A copy of an array in aligned memory."""
    values = np.asarray(values, dtype)
    copy = aligned(values.nbytes).view(dtype).reshape(values.shape)
    copy[...] = values
    return copy


def empty(*shape, dtype=np.float32):
    """Junk in aligned memory."""
    return aligned(int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)


def at(a):
    """Its address; 0 for None."""
    return 0 if a is None else a.ctypes.data


class Matrices:
    """An abi.MATRIX, `struct`, of tensors that share an input. `values`: float32 [rows, cols] of each, as stored."""

    def __init__(self, tensors, biases=None):
        """tensors: (type, float32 [rows, cols]) of each segment. biases: float32 [rows] of each, or None."""
        self.struct, self.values, self._kept, offset = (
            abi.struct(abi.MATRIX, n_segments=len(tensors)),
            [],
            [],
            0,
        )
        for i, (kind, weights) in enumerate(tensors):
            rows, cols = weights.shape
            packed = array(_core.pack(kind, weights), np.uint8)
            bias = None if biases is None else array(biases[i])
            self._kept += [packed, bias]
            self.values.append(_core.unpack(kind, packed, rows, cols))
            panels = -(-rows // PANEL)
            self.struct["segments"][0, i] = (
                at(packed),
                at(bias),
                _core.packed_size(kind, PANEL, cols),
                TYPE_IDS[kind],
                rows,
                panels,
                offset,
            )
            self.struct["cols"], offset = cols, offset + PANEL * panels
        self.struct["panels"], self.struct["width"] = offset // PANEL, offset
        self.cols, self.width = int(self.struct["cols"][0]), offset


def norm_of(kind, n, rng):
    """(abi.NORM, what it does in float64, its memory): kind "rms", "layer" or None."""
    if kind is None:
        return abi.struct(abi.NORM), lambda x: x.astype(np.float64), None
    weight, bias = array(1 + rng.normal(0, 0.3, n)), array(rng.normal(0, 0.3, n))
    layer = kind == "layer"
    struct = abi.struct(abi.NORM, weight=at(weight), bias=at(bias) if layer else 0, eps=1e-5, layer_norm=layer)

    def reference(x):
        x = x.astype(np.float64)
        if layer:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight
        return x + bias if layer else x

    return struct, reference, (weight, bias)


def close(actual, expected, tolerance):
    """Within a tolerance relative to the largest expected value."""
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30)
