"""Whatever value a field has: a checkpoint is read or refused in one line that is no longer than a line should be."""

import copy
import json
import shutil

import pytest

from kvrun.convert import gguf_source
from kvrun.convert.fields import Fields
from kvrun.convert.gguf_file import GgufFile
from kvrun.convert.gguf_tokenizer import read_tokenizer
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError
from support.cases import either, in_turn, some
from support.families import FAMILIES, NAMES
from support.family_gguf import NAMES as GGUF_NAMES
from support.family_gguf import write
from support.make_checkpoint import write_json

NUMBERS = (0, 1, -1, 2**40, 1e308, 1e-320, 0.5, float("nan"))
OTHERS = (True, "", "x\ny" * 10_000, [], [[1]] * 6, [1e308] * 6)
JSON_ONLY = (10**400, None, {"rope_type": "yarn"}, {"rope_type": "longrope", "factor": 4.0})
MORE_FIELDS = (
    "rope_scaling rope_parameters quantization_config sliding_window layer_types no_rope_layers mlp_only_layers "
    "num_local_experts partial_rotary_factor text_config original_max_position_embeddings hidden_act rope_theta"
).split()
MORE_KEYS = (
    "rope.scaling.type rope.scaling.factor rope.scale_linear rope.scaling.original_context_length "
    "rope.scaling.yarn_beta_fast rope.scaling.attn_factor attention.sliding_window_pattern attention.scale "
    "attention.sliding_window rope.freq_base expert_count expert_used_count attention.key_length logit_scale"
).split()


def refused(read):
    """Whether `read` refuses, as it should if it does; any other exception is the test's failure."""
    try:
        read()
    except ConvertError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return True
    return False


def fields_of(values, path=()):
    for name, value in values.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from fields_of(value, (*path, name))


@pytest.mark.parametrize("name", some(NAMES, ["gpt2", "gemma3", "olmo3", "qwen3moe", "partial-rope"]))
def test_in_a_config(name, tmp_path):
    folder = shutil.copytree(FAMILIES / name, tmp_path / name)
    base = json.loads((folder / "config.json").read_text())
    refusals = 0
    for turn, (*path, last) in enumerate([*fields_of(base), *((name,) for name in MORE_FIELDS)]):
        for value in in_turn(NUMBERS + OTHERS + JSON_ONLY, turn):
            config = copy.deepcopy(base)
            section = config
            for step in path:
                section = section[step]
            section[last] = value
            write_json(folder / "config.json", config)
            refusals += refused(lambda: open_checkpoint(str(folder), tokenizer=False))
    assert refusals > either(100, 33)


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_in_a_gguf_file(name, tmp_path, monkeypatch):
    file = GgufFile(str(write(tmp_path / "m.gguf", FAMILIES / name)))
    base = file.metadata
    monkeypatch.setattr(gguf_source, "GgufFile", lambda path: file)
    arch, refusals = base["general.architecture"], 0
    keys = [*base, *(f"{arch}.{key}" for key in MORE_KEYS), "split.count", "general.sampling.temp"]
    for turn, key in enumerate(dict.fromkeys(keys)):
        for value in in_turn((*NUMBERS, *OTHERS, 2**64 - 1), turn):
            file.metadata = base | {key: value}
            refusals += refused(lambda: open_checkpoint(file.path, tokenizer=False))
    assert refusals > either(100, 33)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_in_a_tokenizer(kind):
    tokens = ["<unk>", "<s>", "a", "b", "ab"]
    base = {
        "model": kind,
        "tokens": tokens,
        "merges": ["a b"],
        "token_type": [2, 3, 1, 1, 1],
        "scores": [0.0] * 5,
        "unknown_token_id": 0,
        "bos_token_id": 1,
    }
    names = "pre eos_token_id add_bos_token add_space_prefix remove_extra_whitespaces precompiled_charsmap".split()
    lists = [[value] * 5 for value in (*NUMBERS, "", "\udc80", 3.0, 7, 2**63, [1])]
    for name in (*base, *names):
        for value in (*NUMBERS, *OTHERS, *lists):
            values = {f"tokenizer.ggml.{key}": v for key, v in (base | {name: value}).items()}
            refused(lambda values=values: read_tokenizer(Fields(values, "m.gguf")))
    assert read_tokenizer(Fields({f"tokenizer.ggml.{key}": v for key, v in base.items()}, "m.gguf")).data
