"""Hugging Face folders: the many ways in which configs, weights, tokenizers and templates are saved."""

import io
import json

import numpy as np
import pytest
import sentencepiece

from kvrun.convert import convert, hf_tokenizer
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError
from kvrun.model import load
from support.make_checkpoint import (
    CONFIG,
    hf_folder,
    hf_shapes,
    random_tensors,
    save_safetensors,
    tokenizer_json,
    write_json,
)

CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
}


def describe(tmp_path, without=(), **changes):
    config = {key: value for key, value in {**CONFIG, **changes}.items() if key not in without}
    folder = hf_folder(tmp_path / "hf", config, random_tensors(hf_shapes(config)))
    return open_checkpoint(str(folder)).description


def test_description(tmp_path):
    description = describe(tmp_path)
    for theirs, ours in CONFIG_NAMES.items():
        assert getattr(description, ours) == CONFIG[theirs]
    assert (description.architecture, description.name, description.head_dim) == ("llama", "hf", 16)
    assert (description.norm_eps, description.rope_theta, description.rope_scaling) == (1e-5, 10000.0, None)
    assert (description.attention_scale, description.activation) == (0.25, "silu")
    assert (description.tie_embeddings, description.attention_bias, description.mlp_bias) == (
        True,
        False,
        False,
    )


def test_defaults_and_null_values(tmp_path):
    description = describe(
        tmp_path,
        (
            "num_key_value_heads",
            "rms_norm_eps",
            "rope_theta",
            "hidden_act",
            "max_position_embeddings",
            "architectures",
        ),
        head_dim=None,
        rope_scaling=None,
        attention_bias=None,
        mlp_bias=None,
        pretraining_tp=1,
    )
    assert (description.n_kv_heads, description.norm_eps, description.rope_theta) == (4, 1e-6, 10000.0)
    assert (description.context_length, description.activation, description.rope_scaling) == (
        2048,
        "silu",
        None,
    )


def test_an_untied_head_is_the_default(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    checkpoint = open_checkpoint(str(hf_folder(tmp_path / "hf", config)))
    assert not checkpoint.description.tie_embeddings and "head.weight" in checkpoint.tensors


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA3_OURS = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context_length": 128.0,
}


