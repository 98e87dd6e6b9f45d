"""Checkpoints in fp8 with a factor for each block, against the arithmetic written out."""

import json
import struct
from dataclasses import replace
from functools import cache

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


@cache
def checkpoint():
    """(tensors to save, expected float32 values) of a random checkpoint: linear layers in fp8, the rest in bf16."""
    rng, block = np.random.default_rng(0), CONFIG8["quantization_config"]["weight_block_size"]
    numbers = np.array([number(code) for code in range(256)], np.float32)
    stored, expected = {}, {}
    for name, a in random_tensors(hf_shapes(CONFIG8)).items():
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
        ({}, "quant_method None"),
        ([], "not a JSON object"),
        ({"quant_method": ["fp8"]}, r"quant_method \['fp8'\]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 and fmt 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"blocks of \[128, 0\] are not two numbers"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "blocks of 128 are not two numbers"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, "or one for each row or each block of 64 x 128"),
        ({"quant_method": "fp8", "weight_block_size": None}, "takes one float, or one for each row$"),
        (None, "type F8_E4M3, but config.json has no quantization_config"),
    ],
)
def test_other_settings_are_refused(folder, tmp_path, settings, says):
    refused(folder, tmp_path, says, {**CONFIG8, "quantization_config": settings})


FP8_GROUP = {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True}
OTHER_METHODS = {
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "AutoRound": {"quant_method": "auto-round", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes,": {"load_in_8bit": True},
    r"compressed-tensors \('pack-quantized'\)": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": FP8_GROUP | {"type": "int", "num_bits": 4}}},
    },
    r"compressed-tensors \('mixed'\)": {
        "quant_method": "compressed-tensors",
        "format": "mixed",
        "config_groups": {"a": {"weights": FP8_GROUP}, "b": {"weights": FP8_GROUP | {"num_bits": 4}}},
    },
    r"compressed-tensors \('float-quantized'\)": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"a": {"weights": FP8_GROUP}},
        "sparsity_config": {"format": "sparse-24-bitmask"},
    },
    r"compressed-tensors \(None\)": {"quant_method": "compressed-tensors", "config_groups": [7]},
    "MLX": {"bits": 4, "group_size": 64, "mode": "affine"},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {}}},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "HQQ": {"quant_method": "hqq"},
    "MXFP4": {"quant_method": "mxfp4"},
    r"NVIDIA ModelOpt \('NVFP4'\)": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "FP-Quant": {"quant_method": "fp_quant"},
    "ExLlamaV2": {"quant_method": "exl2"},
    "quant_method 'new'": {"quant_method": "new"},
}


@pytest.mark.parametrize("name", OTHER_METHODS)
@pytest.mark.parametrize("where", ["quantization_config", "compression_config"])
def test_other_methods_are_named(folder, tmp_path, name, where):
    says = (
        f"field {where}: quantised with {name}.* convert an unquantised checkpoint of the model, or a GGUF file of it$"
    )
    config = {key: value for key, value in CONFIG8.items() if key != "quantization_config"}
    refused(folder, tmp_path, says, {**config, where: OTHER_METHODS[name]})


def test_mlx_has_a_field_of_its_own(folder, tmp_path):
    config = {key: value for key, value in CONFIG8.items() if key != "quantization_config"}
    mlx = {**config, "quantization": {"bits": 4, "group_size": 64}}
    refused(folder, tmp_path, "field quantization: quantised with MLX, which is not supported", mlx)
    refused(folder, tmp_path, "config.json has no quantization_config", {**config, "quantization": "none"})


@pytest.mark.parametrize(
    "name, method",
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("SCB", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("W_q", "HQQ"),
        ("weight._data", "quanto"),
        ("biases", "MLX"),
    ],
)
def test_methods_are_known_by_their_tensors(folder, tmp_path, name, method):
    config = {key: value for key, value in CONFIG8.items() if key != "quantization_config"}
    name = "model.layers.0.mlp.up_proj." + name
    tensors = checkpoint()[0] | {name: ("I32", np.zeros((3, 1), np.int32))}
    refused(folder, tmp_path, f"tensor {name}: quantised with {method}, which is not supported", config, tensors)


# --- factors of whole matrices and of rows


METHODS = {
    "Ministral 3": ({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, "_scale_inv"),
    "FBGEMM": ({"quant_method": "fbgemm_fp8"}, "_scale"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": FP8_GROUP}}},
        "_scale",
    ),
    "ModelOpt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "_scale"),
    "blocks by default": ({"quant_method": "fp8"}, "_scale_inv"),
}


@pytest.mark.crossed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), ("rows",), ("rows", 1)], ids=str)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_factors_of_matrices_and_of_rows(tmp_path, method, shape, dtype):
    settings, suffix = METHODS[method]
    config = {**CONFIG8, "quantization_config": settings}
    folder = hf_folder(tmp_path / "hf", config)
    rng = np.random.default_rng(3)
    numbers = np.array([number(code) for code in range(256)], np.float32)
    stored, expected = {}, {}
    for name, a in random_tensors(hf_shapes(config)).items():
        stored[name], expected[name] = ("F32", a), a
        if "_proj" not in name:
            continue
        codes = rng.choice([c for c in range(256) if c & 127 != 127], a.shape).astype(np.uint8)
        factors = rng.uniform(1e-4, 3e-3, [len(a) if n == "rows" else n for n in shape]).astype(np.float32)
        factors = (to_bf16(factors).astype(np.uint32) << 16).view(np.float32).reshape(factors.shape)
        stored[name] = ("F8_E4M3", codes)
        stored[name + suffix] = (dtype, factors if dtype == "F32" else to_bf16(factors))
        # What the inputs are quantised with is not the weights' concern.
        stored[name.removesuffix("weight") + "activation_scale"] = ("F32", np.ones((), np.float32))
        stored[name.removesuffix("weight") + "input_scale"] = ("F32", np.ones((), np.float32))
        expected[name] = numbers[codes] * factors.reshape(-1, 1)
    save(folder / "model.safetensors", stored)
    convert(folder, tmp_path / "model.bin", "f32")
    assert_values(matrices(tmp_path / "model.bin"), expected)


def test_damaged_checkpoints_are_refused(folder, tmp_path):
    stored, _ = checkpoint()
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: value for key, value in stored.items() if key != name + "_scale_inv"}
    refused(folder, tmp_path, f"{name}_scale_inv is missing", tensors=without)
    bad = {**stored, name + "_scale_inv": ("F32", np.ones((3, 1), np.float32))}
    refused(folder, tmp_path, "takes one float, or one for each row or each block of 128 x 128$", tensors=bad)
    codes = stored[name][1].copy()
    for factor in (np.inf, np.nan, 3e38):
        odd = {**stored, name + "_scale_inv": ("F32", np.full((3, 2), factor, np.float32))}
        refused(folder, tmp_path, "holds NaN or infinite values|holds .* too large", tensors=odd)
    codes[5, 5] = 0xFF
    refused(folder, tmp_path, "holds NaN", tensors={**stored, name: ("F8_E4M3", codes)})
    more = {**stored, "model.norm.weight_scale_inv": ("F32", np.ones((1, 1), np.float32))}
    refused(folder, tmp_path, "norm.weight_scale_inv: a weight is quantised", tensors=more)
