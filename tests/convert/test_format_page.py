"""docs/format.md says what is so: its worked example, its tables, and its reader (through `numpy_reader`)."""

import json
import re
from dataclasses import fields

import numpy as np
import pytest

from kvrun import _core
from kvrun.convert import convert
from kvrun.files import model_file
from kvrun.files.description import ModelDescription
from support import numpy_reader
from support.make_checkpoint import CONFIG, hf_folder

PAGE = numpy_reader.PAGE


def test_the_worked_example():
    steps = np.arange(32, dtype=np.float32) % 16
    matrix = np.stack([steps - 8, 3.5 - steps / 2])
    packed = _core.pack("q4_0", matrix)
    assert packed.nbytes == 320
    lines = re.findall(r"^ *(\d+)   ((?:[0-9a-f]{2} )*[0-9a-f]{2})", PAGE, re.MULTILINE)
    assert [int(offset) for offset, _ in lines] == [0, 64, 128, 192, 256]
    for offset, text in lines:
        expected = bytes.fromhex(text)
        assert packed[int(offset) :][: len(expected)].tobytes() == expected
    assert np.array_equal(numpy_reader.unpack("q4_0", packed.tobytes(), 2, 32), matrix)


def test_the_types():
    table = PAGE.partition("| type | bits per weight | value |")[2].partition("\n\n")[0]
    bits = {}
    for line in table.splitlines()[2:]:
        names, numbers, _ = line.strip("| ").split(" | ")
        bits |= zip(re.findall(r"`(\w+)`", names), map(float, numbers.split(", ")), strict=True)
    assert bits == {row.name: row.bits for row in _core.WEIGHT_TYPES.values()}


@pytest.mark.parametrize("cols", [1, 31, 32, 33, 64, 65, 96, 250, 256, 512, 768])
def test_the_sizes(cols):
    blocks = -(-cols // 32)
    pairs, even = -(-blocks // 2), cols + cols % 2
    sizes = {
        "f32": 64 * cols,
        "f16": 32 * even,
        "bf16": 32 * even,
        "q8_0": 64 * pairs + 512 * blocks,
        "q5_0": 64 * pairs + 320 * blocks,
        "q4_0": 64 * pairs + 256 * blocks,
        "q4_1": 128 * pairs + 256 * blocks,
    }
    if cols % 256 == 0:
        supers = cols // 256
        sizes |= {"q4_k": 2304 * supers, "q6_k": 64 * -(-supers // 2) + 3328 * supers}
    kinds = [kind for kind in _core.WEIGHT_TYPES if cols % _core.column_multiple(kind) == 0]
    assert {kind: _core.packed_size(kind, 33, cols) // 3 for kind in kinds} == sizes


def test_the_tables_are_complete(tmp_path):
    convert(hf_folder(tmp_path / "hf"), tmp_path / "model.bin")
    metadata, *_ = numpy_reader.load(tmp_path / "model.bin")
    for key in [
        *metadata,
        *model_file.REQUIRED,
        *model_file.OPTIONAL,
        *json.loads(metadata["tokenizer"]),
        *(field.name for field in fields(ModelDescription)),
        *model_file.SAMPLING_KEYS,
        *_core.WEIGHT_TYPES,
    ]:
        assert f"`{key}`" in PAGE, key
    names = {re.sub(r"\d+", "{i}", name) for name in ModelDescription.from_json(metadata["model"]).tensor_shapes()}
    assert all(f"`{name}`" in PAGE for name in names)


@pytest.mark.parametrize("kind", _core.WEIGHT_TYPES)
def test_the_reader(tmp_path, kind):
    config = {**CONFIG, "vocab_size": 37, "intermediate_size": 53}
    if _core.column_multiple(kind) > 1:
        config |= {"hidden_size": 256, "head_dim": 64, "intermediate_size": 768}
    model = convert(hf_folder(tmp_path / "hf", config), tmp_path / "model.bin", kind).model
    assert kind in {weight.type for weight in model.weights.values()}
    _, matrices, vectors, tokenizer = numpy_reader.load(tmp_path / "model.bin")
    assert tokenizer == model.tokenizer_bytes() and list(matrices) == list(model.weights)
    for name, weight in model.weights.items():
        assert np.array_equal(matrices[name], _core.unpack(weight.type, weight.data, weight.rows, weight.cols))
    for name, vector in model.vectors.items():
        assert np.array_equal(vectors[name], vector)