@pytest.mark.parametrize(
    "changes, theta, scaling",
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, {"type": "linear", "factor": 4.0}),
        ({"rope_scaling": {"rope_type": "default"}}, 1e4, None),
        ({"rope_scaling": {"type": "default"}, "partial_rotary_factor": 1}, 1e4, None),
        ({"rope_scaling": {}, "partial_rotary_factor": None}, 1e4, None),
        ({"rope_parameters": {}}, 1e4, None),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 3e5}}, 3e5, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_theta": 3e5}},
            1e4,
            {"type": "linear", "factor": 4.0},
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "type": "llama3", **LLAMA3}, "rope_theta": 5e5},
            5e5,
            LLAMA3_OURS,
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e5}, "rope_theta": None}, 2e5, None),
        ({"rope_parameters": {"rope_theta": 3e5}}, 3e5, None),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, 5e5, LLAMA3_OURS),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 7e4},
            7e4,
            {"type": "linear", "factor": 2.0},
        ),
    ],
)
def test_rope(tmp_path, changes, theta, scaling):
    description = describe(tmp_path, **changes)
    assert (description.rope_theta, description.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"rope_scaling": {"type": "spiral", "factor": 4}},
            "rope_scaling: rope type 'spiral' is not supported yet",
        ),
        ({"rope_parameters": {"rope_type": "mrope", "factor": 4}}, "rope_parameters: rope type 'mrope'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": "x"}}, "rope_scaling: field beta_fast"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 8}}, "rope_scaling: field long_factor: missing"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": [2] * 7}},
            "rope_scaling: 7 long_factors where the rotary width needs 8",
        ),
        ({"rope_scaling": {"factor": 4}}, "type: missing"),
        *(({"rope_scaling": value}, "rope_scaling: not a JSON object") for value in ("linear", "", 0, [], False, [{}])),
        *(({"rope_parameters": value}, "rope_parameters: not a JSON object") for value in ("linear", 0, [], True)),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": 1}, "rope_parameters: not a JSON object"),
        ({"rope_scaling": {"rope_type": 5}}, "rope_scaling: field rope_type: 5 is not a text"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2}}, "field type: .* is not a text"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "field factor: '2' is not a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "field factor: True is not a positive number"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "field rope_theta: '1e4' is not a positive number"),
        ({"rope_parameters": {"partial_rotary_factor": "1"}}, "field partial_rotary_factor: '1'"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "rope_type": "llama3", "factor": None}}, "factor"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu' is not supported yet"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "field partial_rotary_factor: 0.5: transformers ignores it"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: field partial_rotary_factor: 0.5: tr"),
        ({"rope_parameters": {"full_attention": {}}}, "field full_attention: .* not one for each kind"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "n_kv_heads"),
        ({"num_attention_heads": 5}, "num_attention_heads: 5 does not divide the hidden size 64"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers: 1073741824 is not an integer from 1 to 4096"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"head_dim": 7}, "head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"vocab_size": 41}, r"embed_tokens.weight has shape \[40, 64\], but the config says \[41, 64\]"),
        ({"intermediate_size": 95}, "has shape"),
        ({"num_hidden_layers": 3}, "layers.2.self_attn.q_proj.weight is missing"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"architectures": "Llama"}, "architectures"),
        (
            {"architectures": ["MambaForCausalLM"]},
            r"not supported yet: MambaForCausalLM \(supported: LlamaForCausalLM",
        ),
        ({"architectures": None, "model_type": "gpt_bigcode"}, "not supported yet: gpt_bigcode"),
        ({"architectures": [], "model_type": None}, "architectures: missing"),
        ({"vocab_size": 10**30}, "vocab_size"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, changes, says):
    folder = hf_folder(tmp_path / "hf")
    write_json(folder / "config.json", {**CONFIG, **changes})
    with pytest.raises(ConvertError, match=says) as caught:
        open_checkpoint(str(folder))
    assert str(folder) in str(caught.value)


# --- weights


def names(folder):
    return {name: tensor.name for name, tensor in open_checkpoint(str(folder)).tensors.items()}


def test_names_with_and_without_prefix_and_leftovers(tmp_path):
    tensors = random_tensors(hf_shapes())
    bare = {name.removeprefix("model."): a for name, a in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    bare["rotary_emb.inv_freq"] = np.ones(8, np.float32)
    folder = hf_folder(tmp_path / "hf", tensors=bare)
    assert names(folder)["layers.1.attn.q.weight"] == "layers.1.self_attn.q_proj.weight"
    assert open_checkpoint(str(folder)).surplus == ()
    both = {"norm.weight": tensors["model.norm.weight"] + 1, **tensors}
    checkpoint = open_checkpoint(str(hf_folder(tmp_path / "both", tensors=both)))
    assert checkpoint.tensors["norm.weight"].name == "model.norm.weight"
    assert checkpoint.surplus == ("1 tensor that the model does not need (norm.weight)",)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module.{name.removeprefix('model.')}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: name.replace("model.", "model._fsdp_wrapped_module.").replace("mlp.", "mlp._orig_mod."),
    ],
)
def test_names_of_wrapped_models(tmp_path, wrapped):
    """By DDP, torch.compile, PEFT, FSDP: the same model file as without."""
    config, tensors = {**CONFIG, "tie_word_embeddings": False}, random_tensors(hf_shapes())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    plain = hf_folder(tmp_path / "plain" / "hf", config, tensors)
    other = hf_folder(tmp_path / "other" / "hf", config, {wrapped(name): a for name, a in tensors.items()})
    for folder in (plain, other):
        result = convert(folder, folder.parent / "model.bin", strict=True)
        assert not any("left out" in note for note in result.notes)
    assert (plain.parent / "model.bin").read_bytes() == (other.parent / "model.bin").read_bytes()


