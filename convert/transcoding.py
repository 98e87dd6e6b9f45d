"""GGML's types that kvrun has not, in types of ours that hold the same values: every number stays what it is.

A value is scale * whole number in all of these. Where a type of ours has the same scale and that number among its
codes, raw blocks are rewritten as raw blocks, and no value passes through a float.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

EXACT = {"q3_k": "q6_k", "iq4_nl": "q8_0", "mxfp4": "q8_0", "tq1_0": "q4_0", "tq2_0": "q4_0"}
"""A type of GGML's: the type of ours that holds its values."""

_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""The values of 4-bit codes: llama.cpp's table of IQ4_NL; those of MXFP4 doubled (OCP Microscaling Formats 1.0)."""


def transcoded(kind: str, raw: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows of type `kind` as rows of type EXACT[kind]: uint8 [rows, bytes] of both. The second result is the number of
    blocks that had to be rounded, which only MXFP4 can have: there are scales that no float16 holds."""
    width, rewrite = _REWRITE[kind]
    blocks, rounded = rewrite(raw.reshape(-1, width))
    return blocks.reshape(len(raw), -1), rounded


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Codes of blocks of 32, byte j having those of columns j and 16 + j: uint8 [blocks, 16] to [blocks, 32]."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _iq4_nl(blocks: np.ndarray) -> tuple[np.ndarray, int]:
    """d (float16), 16 bytes of codes."""
    codes = _IQ4_NL[_nibbles(blocks[:, 2:])]
    return np.concatenate([blocks[:, :2], codes.view(np.uint8)], axis=1), 0


def _mxfp4(blocks: np.ndarray) -> tuple[np.ndarray, int]:
    """Exponent e (d = 2**(e - 128), as the numbers are doubled), 16 bytes of codes.

    Of a larger d than float16 holds, three powers of 2 can go to the codes. Of a smaller one they come from the codes,
    which are rounded where they are odd: by 3e-8 at most.
    """
    codes = _E2M1[_nibbles(blocks[:, 1:])].astype(np.float32)
    exponent = blocks[:, :1].astype(np.int32) - 128
    held = np.clip(exponent, -24, 15)
    exact = np.ldexp(codes, np.clip(exponent - held, -127, 3))
    if (exponent - held)[codes.any(axis=1)].max(initial=0) > 3:
        raise OverflowError("MXFP4 holds a scale that is too large for q8_0")
    codes = np.rint(exact)
    scale = np.ldexp(np.float16(1), held).astype(np.float16)
    rounded = int((codes != exact).any(axis=1).sum())
    return np.concatenate([scale.view(np.uint8), codes.astype(np.int8).view(np.uint8)], axis=1), rounded


def _q3_k(blocks: np.ndarray) -> tuple[np.ndarray, int]:
    """256 high bits, 256 codes of two bits, sixteen scales of six bits, d (float16); a value is
    d * (scale - 32) * (code - 4). In Q6_K it is d * scale * (code - 32)."""
    high, low, packed, d = np.split(blocks, [32, 96, 108], axis=1)
    bits = np.arange(8, dtype=np.uint8)
    codes = 28 + (low.reshape(-1, 2, 1, 32) >> bits[:8:2, None] & 3).reshape(-1, 256)
    codes += (high[:, None] >> bits[:, None] & 1).reshape(-1, 256) << 2
    scales = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    scales |= (packed[:, None, 8:] >> bits[:8:2, None] & 3).reshape(-1, 16) << 4
    # Of 128 codes, byte j of 64 has the low nibbles of j and 64 + j, byte j of 32 the high pairs of j, 32 + j, ...
    nibbles = (codes & 15).reshape(-1, 2, 2, 64)
    pairs = (codes >> 4).reshape(-1, 2, 4, 32)
    parts = (
        (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(-1, 128),
        (pairs[:, :, 0] | pairs[:, :, 1] << 2 | pairs[:, :, 2] << 4 | pairs[:, :, 3] << 6).reshape(-1, 64),
        (scales - np.uint8(32)),
        d,
    )
    return np.concatenate(parts, axis=1), 0


def _ternary(kind: str) -> Callable[[np.ndarray], tuple[np.ndarray, int]]:
    """256 numbers -1, 0 and 1 and d (float16), packed in threes' powers or in pairs of bits; eight blocks of Q4_0."""

    def rewrite(blocks: np.ndarray) -> tuple[np.ndarray, int]:
        import gguf

        ones = blocks.copy()
        ones[:, -2:] = np.array([1], np.float16).view(np.uint8)  # values with d = 1 are the numbers
        numbers = gguf.quants.dequantize(ones, gguf.GGMLQuantizationType[kind.upper()])
        codes = (numbers + 8).astype(np.uint8).reshape(-1, 2, 16)
        d = np.repeat(blocks[:, -2:], 8, axis=0)
        return np.concatenate([d, codes[:, 0] | codes[:, 1] << 4], axis=1), 0

    return rewrite


_REWRITE = {
    "iq4_nl": (18, _iq4_nl),
    "mxfp4": (17, _mxfp4),
    "q3_k": (110, _q3_k),
    "tq1_0": (54, _ternary("tq1_0")),
    "tq2_0": (66, _ternary("tq2_0")),
}
"""Bytes of a block, and the function that rewrites blocks: uint8 [blocks, bytes] of both types."""
