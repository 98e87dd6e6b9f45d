"""Which weight type each tensor gets, and what becomes of its values."""

import warnings
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from kvrun import _core
from kvrun.convert import TYPES, convert
from kvrun.convert.families import FAMILIES, GGUF
from kvrun.convert.transcoding import EXACT, transcoded
from kvrun.convert.weight_types import target_type
from kvrun.errors import ConvertError
from kvrun.files.description import ModelDescription
from support import numpy_reader
from support.make_checkpoint import CONFIG, gguf_shapes, hf_folder, hf_shapes, random_tensors, save_gguf, straight
from support.numpy_llama import NumpyLlama

SIZES = {"hidden": 256, "inner": 512, "heads": 4, "kv_heads": 2}
MIXED = {
    "attn_q": "Q4_K",
    "attn_k": "Q6_K",
    "attn_v": "Q2_K",
    "attn_output": "Q3_K",
    "ffn_gate": "Q5_K",
    "ffn_up": "IQ4_NL",
    "ffn_down": "Q5_1",
    "token_embd": "Q5_1",
}


def read_named(path):
    """The matrices of a model file under their GGUF names."""
    metadata, matrices, vectors, _ = numpy_reader.load(path)
    description = ModelDescription.from_json(metadata["model"])
    ours = matrices | vectors
    return {theirs: ours[name] for name, theirs in FAMILIES[0].source_names(description, GGUF)}


def save(path):
    stored = save_gguf(path, MIXED, **SIZES)
    for name in stored:
        if "attn_q" in name or "attn_k" in name:
            stored[name] = straight(stored[name], 4 if "attn_q" in name else 2)
    return stored


def test_every_type_of_gguf_keeps_its_quality(tmp_path):
    stored = save(tmp_path / "m.gguf")
    result = convert(tmp_path / "m.gguf", tmp_path / "model.bin")
    found = read_named(tmp_path / "model.bin")
    kinds = [weight.type for name, weight in result.model.weights.items() if name.startswith("layers.1.")]
    assert kinds == ["q4_k", "q6_k", "q6_k", "q6_k", "q8_0", "q8_0", "q8_0"]
    assert result.notes == [
        "2 tensors of type IQ4_NL stored as q8_0, every value kept",
        "2 tensors of type Q2_K dequantised and stored as q6_k",
        "2 tensors of type Q3_K stored as q6_k, every value kept",
        "3 tensors of type Q5_1 dequantised and stored as q8_0",
        "2 tensors of type Q5_K dequantised and stored as q8_0",
    ]
    for name, expected in stored.items():
        error = np.sqrt(((found[name] - expected) ** 2).mean() / (expected**2).mean())
        if any(part in name for part in ("attn_q", "attn_k", "attn_output", "ffn_up", "norm")):
            assert np.array_equal(found[name], expected.reshape(found[name].shape)), name
        else:
            assert error < (0.02 if "attn" in name else 0.008), name