@pytest.mark.parametrize("before", ["model.", "llm.", "module.pretrained_model.", "x.model.", "a.b._orig_mod."])
def test_names_of_a_model_inside_of_another_module(tmp_path, before):
    config, tensors = {**CONFIG, "tie_word_embeddings": False}, random_tensors(hf_shapes())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    plain = hf_folder(tmp_path / "plain" / "hf", config, tensors)
    inside = {before + name: a for name, a in tensors.items()}
    other = hf_folder(tmp_path / "other" / "hf", config, inside)
    convert(plain, tmp_path / "plain.bin", strict=True)
    result = convert(other, tmp_path / "other.bin", strict=True)
    outer = before.removeprefix("module.").replace("_orig_mod.", "")
    assert f"names of tensors are taken without {outer}, which is before them" in result.notes
    assert (tmp_path / "plain.bin").read_bytes() == (tmp_path / "other.bin").read_bytes()
    hf_folder(tmp_path / "other" / "hf", config, inside | {"v_head.weight": np.ones((1, 64), np.float32)})
    surplus = open_checkpoint(str(other)).surplus
    assert surplus == ("1 tensor that the model does not need (v_head.weight)",)
    twice = hf_folder(tmp_path / "twice", config, inside | {f"ema.{name}": a for name, a in tensors.items()})
    with pytest.raises(ConvertError, match="no tensor has a name of a LlamaForCausalLM|embed_tokens.weight is missing"):
        open_checkpoint(str(twice))  # either could be meant


SURPLUS = {
    "v_head.weight": (1, 64),
    "lm_head.bias": (40,),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "model.layers.1.self_attn.k_scale": (1,),
    "model.layers.0.self_attn.q_norm.weight": (16,),
    "model.layers.2.mlp.up_proj.weight": (96, 64),
    "mtp.layers.0.norm.weight": (64,),
    "model.vision_tower.patch.weight": (3, 5, 2, 2),
    "model.embed_tokens.weight2": (40, 64),
}


def test_tensors_that_the_model_does_not_need(tmp_path):
    """As in transformers they do not count, and one line says so; strict refuses them."""
    tensors = random_tensors(hf_shapes())
    convert(hf_folder(tmp_path / "plain" / "hf", tensors=tensors), tmp_path / "plain.bin")
    for name, shape in SURPLUS.items():
        folder = hf_folder(tmp_path / "one" / "hf", tensors=tensors | {name: np.ones(shape, np.float32)})
        notes = convert(folder, tmp_path / "one.bin").notes
        assert f"left out: 1 tensor that the model does not need ({name})" in notes
        assert (tmp_path / "plain.bin").read_bytes() == (tmp_path / "one.bin").read_bytes()
        with pytest.raises(ConvertError, match=f"{name}.; without strict they are left out"):
            convert(folder, tmp_path / "one.bin", strict=True)
    more = {name: np.ones(shape, np.float32) for name, shape in SURPLUS.items()}
    folder = hf_folder(tmp_path / "all" / "hf", tensors=tensors | more)
    first = "lm_head.bias, model.embed_tokens.weight2, model.layers.0.self_attn.q_norm.weight, ..."
    assert open_checkpoint(str(folder)).surplus == (f"9 tensors that the model does not need ({first})",)
    content, entry = (folder / "model.safetensors").read_bytes(), b'"v_head.weight": {"dtype": "F32"'
    assert entry in content
    (folder / "model.safetensors").write_bytes(content.replace(entry, entry.replace(b"F", b"I")))  # not read as weights
    assert len(open_checkpoint(str(folder)).surplus) == 1


