"""The default model, from GGUF and from safetensors, against the text that transformers makes in float32."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import kvrun
from kvrun import _core
from kvrun.convert import convert
from kvrun.files.model_file import read_model_file
from support.cases import either, some
from support.gguf_checkpoint import write_checkpoint
from support.greedy import greedy

GREEDY = json.loads((Path(__file__).parent / "fixtures" / "smollm2.json").read_text("utf-8"))["greedy"]
IDS = [f"{r['kind']}: {r['user'][:20]}" for r in GREEDY]


@pytest.fixture(scope="module")
def model(smollm2_f32):
    return kvrun.load(smollm2_f32)


@pytest.mark.parametrize("case", GREEDY, ids=IDS)
def test_prompt_ids(model, case):
    assert model.tokenize(case["prompt"], add_special=False) == case["prompt_ids"]
    assert model.detokenize(case["ids"]) == case["text"]


@pytest.mark.parametrize("kv", some(["f32", "f16"], ["f16"]))
@pytest.mark.parametrize("case", some(GREEDY, GREEDY[:1]), ids=IDS)
def test_greedy_ids(model, case, kv):
    n = either(64, 24)
    assert len(case["ids"]) == 64 and greedy(model.engine, case["prompt_ids"], n, kv) == case["ids"][:n]


@pytest.mark.parametrize("case", some(GREEDY, GREEDY[-1:]), ids=IDS)
def test_greedy_text(model, case):
    """The same through the public interface, the chat template included."""
    session = model.session(kv="f32", ctx=512)
    n, whole = either(64, 32), re.sub(r"<\|im_(start|end)\|>", "", case["text"])
    pieces = list(
        session.stream(
            case["user"],
            max_tokens=n,
            temperature=0,
            repeat_penalty=1.0,
            raw=case["kind"] == "raw",
            ignore_eos=True,
        )
    )
    text = "".join(pieces)
    assert text == whole if n == 64 else whole.startswith(text)
    assert len(pieces) > 0.6 * n


def test_threads_do_not_change_the_text(smollm2):
    texts = {
        threads: kvrun.load(smollm2, threads=threads).generate(
            GREEDY[2]["user"], max_tokens=48, temperature=0.8, seed=11, ctx=512
        )
        for threads in (1, 2)
    }
    assert texts[1] == texts[2]


@pytest.fixture(scope="module")
def from_safetensors(smollm2_gguf, big_folder):
    """The model file of $KVRUN_TEST_CHECKPOINT, a folder that transformers saved from the same GGUF; without
    it, of one that is written here."""
    folder = os.environ.get("KVRUN_TEST_CHECKPOINT")
    source = Path(folder) if folder else write_checkpoint(smollm2_gguf, big_folder / "checkpoint")
    return convert(source, big_folder / "from-safetensors.bin", "f32", tokenizer=bool(folder)).model


def description(file):
    """What the two sources must agree on; GGUF has epsilon in float32 only."""
    values = json.loads(file.description.to_json())
    del values["name"]
    return values | {"norm_eps": float(np.float32(values["norm_eps"]))}


@pytest.mark.thorough
def test_safetensors_and_gguf_give_equal_tensors(from_safetensors, smollm2_f32):
    other, model = from_safetensors, read_model_file(smollm2_f32)
    assert description(other) == description(model)
    assert other.weights.keys() == model.weights.keys() and other.vectors.keys() == model.vectors.keys()
    for name, weight in model.weights.items():
        assert other.weights[name].type == weight.type == "f32"
        np.testing.assert_array_equal(other.weights[name].data, weight.data, err_msg=name)
    for name, vector in model.vectors.items():
        np.testing.assert_array_equal(other.vectors[name], vector, err_msg=name)


@pytest.mark.thorough
def test_safetensors_and_gguf_give_equal_tokenizers(from_safetensors, model):
    if from_safetensors.tokenizer_info["kind"] == "none":
        pytest.skip("needs KVRUN_TEST_CHECKPOINT: the checkpoint written here has no tokenizer")
    other = kvrun.load(from_safetensors.path)
    for text in (
        "Hello, world! 12345",
        "def f(x):\n\treturn x\n",
        "<|im_start|>user\nZwölf<|im_end|>",
        " \n 木",
    ):
        assert other.tokenize(text) == model.tokenize(text)
    assert other.stop_ids == model.stop_ids and other.file.chat_template == model.file.chat_template


@pytest.mark.thorough
def test_greedy_ids_from_safetensors(from_safetensors):
    file = from_safetensors
    engine = _core.Engine(file.description, file.weights, file.vectors, file.description.rope_tables, 2)
    for case in GREEDY:
        assert greedy(engine, case["prompt_ids"], 64) == case["ids"]
