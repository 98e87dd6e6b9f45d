"""GGUF files: the reader against the gguf package, descriptions, parts, and damage."""

import contextlib

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrun.convert import convert
from kvrun.convert.gguf_file import GgufFile
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError
from kvrun.files.model_file import read_model_file
from support import cases
from support.make_checkpoint import gguf_shapes, random_tensors, save_gguf


@pytest.fixture
def path(tmp_path):
    save_gguf(tmp_path / "m.gguf", {"attn_v": "Q8_0", "ffn_up": "Q5_0", "ffn_down": "Q5_1"})
    return tmp_path / "m.gguf"


def describe(tmp_path, **options):
    save_gguf(tmp_path / "m.gguf", **options)
    return open_checkpoint(str(tmp_path / "m.gguf")).description


def test_the_reader_agrees_with_the_gguf_package(path):
    reader, file = gguf.GGUFReader(str(path)), GgufFile(str(path))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            expected = field.contents()
            assert file.metadata[key] == (pytest.approx(expected, rel=1e-7) if type(expected) is float else expected)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = file.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist())) and ours.offset == tensor.data_offset
        assert (ours.type.upper(), ours.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert ours.raw(0, ours.rows).tobytes() == tensor.data.tobytes()


def test_every_kind_of_value(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    values = {
        "u8": 200,
        "i8": -100,
        "u16": 60000,
        "i16": -30000,
        "u32": 4 << 29,
        "i32": -5,
        "u64": 1 << 60,
        "i64": -(1 << 60),
        "f32": 0.1,
        "f64": 0.1,
        "bool": True,
        "string": "ä\0€",
        "strings": ["a", ""],
        "ints": [1, 2],
        "bools": [True, False],
        "floats": [0.5, 0.25],
    }
    methods = {
        "u8": "uint8",
        "i8": "int8",
        "u16": "uint16",
        "i16": "int16",
        "u32": "uint32",
        "i32": "int32",
        "u64": "uint64",
        "i64": "int64",
        "f32": "float32",
        "f64": "float64",
    }
    for name, value in values.items():
        kind = "array" if isinstance(value, list) else methods.get(name, name)
        getattr(writer, f"add_{kind}")(f"x.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GgufFile(str(tmp_path / "m.gguf")).metadata
    assert {name: found[f"x.{name}"] for name in values} == values


def test_description(tmp_path):
    description = describe(tmp_path, metadata={"general.name": "Tiny", "llama.rope.freq_base": 5e5})
    assert (description.name, description.vocab_size, description.n_layers) == ("Tiny", 40, 2)
    assert (description.hidden_size, description.intermediate_size, description.head_dim) == (64, 96, 16)
    assert (description.n_heads, description.n_kv_heads, description.context_length) == (4, 2, 256)
    assert (description.norm_eps, description.rope_theta, description.rope_scaling) == (1e-5, 5e5, None)
    assert description.tie_embeddings and not description.attention_bias


def test_defaults_and_other_ways_to_say_it(tmp_path):
    description = describe(
        tmp_path,
        metadata={
            "llama.rope.freq_base": None,
            "llama.vocab_size": 40,
            "llama.attention.head_count_kv": [2, 2],
            "llama.rope.dimension_count": 16,
            "llama.attention.key_length": 16,
            "llama.attention.scale": 0.5,
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 4.0,
            "llama.expert_count": 0,
        },
    )
    assert (description.name, description.rope_theta, description.n_kv_heads) == ("m", 1e4, 2)
    assert (description.rope_scaling, description.attention_scale) == ({"type": "linear", "factor": 4.0}, 0.5)


def test_rope_factors(tmp_path):
    factors = np.array([1, 1, 2, 4, 8, 8, 8, 8], np.float32)
    tensors = random_tensors(gguf_shapes())
    found = describe(tmp_path, tensors={**tensors, "rope_freqs.weight": factors})
    assert found.rope_scaling == {"type": "factors", "factors": factors.tolist()}
    found = describe(tmp_path, tensors={**tensors, "rope_freqs.weight": np.ones(8, np.float32)})
    assert found.rope_scaling is None
    with pytest.raises(ConvertError, match="rope_scaling"):
        describe(tmp_path, tensors={**tensors, "rope_freqs.weight": factors[:5]})


@pytest.mark.parametrize(
    "metadata, factor",
    [
        ({"factor": 4.0}, 4.0),  # without a type it is linear, as in llama.cpp
        ({"type": "linear"}, 1.0),
        ({"type": "none", "factor": 4.0}, 1.0),
        ({"factor": 0.0}, 1.0),
        ({"factor": 1.0}, 1.0),
        ({"scale_linear": 3.0}, 3.0),  # what it was called in the first files
        ({"type": "linear", "scale_linear": 3.0}, 3.0),
        ({"factor": 2.0, "scale_linear": 3.0}, 2.0),
    ],
)
def test_linear_scaling(tmp_path, metadata, factor):
    names = {"scale_linear": "llama.rope.scale_linear"}
    given = {names.get(key, f"llama.rope.scaling.{key}"): value for key, value in metadata.items()}
    expected = {"type": "linear", "factor": factor} if factor != 1 else None
    assert describe(tmp_path, metadata=given).rope_scaling == expected
    tensors = {**random_tensors(gguf_shapes()), "rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}
    scaling = describe(tmp_path, metadata=given, tensors=tensors).rope_scaling
    assert scaling == {"type": "factors", "factors": [factor * i for i in range(1, 9)]}


def test_an_amplitude(tmp_path):
    """llama.cpp obeys rope.scaling.attn_factor whatever the type."""
    given = {"llama.rope.scaling.attn_factor": 1.25, "llama.rope.scaling.factor": 4.0}
    d = describe(tmp_path, metadata=given)
    plain = d.rope_theta ** (-np.arange(8) / 8)
    for ctx in (64, d.context_length, 4 * d.context_length):
        assert np.allclose(d.rope_tables(ctx).inv_freq[0], plain / 4) and (d.rope_tables(ctx).amplitude == 1.25).all()
    assert d.usual_context == d.context_length
    tensors = {**random_tensors(gguf_shapes()), "rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}
    d = describe(tmp_path, metadata=given | {"llama.rope.scaling.type": "none"}, tensors=tensors)
    assert np.allclose(d.rope_tables().inv_freq[0], plain / np.arange(1, 9)) and d.rope_tables().amplitude[0, 0] == 1.25


def test_two_scalings_at_once(tmp_path):
    tensors, eight = random_tensors(gguf_shapes()), np.arange(1, 9, dtype=np.float32)
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    both = {"rope_factors_long.weight": eight, "rope_factors_short.weight": eight}
    for more, metadata, says in [
        ({"rope_freqs.weight": eight}, yarn, "type: 'yarn' and the tensor rope_freqs.weight are two scalings"),
        (both, yarn, "type: 'yarn' and the tensor rope_factors_long.weight are two scalings"),
        (both | {"rope_freqs.weight": eight}, {}, "rope_freqs.weight and the tensor rope_factors_long.weight are two"),
    ]:
        with pytest.raises(ConvertError, match=says):
            describe(tmp_path, tensors={**tensors, **more}, metadata=metadata)


def test_defaults_of_sampling(tmp_path):
    """Those that cannot be are left out, with a line that says so."""
    metadata = {"general.sampling.temp": 0.5, "general.sampling.top_p": 1.5, "general.sampling.penalty_repeat": -1.0}
    save_gguf(tmp_path / "m.gguf", metadata=metadata)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    assert checkpoint.sampling == {"temperature": 0.5}
    assert checkpoint.notes == (
        "left out: a default of general.sampling.top_p, top_p: must be at least 0 and at most 1, not 1.5",
        "left out: a default of general.sampling.penalty_repeat, repeat_penalty: must be more than 0, not -1.0",
    )


def test_an_output_tensor_unties(tmp_path):
    tensors = random_tensors({**gguf_shapes(), "output.weight": (40, 64)})
    assert not describe(tmp_path, tensors=tensors).tie_embeddings


@pytest.mark.parametrize(
    "metadata, says",
    [
        ({"general.architecture": "mamba"}, r"not supported yet: mamba \(supported: llama, qwen2, "),
        ({"general.type": "adapter"}, "m.gguf: an adapter, not a model; merge it into its base model first"),
        ({"general.type": "mmproj", "general.architecture": "clip"}, "the part of a model for images or sound"),
        ({"general.architecture": "clip"}, "convert the file of its text model"),
        ({"general.type": "imatrix"}, "an importance matrix, not a model"),
        ({"llama.block_count": None}, "llama.block_count: missing"),
        ({"llama.block_count": "2"}, "llama.block_count"),
        ({"llama.block_count": 1 << 30}, "llama.block_count: 1073741824 is not an integer from 1 to 4096"),
        ({"llama.block_count": 3}, "blk.2.attn_q.weight is missing"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, "expert_count: 8, but no layer has a ffn_gate_inp"),
        ({"llama.rope.dimension_count": 18}, "rope.dimension_count: 18 is not an even number up to the head's 16"),
        ({"llama.rope.dimension_count": 7}, "rope.dimension_count"),
        ({"llama.embedding_length": 32}, "has shape"),
        ({"llama.rope.scaling.type": "spiral"}, "rope.scaling.type: 'spiral' is not supported yet"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope', but rope_factors_long.weight and .* are missing"),
        ({"llama.rope.scaling.factor": -4.0}, "rope.scaling.factor: -4.0 is not a positive number"),
        ({"llama.attention.causal": False}, "attention.causal: False: attention to later tokens"),
        ({"llama.rope.dimension_count_swa": 8}, "rope.dimension_count_swa: 8: layers with a window that differ"),
        ({"llama.attention.head_count_kv": [1, 2]}, "different values per layer"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon: missing"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"split.count": 1 << 31}, "split.count: 2147483648 is not an integer from 0 to 99999"),
        ({"llama.vocab_size": 41}, r"token_embd.weight has shape \[40, 64\]"),
        ({"llama.logit_scale": 2.0}, "logit_scale"),
        ({"llama.attention.head_count": 100}, "head_count: 100 does not divide"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, metadata, says):
    with pytest.raises(ConvertError, match=says):
        describe(tmp_path, metadata=metadata)


def test_missing_tensors(tmp_path):
    tensors = random_tensors(gguf_shapes())
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ConvertError, match="blk.1.ffn_up.weight is missing"):
        describe(tmp_path, tensors=tensors)


def test_tensors_that_the_model_does_not_need(tmp_path):
    """They are left out, with one line, or refused if strict."""
    more = dict.fromkeys(("v.blk.0.attn_q.weight", "mm.0.weight", "blk.2.nextn.eh_proj.weight", "v_head.weight"))
    more = {name: np.ones((4, 32), np.float32) for name in more}
    save_gguf(tmp_path / "m.gguf", tensors=random_tensors(gguf_shapes()) | more)
    result = convert(tmp_path / "m.gguf", tmp_path / "model.bin")
    names = "blk.2.nextn.eh_proj.weight, mm.0.weight, v.blk.0.attn_q.weight, ..."
    assert f"left out: 4 tensors that the model does not need ({names})" in result.notes
    with pytest.raises(ConvertError, match="4 tensors that the model does not need .*; without strict they"):
        convert(tmp_path / "m.gguf", tmp_path / "strict.bin", strict=True)
    save_gguf(tmp_path / "m.gguf", tensors=random_tensors(gguf_shapes()))
    assert convert(tmp_path / "m.gguf", tmp_path / "strict.bin", strict=True).notes == []
    assert read_model_file(tmp_path / "strict.bin").weights.keys() == result.model.weights.keys()


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q_norm.weight",
        "blk.1.attn_q.bias",
        "output_norm.bias",
        "blk.0.ffn_up_shexp.weight",
        "blk.1.attn_sinks",
    ],
)
def test_tensors_that_would_act(tmp_path, name):
    """llama.cpp refuses a file with any tensor that it has no use for; leaving out one like these would be wrong."""
    tensors = random_tensors(gguf_shapes()) | {name: np.ones(16, np.float32)}
    with pytest.raises(ConvertError, match=f"tensor {name}: not part of a llama model with this metadata, though"):
        describe(tmp_path, tensors=tensors)


def test_parts(tmp_path):
    tensors = list(random_tensors(gguf_shapes()).items())
    for i in range(3):
        metadata = {"split.count": 3, "split.no": i}
        save_gguf(tmp_path / f"m-0000{i + 1}-of-00003.gguf", tensors=dict(tensors[i::3]), metadata=metadata)
    first = tmp_path / "m-00001-of-00003.gguf"
    checkpoint = open_checkpoint(str(first))
    assert len(checkpoint.files) == 3 and len(checkpoint.tensors) == len(tensors)
    with pytest.raises(ConvertError, match="give the first one"):
        open_checkpoint(str(tmp_path / "m-00002-of-00003.gguf"))
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(ConvertError, match="m-00003-of-00003.gguf: missing"):
        open_checkpoint(str(first))


def test_every_truncation_is_refused(path):
    content = path.read_bytes()
    for size in [*range(4, 2000, 7), len(content) // 2, len(content) - 40]:
        path.write_bytes(content[:size])
        with pytest.raises(ConvertError, match="truncated"):
            open_checkpoint(str(path))


def test_other_versions_and_byte_orders(path):
    content = path.read_bytes()
    for version, says in (
        (b"\1\0\0\0", "version 1 is not supported"),
        (b"\4\0\0\0", "version 4 is not supported"),
        (b"\0\0\0\0", "version 0 is not supported"),
        (b"\0\0\0\3", "big-endian"),
        (b"\0\0\0\2", "big-endian"),
    ):
        path.write_bytes(content[:4] + version + content[8:])
        with pytest.raises(ConvertError, match=says):
            open_checkpoint(str(path))


@settings(max_examples=cases.examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_gives_a_stated_error_or_a_model(path, data):
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, 2500))] = data.draw(st.integers(0, 255))
    other = path.with_name("damaged.gguf")
    other.write_bytes(content)
    with contextlib.suppress(ConvertError):
        open_checkpoint(str(other))