@pytest.mark.parametrize(
    "name, says",
    [
        ("model.layers.0.mlp.up_proj.weight_scale", "up_proj.weight_scale: a weight is quantised"),
        ("model.layers.0.mlp.up_proj.qweight", "up_proj.qweight: quantised with GPTQ or AWQ"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", "saved with an adapter that is not merged into"),
        ("model.layers.0.mlp.up_proj.base_layer.weight", "saved with an adapter that is not merged into it"),
    ],
)
def test_tensors_that_are_more_than_surplus(tmp_path, name, says):
    tensors = random_tensors(hf_shapes()) | {name: np.ones(3, np.float32)}
    with pytest.raises(ConvertError, match=says):
        names(hf_folder(tmp_path / "hf", tensors=tensors))


def test_names_of_another_kind(tmp_path):
    tensors = {f"backbone.{name.replace('_', '')}": a for name, a in random_tensors(hf_shapes()).items()}
    tensors = {name.replace("layers", "blocks").replace("norm", "ln"): a for name, a in tensors.items()}
    says = "no tensor has a name of a LlamaForCausalLM; there is backbone.model.blocks.0.in.* and not model.embed"
    with pytest.raises(ConvertError, match=says):
        names(hf_folder(tmp_path / "hf", tensors=tensors))


def test_a_model_without_an_output_head(tmp_path):
    """The base class is a language model if the embedding is its head too."""
    tensors = {name.removeprefix("model."): a for name, a in random_tensors(hf_shapes()).items()}
    config = {**CONFIG, "architectures": ["LlamaModel"]}
    checkpoint = open_checkpoint(str(hf_folder(tmp_path / "tied", config, tensors)))
    assert checkpoint.description.architecture == "llama" and checkpoint.description.tie_embeddings
    config["tie_word_embeddings"] = False
    with pytest.raises(ConvertError, match="lm_head.weight is missing, and tie_word_embeddings is not true: without"):
        open_checkpoint(str(hf_folder(tmp_path / "untied", config, tensors)))


def test_a_tied_head_that_is_stored_anyway(tmp_path):
    tensors = random_tensors(hf_shapes())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert "head.weight" not in names(hf_folder(tmp_path / "hf", tensors=tensors))
    tensors["lm_head.weight"][3, 5] += 1
    with pytest.raises(ConvertError, match="tie_word_embeddings: true, but lm_head.weight differs"):
        names(hf_folder(tmp_path / "hf", tensors=tensors))


def test_a_head_where_the_config_does_not_say(tmp_path):
    """SmolLM3's head is the embedding by default, but not if there is another one."""
    config = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    config["architectures"] = ["SmolLM3ForCausalLM"]
    tensors = random_tensors(hf_shapes())
    embed = tensors["model.embed_tokens.weight"]
    for head, tied in ((None, True), (embed.copy(), True), (embed + 1, False)):
        more = {} if head is None else {"lm_head.weight": head}
        checkpoint = open_checkpoint(str(hf_folder(tmp_path / "hf", config, tensors | more)))
        assert checkpoint.description.tie_embeddings is tied and checkpoint.surplus == ()
        assert ("head.weight" in checkpoint.tensors) is not tied


def sharded(tmp_path, with_index=True):
    tensors = list(random_tensors(hf_shapes()).items())
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    files = {f"model-0000{i + 1}-of-00003.safetensors": dict(tensors[i::3]) for i in range(3)}
    for file, part in files.items():
        save_safetensors(folder / file, part)
    if with_index:
        weight_map = {name: file for file, part in files.items() for name in part}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


@pytest.mark.parametrize("with_index", [True, False])
def test_shards(tmp_path, with_index):
    checkpoint = open_checkpoint(str(sharded(tmp_path, with_index)))
    assert len({t.path for t in checkpoint.tensors.values()}) == 3 and len(checkpoint.tensors) == len(hf_shapes())
    (tmp_path / "hf" / "model-00002-of-00003.safetensors").unlink()
    says = "model-00002-of-00003.safetensors is missing" if with_index else "2 of 3 safetensors files"
    with pytest.raises(ConvertError, match=says):
        open_checkpoint(str(tmp_path / "hf"))


def test_an_index_that_is_wrong(tmp_path):
    folder = sharded(tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for weight_map, says in [
        (
            {**index["weight_map"], "model.norm.weight": "model-00001-of-00003.safetensors"},
            "the index says it is here",
        ),
        ({**index["weight_map"], "model.norm.weight": "../model.safetensors"}, "not a file name"),
        ({**index["weight_map"], "model.norm.weight": "/model.safetensors"}, "not a file name"),
        ({**index["weight_map"], "model.norm.weight": ".."}, "it is a folder"),
        ({**index["weight_map"], "model.norm.weight": "x\0.safetensors"}, "is missing"),
        ({**index["weight_map"], "model.norm.weight": "\ud800"}, "is missing"),
        ({**index["weight_map"], "model.norm.weight": "x" * 5000}, "is not a file name"),
        ({**index["weight_map"], "model.norm.weight": "config.json"}, "not a safetensors file"),
        ({**index["weight_map"], "model.norm.weight": 7}, "not a file name"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ]:
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
        with pytest.raises(ConvertError, match=says):
            open_checkpoint(str(folder))


def test_an_index_of_what_nobody_needs(tmp_path):
    """Files and tensors that are only missing by the index, and a tensor that it does not have."""
    folder = sharded(tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    del index["model.norm.weight"]
    index |= {"v_head.weight": "model-00001-of-00003.safetensors", "vision.weight": "gone.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tensors["norm.weight"].name == "model.norm.weight"
    assert checkpoint.surplus == ("2 tensors that the model does not need (v_head.weight, vision.weight)",)
    index["model.layers.0.mlp.up_proj.weight"] = "gone.safetensors"
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    with pytest.raises(ConvertError, match="gone.safetensors is missing; the index says that it has tensor model"):
        open_checkpoint(str(folder))


def test_a_tensor_in_two_shards(tmp_path):
    folder = sharded(tmp_path, with_index=False)
    save_safetensors(folder / "model-00003-of-00003.safetensors", random_tensors(hf_shapes()))
    with pytest.raises(ConvertError, match="is also in"):
        open_checkpoint(str(folder))


def test_which_files_are_weights(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert names(folder)
    (folder / "weights.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ConvertError, match="adapter"):
        names(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConvertError, match="no safetensors file"):
        names(folder)


def test_types_that_are_not_supported_are_named(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ConvertError, match="embed_tokens.weight has type I32, which is not supported yet"):
        names(folder)


# --- tokenizer and settings


def test_neither_tokenizer(tmp_path):
    folder = hf_folder(tmp_path / "hf", tokenizer=False)
    with pytest.raises(ConvertError, match="neither tokenizer.json nor tokenizer.model"):
        open_checkpoint(str(folder))
    assert open_checkpoint(str(folder), tokenizer=False).vocabulary.kind == "none"


def test_a_damaged_tokenizer(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    for content in (b"", b"{", b"[]", b'{"model": {}}', b"\xff"):
        (folder / "tokenizer.json").write_bytes(content)
        with pytest.raises(ConvertError, match="tokenizer.json: the tokenizer cannot be loaded"):
            open_checkpoint(str(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ConvertError, match="tokenizer.model: the tokenizer cannot be loaded"):
        open_checkpoint(str(folder))


def trained_sentencepiece():
    """A small tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 50),
        model_writer=model,
        vocab_size=38,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def test_a_library_that_gives_up(tmp_path, monkeypatch):
    """What Rust panics with is no Exception."""

    class PanicException(BaseException):
        pass

    def panic(*args):
        raise PanicException("range end index\nout of range")

    monkeypatch.setattr(hf_tokenizer, "undeclared_ends", panic)
    with pytest.raises(ConvertError, match="tokenizer.json: the tokenizer cannot be loaded: range end index$"):
        open_checkpoint(str(hf_folder(tmp_path / "hf")))


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"added_tokens_decoder": []}, "added_tokens_decoder: not a JSON object"),
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "added_tokens_decoder: entry 'x' is not a token"),
        ({"bos_token": "\udc80"}, "bos_token: not valid Unicode"),
    ],
)
def test_what_tokenizer_config_cannot_say(tmp_path, settings, says):
    folder = hf_folder(tmp_path / "hf", tokenizer=False)
    model = trained_sentencepiece()
    (folder / "tokenizer.model").write_bytes(model)
    write_json(folder / "tokenizer_config.json", settings)
    with pytest.raises(ConvertError, match=f"tokenizer_config.json: field {says}"):
        open_checkpoint(str(folder))


def template(*parts):
    steps = [
        {"Sequence": {"id": "A", "type_id": 0}} if p == "A" else {"SpecialToken": {"id": p, "type_id": 0}}
        for p in parts
    ]
    special = {p: {"id": p, "ids": [("<s>", "</s>").index(p)], "tokens": [p]} for p in parts if p != "A"}
    return {"type": "TemplateProcessing", "single": steps, "pair": steps, "special_tokens": special}


@pytest.mark.parametrize(
    "post, config, expected",
    [
        (None, {}, (False, False)),
        (template("<s>", "A"), {}, (True, False)),
        (template("<s>", "A", "</s>"), {}, (True, True)),
        (template("A", "</s>"), {}, (False, True)),
        (template("<s>", "A"), {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, (False, False)),
        (
            None,
            {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": True},
            (True, True),
        ),
        (None, {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, (False, False)),
    ],
)
def test_what_is_put_around_a_text(tmp_path, post, config, expected):
    folder = hf_folder(tmp_path / "hf")
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    write_json(folder / "tokenizer.json", tokenizer_json(post_processor=post, padding=padding))
    write_json(folder / "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>", **config})
    info = open_checkpoint(str(folder)).vocabulary.model_entry(40)
    assert (info["add_bos"], info["add_eos"]) == expected
    assert (info["bos_id"], info["eos_id"], info["pad_id"], info["unk_id"]) == (0, 1, None, None)


def test_ids_come_from_text_and_else_from_the_configs(tmp_path):
    folder = hf_folder(tmp_path / "hf", {**CONFIG, "bos_token_id": 7, "pad_token_id": 9})
    write_json(folder / "tokenizer_config.json", {"bos_token": None, "eos_token": None})
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "</s>"}})
    write_json(folder / "generation_config.json", {"pad_token_id": 500, "eos_token_id": [5, 6]})
    checkpoint = open_checkpoint(str(folder))
    info = checkpoint.vocabulary.model_entry(40)
    assert (info["bos_id"], info["eos_id"], info["pad_id"]) == (7, 1, None)
    assert set(checkpoint.stop_ids) == {1, 5, 6}


def test_stop_ids(tmp_path):
    folder = hf_folder(tmp_path / "hf", {**CONFIG, "eos_token_id": 9})
    tokenizer = tokenizer_json()
    for text, token in (("<|im_end|>", 4), ("<|eot_id|>", 5), ("<|not_known|>", 6)):
        old = next(t for t, i in tokenizer["model"]["vocab"].items() if i == token)
        del tokenizer["model"]["vocab"][old]
        tokenizer["model"]["vocab"][text] = token
        tokenizer["added_tokens"].append(
            {**tokenizer["added_tokens"][0], "id": token, "content": text, "special": token != 5}
        )
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "generation_config.json", {"eos_token_id": [10, 11]})
    # <|eot_id|> ends a turn, though the file has it as an ordinary token.
    assert set(open_checkpoint(str(folder)).stop_ids) == {1, 4, 5, 9, 10, 11}
    write_json(folder / "generation_config.json", {"eos_token_id": "x"})
    with pytest.raises(ConvertError, match="eos_token_id"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "value, expected",
    [
        ("{{ a }}\n", "{{ a }}\n"),
        (None, None),
        ([{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}], "D"),
        ([{"name": "chat", "template": "C"}], "C"),
        ([{"name": "a", "template": "A"}, {"name": "b", "template": "B"}], None),
    ],
)
def test_chat_template_in_the_config(tmp_path, value, expected):
    folder = hf_folder(tmp_path / "hf")
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>", "chat_template": value})
    assert open_checkpoint(str(folder)).chat_template == expected
    (folder / "chat_template.jinja").write_bytes("é\r\n{{ x }}".encode())
    assert open_checkpoint(str(folder)).chat_template == "é\r\n{{ x }}"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConvertError, match="chat_template.jinja"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("value", [7, {}, [], [7], [{"name": [], "template": "x"}], [{"name": "x"}]])
def test_chat_templates_that_are_none(tmp_path, value):
    folder = hf_folder(tmp_path / "hf")
    write_json(folder / "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(ConvertError, match="chat_template"):
        open_checkpoint(str(folder))


def test_sampling(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    write_json(
        folder / "generation_config.json",
        {
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 1,
            "min_p": None,
            "repetition_penalty": 1.1,
            "do_sample": True,
        },
    )
    assert open_checkpoint(str(folder)).sampling == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 1.0,
        "repeat_penalty": 1.1,
    }


IMPOSSIBLE = [
    ("temperature", -1, "temperature: must be at least 0, not -1"),
    ("temperature", "0.7", "temperature: must be a number, not '0.7'"),
    ("temperature", True, "temperature: must be a number, not True"),
    ("temperature", [0.7], "temperature: must be a number, not [0.7]"),
    ("temperature", 10**400, "temperature: must be a number, not "),
    ("temperature", float("inf"), "temperature: must be a finite number, not inf"),
    ("top_p", 1.5, "top_p: must be at least 0 and at most 1, not 1.5"),
    ("top_p", float("nan"), "top_p: must be a finite number, not nan"),
    ("min_p", -0.1, "min_p: must be at least 0 and at most 1, not -0.1"),
    ("top_k", 2**40, "top_k: must be at least 0 and at most 2147483647, not 1099511627776"),
    ("top_k", -1, "top_k: must be at least 0"),
    ("top_k", 2.5, "top_k: must be a whole number, not 2.5"),
    ("top_k", float("nan"), "top_k: must be a whole number, not nan"),
    ("repetition_penalty", 0, "repetition_penalty, repeat_penalty: must be more than 0, not 0"),
]


@pytest.mark.parametrize("name, value, says", IMPOSSIBLE)
def test_a_default_of_sampling_that_cannot_be(tmp_path, name, value, says):
    """It is left out, with a line that says so; the others are kept, and the model runs."""
    folder, other = hf_folder(tmp_path / "hf"), "top_k" if name == "temperature" else "temperature"
    write_json(folder / "generation_config.json", {other: 1, name: value})
    result = convert(folder, tmp_path / "model.bin")
    (note,) = [note for note in result.notes if "a default of" in note]
    assert note.startswith("left out: ") and says in note and len(note) < 200 and "\n" not in note
    assert result.model.sampling == {other: 1}
    assert len(list(load(tmp_path / "model.bin").session().stream([2], max_tokens=2, ignore_eos=True))) <= 2


def test_the_name_of_a_model_in_the_hubs_cache(tmp_path):
    folder = hf_folder(tmp_path / "models--Org--Some-Model" / "snapshots" / "0123abcd")
    assert open_checkpoint(str(folder)).description.name == "Some-Model"


def test_sentencepiece(tmp_path):
    folder, model = hf_folder(tmp_path / "hf", tokenizer=False), trained_sentencepiece()
    (folder / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    piece, size = processor.id_to_piece(3), processor.get_piece_size()
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "legacy": False,
            "added_tokens_decoder": {
                "3": {"content": piece, "special": False},
                str(size): {"content": "<|im_end|>", "special": True, "rstrip": True},
                str(size + 1): {"content": "<tool>", "special": False, "lstrip": True, "single_word": True},
            },
        },
    )
    vocabulary = open_checkpoint(str(folder)).vocabulary
    info = vocabulary.model_entry(40)
    assert (vocabulary.kind, vocabulary.data) == ("tokenizer.model", model)
    assert (info["bos_id"], info["eos_id"], info["pad_id"], info["unk_id"]) == (1, size, None, 0)
    assert (info["add_bos"], info["add_eos"], info["legacy"], info["added_tokens"]) == (
        True,
        False,
        False,
        {"<s>": 1, piece: 3, "<|im_end|>": size, "<tool>": size + 1},
    )
    assert (info["visible"], info["lstrip"], info["rstrip"]) == ([3, size + 1], [size + 1], [size])
    assert info["single_word"] == [size + 1]
    assert size in open_checkpoint(str(folder)).stop_ids
