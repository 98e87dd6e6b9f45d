"""The families' checkpoints written as GGUF files, names by the gguf package's own table, give the same logits.

Written here as llama.cpp's converter writes them: q and k of some families with the halves of each head interleaved,
Gemma's norms with the 1 that the model adds, GPT-2's matrices the right way round.
"""

import numpy as np
import pytest

from kvrun.convert import convert
from kvrun.convert.gguf_file import GgufFile
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError
from support.families import CHUNKS, FAMILIES, TOLERANCE, cache_of, engine_of, expected_of, run
from support.family_gguf import ARCHITECTURES, NAMES, tensors, write
from support.numpy_llama import NumpyLlama


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
    """What llama.cpp takes for granted."""
    gone = dict.fromkeys(("gemma3__attention__scale", "gemma3__rope__freq_base_swa", "gemma3__rope__freq_base"))
    found = described(tmp_path, "gemma3", **gone, gemma3__attention__sliding_window_pattern=None)
    assert (found.attention_scale, found.rope_theta, found.rope_local["theta"]) == (12**-0.5, 1e4, 1e4)
    assert found.sliding_windows == (70, 70, 70)  # the sixth layer would be the first to see everything
    found = described(tmp_path, "gemma2", gemma2__attn_logit_softcapping=None, gemma2__final_logit_softcapping=None)
    assert (found.attention_softcap, found.logit_softcap, found.sliding_windows) == (50, 30, (33, None))
    found = described(tmp_path, "phi3", phi3__rope__scaling__attn_factor=1.5)
    assert found.rope_scaling["attention_factor"] == 1.5
    found = described(tmp_path, "phi3", phi3__rope__scaling__attn_factor=None)
    assert found.rope_scaling["attention_factor"] == 1.0
    gone = {"olmo2__attention__sliding_window_pattern": None, "olmo2__rope__freq_base_swa": None}
    found = described(tmp_path, "olmo3", **gone)
    assert found.sliding_windows == (40, 40, 40, None)
    assert found.rope_local == {"theta": found.rope_theta, "scaling": None} and found.rope_scaling["type"] == "yarn"
    found = described(tmp_path, "olmo3", olmo2__attention__sliding_window=0)
    assert (found.sliding_windows, found.rope_local) == (None, None)


def test_bases_of_layers_with_a_window(tmp_path):
    found = described(tmp_path, "gemma2", gemma2__rope__freq_base_swa=500.0)
    assert (found.rope_theta, found.rope_local) == (1e4, {"theta": 500.0, "scaling": None})
    assert described(tmp_path, "gemma2").rope_local is None
    ollama = {"gemma3__rope__freq_base_swa": None, "gemma3__rope__local__freq_base": 300.0}
    assert described(tmp_path, "gemma3", **ollama).rope_local["theta"] == 300


def test_windows_in_every_layer(tmp_path):
    found = described(tmp_path, "gemma2", gemma2__attention__sliding_window_pattern=0)
    assert found.sliding_windows == (33, 33)


def test_zeros_that_mean_none(tmp_path):
    names = ("attention__scale", "embedding_scale", "residual_scale")
    found = described(tmp_path, "granite", **{f"granite__{name}": 0.0 for name in names})
    assert (found.attention_scale, found.embedding_scale, found.residual_scale) == (12**-0.5, 1, 1)
    assert described(tmp_path, "gemma3", gemma3__final_logit_softcapping=0.0).logit_softcap is None


def test_a_soft_cap_that_gemma_3_has_no_more(tmp_path):
    assert described(tmp_path, "gemma3", gemma3__attn_logit_softcapping=20.0).attention_softcap is None


def test_granite_without_rope(tmp_path):
    """The key that says whether a model was trained on longer texts says in this architecture whether it has RoPE."""
    changes = {"granite.rope.scaling.finetuned": False}
    source = write(tmp_path / "model.gguf", FAMILIES / "granite", changes=changes)
    file = convert(source, tmp_path / "model.bin", tokenizer=False).model
    assert (file.description.rope_theta, file.description.rope_scaling) == (None, None)
    tokens = expected_of("granite").tokens
    expected = NumpyLlama(file).logits(tokens)
    logits = run(engine_of(tmp_path / "model.bin"), tokens, CHUNKS["ragged"])
    assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert expected_of("granite").error(logits) > 0.01
    assert described(tmp_path, "granite", granite__rope__scaling__finetuned=True).rope_theta == 1e4


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
