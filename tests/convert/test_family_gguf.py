"""The families' checkpoints written as GGUF files, names by the gguf package's own table, give the same logits.

Written here as llama.cpp's converter writes them: q and k of some families with the halves of each head interleaved,
Gemma's norms with the 1 that the model adds, GPT-2's matrices the right way round.
"""

import json
import re

import gguf
import numpy as np
import pytest
from gguf.tensor_mapping import get_tensor_name_map
from test_families import CHUNKS, FAMILIES, TOLERANCE, cache_of, engine_of, expected_of, run

from kvrun.convert import convert
from kvrun.convert.gguf_file import GgufFile
from kvrun.convert.huggingface import read_safetensors_header
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError

INTERLEAVED = ("llama", "granite", "smollm3")
ARCHITECTURES = {"gemma3-images": "gemma3", "mistral": "llama", "gpt2-gelu": None, "dynamic-rope": None}
ARCHITECTURES |= {
    "mixtral": "llama",
    "qwen3moe-shares": None,
    "phi3-window": "phi3",
    "partial-rope": None,
}  # None: GGUF cannot say it
NAMES = [p.name for p in sorted(FAMILIES.iterdir()) if ARCHITECTURES.get(p.name, p.name)]


def interleave(rows, n_heads):
    return rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def metadata(arch, c):
    """What llama.cpp's converter writes of a config, under the architecture's prefix."""
    rope = c.get("rope_parameters") or {}
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    heads = c.get("num_attention_heads", c.get("n_head"))
    hidden = c.get("hidden_size", c.get("n_embd"))
    head_dim = c.get("head_dim") or hidden // heads
    values = {
        "block_count": c.get("num_hidden_layers", c.get("n_layer")),
        "context_length": c.get("max_position_embeddings", c.get("n_positions")),
        "embedding_length": hidden,
        "feed_forward_length": c.get("intermediate_size", 4 * hidden),
        "attention.head_count": heads,
        "attention.head_count_kv": c.get("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": c.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": c.get("layer_norm_epsilon"),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": local.get("rope_theta"),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1)),
        "attention.sliding_window": c.get("sliding_window"),
        "attn_logit_softcapping": c.get("attn_logit_softcapping"),
        "final_logit_softcapping": c.get("final_logit_softcapping"),
        "attention.scale": c.get("attention_multiplier")
        or (c["query_pre_attn_scalar"] ** -0.5 if "query_pre_attn_scalar" in c else None),
        "embedding_scale": c.get("embedding_multiplier"),
        "expert_count": c.get("num_local_experts"),
        "expert_used_count": c.get("num_experts_per_tok"),
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
        "residual_scale": c.get("residual_multiplier"),
        "logit_scale": c.get("logits_scaling"),
    }
    if arch in ("gemma3", "qwen2"):
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in c["layer_types"]]
    kind = rope.get("rope_type", "default")
    if kind != "default":
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": rope.get("factor")}
        values["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
        values["rope.scaling.yarn_beta_fast"] = rope.get("beta_fast")
    return {f"{arch}.{key}": value for key, value in values.items() if value is not None}, rope


def tensors(folder, arch, c, apart=False):
    """(name in GGUF, float32 values) of the text model's tensors. `apart`: one tensor for each expert, as in files of
    Mixtral from before one held all of a layer."""
    experts, dense = {}, get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    names = get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), 8)
    for name, tensor in read_safetensors_header(str(folder / "model.safetensors")).items():
        if "vision" in name or "projector" in name:
            continue
        name = name.replace("language_model.model.", "model.")
        value = tensor.floats(0, tensor.rows).reshape(tensor.shape)
        if arch in INTERLEAVED and ".q_proj" in name:
            value = interleave(value, c["num_attention_heads"])
        if arch in INTERLEAVED and ".k_proj" in name:
            value = interleave(value, c["num_key_value_heads"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.T
        stem, _, suffix = name.rpartition(".")
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.\d+\.(\w+)", stem):
            merged = "layers.{}.feed_forward.experts.{}" if arch == "llama" else "model.layers.{}.mlp.experts.{}"
            experts.setdefault(f"{names.get_name(merged.format(*match.groups()))}.weight", []).append(value)
        else:
            yield f"{names.get_name(stem) or dense.get_name(stem)}.{suffix}", value
    for name, values in experts.items():
        if apart:
            yield from ((name.replace("_exps", f".{e}"), value) for e, value in enumerate(values))
        else:
            yield name, np.stack(values)


def write(path, folder, extra=(), changes=None, apart=False):
    """`changes`: metadata to set or, with None, to leave out."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    arch = ARCHITECTURES.get(folder.name, folder.name)
    values, rope = metadata(arch, config)
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in (values | (changes or {})).items():
        if value is not None:
            add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
            add.get(type(value), writer.add_float32)(key, value)
    pairs = [*tensors(folder, arch, config, apart), *extra]
    if "long_factor" in rope:
        pairs += [(f"rope_factors_{x}.weight", np.array(rope[f"{x}_factor"], np.float32)) for x in ("long", "short")]
    for name, value in pairs:
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, tmp_path):
    source = write(tmp_path / "model.gguf", FAMILIES / name)
    model = convert(source, tmp_path / "model.bin", tokenizer=False).model
    expected = expected_of(name)
    for chunks in (CHUNKS["at once"], CHUNKS["one by one"]):
        logits = run(engine_of(tmp_path / "model.bin"), expected.tokens, chunks, **cache_of(name))
        assert expected.error(logits) <= TOLERANCE
    assert model.description.architecture == ARCHITECTURES.get(name, name)


def test_mixtral_with_a_tensor_for_each_expert(tmp_path):
    """The same model file, but for the name of its source."""
    for apart in (True, False):
        source = write(tmp_path / "mixtral.gguf", FAMILIES / "mixtral", apart=apart)
        convert(source, tmp_path / f"{apart}.bin", tokenizer=False)
    names = GgufFile(str(write(source, FAMILIES / "mixtral", apart=True))).tensors
    assert "blk.1.ffn_down.3.weight" in names and not any("exps" in name for name in names)
    assert (tmp_path / "True.bin").read_bytes() == (tmp_path / "False.bin").read_bytes()


def test_an_expert_that_is_not_there(tmp_path):
    with pytest.raises(ConvertError, match="tensor blk.0.ffn_gate.5.weight is missing"):
        write(tmp_path / "mixtral.gguf", FAMILIES / "mixtral", changes={"llama.expert_count": 6}, apart=True)
        open_checkpoint(str(tmp_path / "mixtral.gguf"), tokenizer=False)


def described(tmp_path, name, extra=(), **changes):
    source = write(
        tmp_path / "model.gguf", FAMILIES / name, extra, {k.replace("__", "."): v for k, v in changes.items()}
    )
    return open_checkpoint(str(source), tokenizer=False).description


def test_a_copied_head_is_dropped(tmp_path):
    """Files of GPT-2 have its tied head a second time."""
    embed = dict(tensors(FAMILIES / "gpt2", "gpt2", {}))["token_embd.weight"]
    assert described(tmp_path, "gpt2", [("output.weight", embed)]).tie_embeddings
    assert not described(tmp_path, "gpt2", [("output.weight", embed + 1)]).tie_embeddings


def test_what_a_file_does_not_say(tmp_path):
    """Defaults of an architecture, from before there was metadata for it."""
    gone = dict.fromkeys(("gemma3__attention__scale", "gemma3__rope__freq_base_swa", "gemma3__rope__freq_base"))
    found = described(tmp_path, "gemma3", **gone, gemma3__attention__sliding_window_pattern=None)
    assert (found.attention_scale, found.rope_theta, found.rope_local["theta"]) == (12**-0.5, 1e6, 1e4)
    assert found.sliding_windows == (70, 70, 70)  # the sixth layer would be the first to see everything
    found = described(tmp_path, "gemma2", gemma2__attn_logit_softcapping=None, gemma2__final_logit_softcapping=None)
    assert (found.attention_softcap, found.logit_softcap, found.sliding_windows) == (50, 30, (33, None))
    found = described(tmp_path, "phi3", phi3__rope__scaling__attn_factor=1.5)
    assert found.rope_scaling["attention_factor"] == 1.5


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("qwen3moe", {"qwen3moe__expert_used_count": 8}, "experts_used: 8 is not between 1 and 7"),
        (
            "qwen3moe",
            {"qwen3moe__expert_count": 6},
            r"ffn_gate_inp.weight has shape \[7, 36\], but the config",
        ),
        ("qwen3moe", {"qwen3moe__expert_shared_count": 1}, "expert_shared_count: 1: not supported"),
        (
            "gemma3",
            {"gemma3__attention__sliding_window_pattern": [True]},
            "sliding_window_pattern: not a truth value",
        ),
        ("phi3", {"phi3__rope__dimension_count": 14}, "6 short_factors where the rotary width needs 7"),
        ("phi3", {"phi3__rope__dimension_count": 26}, "rope.dimension_count: 26 is not an even number"),
        ("granite", {"granite__logit_scale": -1.0}, "granite.logit_scale: -1.0 is not a positive number"),
        ("gpt2", {"gpt2__attention__layer_norm_epsilon": None}, "gpt2.attention.layer_norm_epsilon: missing"),
        (
            "gpt2",
            {"gpt2__context_length": 100},
            r"position_embd.weight has shape \[200, 36\], but the config",
        ),
        (
            "qwen2",
            {"qwen2__rope__scaling__type": "spiral"},
            "rope.scaling.type: 'spiral' is not supported yet",
        ),
        ("phi3", {"phi3__attention__head_count": 4}, r"attn_qkv.weight has shape \[96, 48\], but the config"),
    ],
)
def test_contradictions_are_named(name, changes, says, tmp_path):
    with pytest.raises(ConvertError, match=says):
        described(tmp_path, name, **changes)


def test_half_of_the_rope_factors(tmp_path):
    extra = [("rope_factors_long.weight", np.ones(6, np.float32))]
    with pytest.raises(ConvertError, match="only one of rope_factors_long.weight and rope_factors_short.weight"):
        described(tmp_path, "qwen3", extra)
