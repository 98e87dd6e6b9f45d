"""Checkpoints in fp8 with a factor for each block, against the arithmetic written out."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest

from kvrun.convert import convert
from kvrun.convert.fp8 import VALUES, Fp8Tensor
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError
from support import numpy_reader
from support.make_checkpoint import CONFIG, hf_folder, hf_shapes, random_tensors, to_bf16, write_json

CONFIG8 = {
    **CONFIG,
    "hidden_size": 192,
    "intermediate_size": 300,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


def save(path, tensors):
    """A safetensors file of {name: (dtype, array)}."""
    header, chunks, position = {}, [], 0
    for name, (dtype, a) in tensors.items():
        data = np.ascontiguousarray(a).tobytes()
        header[name] = {"dtype": dtype, "shape": list(a.shape), "data_offsets": [position, position + len(data)]}
        chunks.append(data)
        position += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def number(code):
    """The value of a float8_e4m3fn by its definition."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def checkpoint(config=CONFIG8):
    """(tensors to save, expected float32 values) of a random checkpoint: linear layers in fp8, the rest in bf16."""
    rng, block = np.random.default_rng(0), config["quantization_config"]["weight_block_size"]
    numbers = np.array([number(code) for code in range(256)], np.float32)
    stored, expected = {}, {}
    for name, a in random_tensors(hf_shapes(config)).items():
        if "_proj" in name:
            codes = rng.choice([c for c in range(256) if c & 127 != 127], a.shape).astype(np.uint8)
            grid = [-(-n // b) for n, b in zip(a.shape, block, strict=True)]
            factors = rng.uniform(1e-4, 3e-3, grid).astype(np.float32)
            stored[name], stored[name + "_scale_inv"] = ("F8_E4M3", codes), ("F32", factors)
            expected[name] = numbers[codes]
            for r, c in np.ndindex(*grid):
                at = slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
                expected[name][at] *= factors[r, c]
        else:
            stored[name] = ("BF16", to_bf16(a))
            expected[name] = (to_bf16(a).astype(np.uint32) << 16).view(np.float32)
    return stored, expected


@pytest.fixture
def folder(tmp_path):
    result = hf_folder(tmp_path / "hf", CONFIG8)
    save(result / "model.safetensors", checkpoint()[0])
    return result


def matrices(path):
    _, found, _, _ = numpy_reader.load(path)
    return found


OURS = {
    "self_attn.q_proj": "attn.q",
    "self_attn.v_proj": "attn.v",
    "mlp.gate_proj": "mlp.gate",
    "mlp.down_proj": "mlp.down",
}


def assert_values(found, expected, rounded=lambda a: a):
    for theirs, ours in OURS.items():
        for i in range(2):
            want = rounded(expected[f"model.layers.{i}.{theirs}.weight"])
            assert np.array_equal(found[f"layers.{i}.{ours}.weight"], want), (i, ours)


def test_the_numbers():
    expected = np.array([number(code) for code in range(256)], np.float32)
    np.testing.assert_array_equal(VALUES.view(np.uint32)[:127], expected.view(np.uint32)[:127])
    np.testing.assert_array_equal(VALUES, expected)
    assert (VALUES[0x7E], VALUES[0x08], VALUES[0x01], VALUES[0xB8]) == (448, 2**-6, 2**-9, -1)


def test_dequantised_exactly(folder, tmp_path):
    expected = checkpoint()[1]
    result = convert(folder, tmp_path / "model.bin", "f32")
    assert_values(matrices(tmp_path / "model.bin"), expected)
    assert np.array_equal(matrices(tmp_path / "model.bin")["embed.weight"], expected["model.embed_tokens.weight"])
    assert result.notes == ["14 tensors of type F8_E4M3 dequantised and stored as f32"]


def test_stored_as_bf16_by_default(folder, tmp_path):
    result = convert(folder, tmp_path / "model.bin")
    assert {weight.type for weight in result.model.weights.values()} == {"bf16"}
    assert result.notes == ["14 tensors of type F8_E4M3 dequantised and stored as bf16"]

    def rounded(a):  # to nearest, ties to even
        bits = a.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)

    assert_values(matrices(tmp_path / "model.bin"), checkpoint()[1], rounded)


def test_in_shards_with_factors_elsewhere(folder, tmp_path):
    stored, expected = checkpoint()
    (folder / "model.safetensors").unlink()
    names, index = list(stored), {}
    for i in range(3):
        part = names[i::3]
        save(folder / f"model-0000{i + 1}-of-00003.safetensors", {name: stored[name] for name in part})
        index |= dict.fromkeys(part, f"model-0000{i + 1}-of-00003.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    convert(folder, tmp_path / "model.bin", "f32")
    assert_values(matrices(tmp_path / "model.bin"), expected)


def test_slabs_and_parts(folder):
    """Any rows, in another order, or of a part of the tensor, have the factors of where they are stored."""
    tensor = open_checkpoint(str(folder)).tensors["layers.0.mlp.gate.weight"]
    expected = checkpoint()[1]["model.layers.0.mlp.gate_proj.weight"]
    assert isinstance(tensor, Fp8Tensor) and np.array_equal(tensor.floats(0, 300), expected)
    assert np.array_equal(tensor.floats(117, 261), expected[117:261])
    turned = tensor.with_rows_from((2, 0, 1))
    assert np.array_equal(turned.floats(126, 132), expected[[128, 126, 127, 131, 129, 130]])
    part = replace(tensor, shape=(100, 192), offset=tensor.offset + 110 * tensor.row_bytes)
    assert np.array_equal(part.floats(3, 100), expected[113:210])


def refused(folder, tmp_path, says, config=CONFIG8, tensors=None):
    write_json(folder / "config.json", config)
    if tensors is not None:
        save(folder / "model.safetensors", tensors)
    with pytest.raises(ConvertError, match=says) as caught:
        convert(folder, tmp_path / "model.bin")
    assert "\n" not in str(caught.value) and not (tmp_path / "model.bin").exists()


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"quant_method": "awq"}, "quantization_config: quant_method 'awq' is not supported"),
        ({}, "quant_method None"),
        ([], "quant_method None"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, "one float for each block of 64 x 128"),
        (None, "type F8_E4M3, but config.json has no quantization_config"),
    ],
)
def test_other_quantisations_are_refused(folder, tmp_path, settings, says):
    refused(folder, tmp_path, says, {**CONFIG8, "quantization_config": settings})


def test_damaged_checkpoints_are_refused(folder, tmp_path):
    stored, _ = checkpoint()
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: value for key, value in stored.items() if key != name + "_scale_inv"}
    refused(folder, tmp_path, f"{name}_scale_inv is missing", tensors=without)
    bad = {**stored, name + "_scale_inv": ("F32", np.ones((3, 1), np.float32))}
    refused(folder, tmp_path, "takes one float for each block", tensors=bad)
    codes = stored[name][1].copy()
    codes[5, 5] = 0xFF
    refused(folder, tmp_path, "holds NaN", tensors={**stored, name: ("F8_E4M3", codes)})
    more = {**stored, "model.norm.weight_scale_inv": ("F32", np.ones((1, 1), np.float32))}
    refused(folder, tmp_path, "norm.weight_scale_inv: not part of", tensors=more)