def random_rows(kind, rows=33, cols=512):
    """Random blocks of a type, uint8 [rows, bytes], with every scale that a float16 can be, negative ones too."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    values, width = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(9)
    blocks = rng.integers(0, 256, (rows * cols // values, width)).astype(np.uint8)
    if kind == "mxfp4":
        blocks[:, 0] = rng.integers(104, 147, len(blocks))
    else:
        at = 0 if kind == "iq4_nl" else width - 2
        scales = rng.integers(0, 0x7C00, (len(blocks), 1)) | rng.integers(0, 2, (len(blocks), 1)) << 15
        blocks[:, at : at + 2] = scales.astype("<u2").view(np.uint8)
    return blocks.reshape(rows, -1), gguf.quants.dequantize(blocks.reshape(rows, -1), number)


@pytest.mark.parametrize("kind", EXACT)
def test_types_whose_values_another_holds(kind):
    raw, expected = random_rows(kind)
    blocks, rounded = transcoded(kind, raw)
    assert rounded == 0
    packed = _core.pack_raw(EXACT[kind], blocks, *expected.shape)
    assert np.array_equal(_core.unpack(EXACT[kind], packed, *expected.shape).view("u4"), expected.view("u4"))
    found = numpy_reader.unpack(EXACT[kind], packed.tobytes(), *expected.shape)
    assert np.array_equal(found.view("u4"), expected.view("u4"))


def test_mxfp4_beyond_float16():
    """Large scales are kept with larger codes, as far as they go; of small ones even codes are, others are rounded."""
    raw = random_rows("mxfp4")[0].reshape(-1, 17)
    raw[0, 1:], raw[1, 1:] = 0x22, 0x80  # doubled numbers 2, and zeros
    for exponent, largest in ((146, 0.0), (103, 2.0**-25), (100, 2.0**-25), (0, 2.0**-25)):
        raw[:, 0] = exponent
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
        blocks, rounded = transcoded("mxfp4", raw)
        found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        wrong = (found != expected).any(axis=1)
        assert np.abs(found - expected).max() <= largest and rounded == wrong.sum()
        assert not wrong[1] and wrong[0] == (exponent < 103) and wrong.any() == (largest > 0)
    raw[:, 0] = 147
    with pytest.raises(OverflowError):
        transcoded("mxfp4", raw)
    raw[:, 1:] = 0x80
    assert transcoded("mxfp4", raw)[1] == 0


def test_mxfp4_in_a_model(tmp_path):
    tensors = random_tensors(gguf_shapes())
    stored = save_gguf(tmp_path / "m.gguf", {"ffn_up": "MXFP4", "attn_q": "MXFP4"}, tensors=tensors)
    result = convert(tmp_path / "m.gguf", tmp_path / "model.bin")
    assert result.notes == ["4 tensors of type MXFP4 stored as q8_0, every value kept"]
    found = read_named(tmp_path / "model.bin")
    assert np.array_equal(found["blk.1.ffn_up.weight"], stored["blk.1.ffn_up.weight"])
    assert np.array_equal(found["blk.0.attn_q.weight"], straight(stored["blk.0.attn_q.weight"], 4))
    tensors["blk.0.ffn_up.weight"][3:5] = 1e-8
    save_gguf(tmp_path / "m.gguf", {"ffn_up": "MXFP4"}, tensors=tensors)
    [note] = convert(tmp_path / "m.gguf", tmp_path / "model.bin").notes
    assert note.endswith("every value kept but in 4 blocks whose scale no float16 can be (by 3e-8 at most)")
    tensors["blk.0.ffn_up.weight"][3] = 1e8
    stored = save_gguf(tmp_path / "m.gguf", {"ffn_up": "MXFP4"}, tensors=tensors)
    with pytest.raises(
        ConvertError, match=r"blk.0.ffn_up.weight holds 1.\d+e\+08, too large for q8_0: use --type bf16"
    ):
        convert(tmp_path / "m.gguf", tmp_path / "model.bin")
    convert(tmp_path / "m.gguf", tmp_path / "model.bin", "bf16")
    assert np.array_equal(read_named(tmp_path / "model.bin")["blk.0.ffn_up.weight"], stored["blk.0.ffn_up.weight"])


def test_exact_only_if_the_type_is_not_another(tmp_path):
    """With a type asked for, tensors get that one; where it holds their values it does so exactly."""
    stored = save(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "model.bin", "q8_0")
    found = read_named(tmp_path / "model.bin")
    assert np.array_equal(found["blk.0.ffn_up.weight"], stored["blk.0.ffn_up.weight"])
    expected = _core.pack("q8_0", stored["blk.0.attn_output.weight"])
    assert np.array_equal(found["blk.0.attn_output.weight"], _core.unpack("q8_0", expected, 256, 256))


@pytest.mark.parametrize("kind", ["Q1_0", "Q8_K", "I32", "F64"])
def test_types_that_cannot_be_read_are_refused_before_anything_is_written(tmp_path, kind):
    number = gguf.GGMLQuantizationType[kind]
    values, width = gguf.GGML_QUANT_SIZES[number]
    for name, shape in (("blk.1.ffn_up.weight", (512, 256)), ("rope_freqs.weight", (256,))):
        blocks = np.zeros((*shape[:-1], shape[-1] // values * width), np.uint8)
        save_gguf(tmp_path / "m.gguf", extra={name: (blocks, number)}, **SIZES)
        with pytest.raises(ConvertError, match=f"tensor {name} has type {kind}, which is not supported yet") as caught:
            convert(tmp_path / "m.gguf", tmp_path / "model.bin")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.bin").exists()


@pytest.mark.parametrize("kind", ["Q5_1", "Q2_K", "IQ4_XS"])
def test_scales_that_are_no_numbers(tmp_path, kind):
    """One line, and no warnings of NumPy's before it."""
    number = gguf.GGMLQuantizationType[kind]
    values, width = gguf.GGML_QUANT_SIZES[number]
    for half in (0x7E00, 0x7C00):  # NaN, infinity
        blocks = np.full((512, 256 // values * width // 2), half, "<u2").view(np.uint8)
        save_gguf(tmp_path / "m.gguf", extra={"blk.1.ffn_up.weight": (blocks, number)}, **SIZES)
        with warnings.catch_warnings(), pytest.raises(ConvertError, match="ffn_up.weight holds NaN or infinite values"):
            warnings.simplefilter("error")
            convert(tmp_path / "m.gguf", tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["blk.0.ffn_up.scale", "blk.0.ffn_up.weight.scale"])
def test_factors_beside_the_weights(tmp_path, name):
    tensors = random_tensors(gguf_shapes())
    save_gguf(tmp_path / "m.gguf", tensors={**tensors, name: np.array([0.5], np.float32)})
    with pytest.raises(ConvertError, match=f"tensor {name}: factors beside the weights are not supported yet"):
        convert(tmp_path / "m.gguf", tmp_path / "model.bin")
    save_gguf(tmp_path / "m.gguf", tensors={**tensors, name: np.ones(1, np.float32)})
    convert(tmp_path / "m.gguf", tmp_path / "model.bin")


def test_every_type_of_gguf_exactly_as_f32(tmp_path):
    stored = save(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "model.bin", "f32")
    found = read_named(tmp_path / "model.bin")
    for name, expected in stored.items():
        assert np.array_equal(found[name], expected.reshape(found[name].shape)), name


@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_a_tensor_that_has_the_type_keeps_its_values(tmp_path, kind):
    types = {"blk.0": kind, "blk.1": "F16", "token_embd": kind}
    stored = save_gguf(tmp_path / "m.gguf", types, **SIZES)
    result = convert(tmp_path / "m.gguf", tmp_path / "model.bin", kind)
    found = read_named(tmp_path / "model.bin")
    assert {weight.type for weight in result.model.weights.values()} == {kind} and result.notes == []
    for name in ("token_embd.weight", "blk.0.ffn_up.weight", "blk.0.attn_v.weight"):
        assert np.array_equal(found[name], stored[name])
    packed = _core.pack(kind, stored["blk.1.ffn_up.weight"])
    assert np.array_equal(found["blk.1.ffn_up.weight"], _core.unpack(kind, packed, 512, 256))


@pytest.mark.parametrize("kind, instead", [("q4_k", "q4_1"), ("q6_k", "q8_0")])
def test_columns_that_are_no_whole_super_blocks(tmp_path, kind, instead):
    config = {**CONFIG, "intermediate_size": 256, "tie_word_embeddings": False}
    result = convert(hf_folder(tmp_path / "hf", config), tmp_path / "model.bin", kind)
    types = {name: weight.type for name, weight in result.model.weights.items()}
    assert types["layers.0.mlp.down.weight"] == kind and types["layers.0.attn.q.weight"] == instead
    assert types["embed.weight"] == types["head.weight"] == "q8_0"
    assert result.notes[0] in (
        "12 tensors stored as q4_1: q4_k takes a multiple of 256 columns",
        "14 tensors stored as q8_0: q6_k takes a multiple of 256 columns",
    )
    assert result.notes[1:] == ["2 tensors stored as q8_0: q6_k takes a multiple of 256 columns"] * (kind == "q4_k")


@pytest.mark.parametrize(
    "kind, finer",
    [("q4_0", "q8_0"), ("q4_1", "q8_0"), ("q5_0", "q8_0"), ("q4_k", "q6_k"), ("q6_k", "q6_k"), ("bf16", "bf16")],
)
def test_embedding_and_output_head_are_finer(kind, finer):
    tensor = SimpleNamespace(type="f32", shape=(512, 256))
    for name in ("embed.weight", "head.weight"):
        assert target_type(name, tensor, kind, None) == finer
        assert target_type(name, SimpleNamespace(type=kind, shape=(512, 256)), kind, None) == kind
    assert target_type("layers.0.attn.q.weight", tensor, kind, None) == kind


def kind_in_mix(name, n_layers, tied=False, kv_heads=8, cols=4096, experts=None):
    description = SimpleNamespace(
        n_layers=n_layers, tie_embeddings=tied, n_heads=64, n_kv_heads=kv_heads, n_experts=experts
    )
    return target_type(name, SimpleNamespace(type="f16", shape=(512, cols)), "q4_k_m", description)


def test_the_mix():
    """Llama 3.1 8B in Q4_K_M, as its published GGUF files have it; and the cases that differ."""
    finer = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    for i in range(32):
        for part in ("attn.q", "attn.k", "attn.o", "mlp.gate", "mlp.up"):
            assert kind_in_mix(f"layers.{i}.{part}.weight", 32) == "q4_k"
        for part in ("attn.v", "mlp.down"):
            assert kind_in_mix(f"layers.{i}.{part}.weight", 32) == ("q6_k" if i in finer else "q4_k")
    assert kind_in_mix("embed.weight", 32) == "q4_k" and kind_in_mix("embed.weight", 32, tied=True) == "q6_k"
    assert kind_in_mix("head.weight", 32) == "q6_k" and kind_in_mix("head.weight", 32, cols=640) == "q8_0"
    assert kind_in_mix("layers.11.attn.v.weight", 80) == "q6_k"
    assert kind_in_mix("layers.11.attn.v.weight", 80, kv_heads=64) == "q4_k"
    assert kind_in_mix("layers.11.mlp.down.weight", 80) == "q4_k"
    assert kind_in_mix("layers.5.attn.v.weight", 32, cols=640) == "q4_1"


def test_the_mix_with_experts():
    names = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.router", "mlp.experts.3.up", "mlp.experts.3.down"]
    kinds = [kind_in_mix(f"layers.4.{name}.weight", 32, experts=8) for name in names]
    assert kinds == ["q4_k", "q8_0", "q8_0", "q6_k", "f16", "q4_k", "q4_k"]
    assert kind_in_mix("layers.3.mlp.experts.7.down.weight", 32, experts=8) == "q6_k"
    assert kind_in_mix("layers.4.attn.k.weight", 32, experts=128) == "q4_k"


def test_every_type_converts(tmp_path):
    config = {**CONFIG, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 48}
    folder = hf_folder(tmp_path / "hf", config)
    found = {kind: convert(folder, tmp_path / f"{kind}.bin", kind) for kind in TYPES}
    assert found["same"].bits_per_weight == found["f32"].bits_per_weight == 32
    bits = [found[kind].bits_per_weight for kind in ("q4_k", "q4_k_m", "q6_k")]
    assert 4.5 < bits[0] < bits[1] < 6.5625 < bits[2] < 6.63  # matrices with an odd number of super-blocks have padding
    assert all(result.notes == [] for result in found.values())
    assert {w.type for w in found["q4_k_m"].model.weights.values()} == {"q4_k", "q6_k"}
    assert found["q4_k"].model.weights["embed.weight"].type == "q6_k"


@pytest.mark.parametrize("kind", ["q4_k", "q4_k_m", "q6_k"])
def test_the_engine_computes_with_the_values_of_the_file(tmp_path, kind):
    config = {**CONFIG, "hidden_size": 256, "intermediate_size": 768}
    tensors = {
        name: a * np.float32(0.05 if a.ndim == 2 else 1) for name, a in random_tensors(hf_shapes(config)).items()
    }
    model = convert(hf_folder(tmp_path / "hf", config, tensors), tmp_path / "model.bin", kind).model
    tokens = np.random.default_rng(2).integers(0, 40, 70).astype(np.int32)
    expected = NumpyLlama(model).logits(tokens)
    description = model.description
    engine = _core.Engine(description, model.weights, model.vectors, description.rope_tables, 2, precise=True)
    for chunks in ([1] * 70, [1, 2, 3, 17, 47], [70]):
        cache = _core.KVCache(engine, k="f32", v="f32", ctx=256, sinks=4, window=64)
        at, rows = 0, []
        for n in chunks:
            rows.append(np.atleast_2d(engine.forward(tokens[at : at + n], cache, logits="all")))
            at += n
        assert np.abs(np.concatenate(rows) - expected).max() <= 1e-3 * np.abs(expected).max()


def test_rows_are_put_back_in_every_type(tmp_path):
    """Q and K of GGUF in super-blocks: rows move, blocks stay whole."""
    tensors = random_tensors(gguf_shapes(**SIZES))
    stored = save_gguf(tmp_path / "m.gguf", {"attn_q": "Q6_K", "attn_k": "Q4_K"}, tensors=tensors, **SIZES)
    convert(tmp_path / "m.gguf", tmp_path / "model.bin")
    found = read_named(tmp_path / "model.bin")
    assert np.array_equal(found["blk.1.attn_q.weight"], straight(stored["blk.1.attn_q.weight"], 4))
    assert np.array_equal(found["blk.1.attn_k.weight"], straight(stored["blk.1.attn_k.weight"], 2))
