"""The packed layouts: the core against the reader written from the specification, and both against gguf."""

import gguf
import numpy as np
import pytest

from kvrun import _core
from support import numpy_reader

SHAPES = [(1, 32), (16, 32), (17, 64), (48, 96), (5, 160), (33, 224)]
SUPER_SHAPES = [(1, 256), (16, 512), (17, 768), (33, 1280)]
SUPER_TYPES = {row.name: row.block_bytes for row in _core.WEIGHT_TYPES.values() if row.column_multiple > 1}
ANY_SHAPE = [kind for kind in _core.WEIGHT_TYPES if kind not in SUPER_TYPES]


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same_bits(a, b):
    return np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ANY_SHAPE)
def test_raw_packing_keeps_every_value(kind, shape):
    ggml = gguf.GGMLQuantizationType[kind.upper()]
    raw = gguf.quants.quantize(random(shape), ggml)
    expected = gguf.quants.dequantize(raw, ggml)
    packed = _core.pack_raw(kind, raw.view(np.uint8).reshape(-1), *shape)
    assert packed.nbytes == _core.packed_size(kind, *shape) and packed.nbytes % 64 == 0
    assert same_bits(numpy_reader.unpack(kind, packed.tobytes(), *shape), expected)
    assert same_bits(_core.unpack(kind, packed, *shape), expected)


@pytest.mark.parametrize("shape", SUPER_SHAPES)
@pytest.mark.parametrize("kind", SUPER_TYPES)
def test_raw_packing_of_super_blocks_keeps_every_value(kind, shape):
    raw = np.random.default_rng(4).integers(0, 256, (shape[0] * shape[1] // 256, SUPER_TYPES[kind])).astype(np.uint8)
    scale = np.random.default_rng(5).uniform(-1, 1, (len(raw), 1)).astype(np.float16).view(np.uint8)
    if kind == "q4_k":
        raw[:, :4] = np.tile(scale, 2)
    else:
        raw[:, 208:] = scale
    expected = gguf.quants.dequantize(raw.reshape(shape[0], -1), gguf.GGMLQuantizationType[kind.upper()])
    packed = _core.pack_raw(kind, raw.reshape(-1), *shape)
    assert packed.nbytes == _core.packed_size(kind, *shape) and packed.nbytes % 64 == 0
    found = numpy_reader.unpack(kind, packed.tobytes(), *shape)
    assert np.array_equal(found, expected.reshape(shape)) and np.array_equal(_core.unpack(kind, packed, *shape), found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ANY_SHAPE)
def test_quantising_is_ggmls(kind, shape):
    values = random(shape, 1)
    values[0, :32] = 0
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
    packed = _core.pack(kind, values)
    assert packed.tobytes() == _core.pack_raw(kind, raw.view(np.uint8).reshape(-1), *shape).tobytes()


@pytest.mark.parametrize("cols", [1, 2, 31, 33, 52, 65])
@pytest.mark.parametrize("kind", ANY_SHAPE)
def test_any_number_of_columns(kind, cols):
    values = random((18, cols), 2)
    padded = np.zeros((18, -(-cols // 32) * 32), np.float32)
    padded[:, :cols] = values
    expected = numpy_reader.unpack(kind, _core.pack(kind, padded).tobytes(), *padded.shape)[:, :cols]
    packed = _core.pack(kind, values)
    assert same_bits(_core.unpack(kind, packed, 18, cols), expected)
    assert same_bits(numpy_reader.unpack(kind, packed.tobytes(), 18, cols), expected)


def test_slabs_of_whole_panels_follow_each_other():
    values = random((70, 512), 3)
    for kind in _core.WEIGHT_TYPES:
        parts = b"".join(_core.pack(kind, values[i : i + 32]).tobytes() for i in range(0, 70, 32))
        assert parts == _core.pack(kind, values).tobytes()
