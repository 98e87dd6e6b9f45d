"""Made-up GGUF vocabularies: the ids that llama.cpp gives for them (tests/fixtures/make_gguf_ids.py noted them)."""

import json

import pytest

from kvrun.convert.fields import Fields
from kvrun.convert.gguf_tokenizer import read_tokenizer
from kvrun.convert.pre_tokenizers import PRE_TOKENIZERS
from kvrun.text.tokenizer import Tokenizer
from support import FIXTURES
from support.gguf_vocabulary import changed

NOTED = json.loads((FIXTURES / "gguf_ids.json").read_text(encoding="utf-8"))
GROUPS = {name: group["ids"] for group in NOTED["cuts"] for name in group["names"]}
# Texts that a model's own tokenizer cuts otherwise than llama.cpp; test_gguf_tokenizer.py has what is right there.
MARKS, CAPITALS, DIGITS = {"e\u0301", "नमस्ते สวัสดี"}, {"camelCase XMLHttpRequest"}, {"1234x", "日本語1234テスト"}
SPACED_DIGITS = {"1234 365 days,  8760 hours", "a  123456"}
OWN = {
    "qwen2": {"e\u0301"},
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "tekken"), MARKS),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), CAPITALS | DIGITS | SPACED_DIGITS),
    "youtu": CAPITALS,
    "kimi-k2": CAPITALS | MARKS,
    "afmoe": SPACED_DIGITS,
}


def tokenizer(vocabulary, changes):
    values = {f"tokenizer.ggml.{key}": value for key, value in changed(vocabulary, changes).items()}
    read = read_tokenizer(Fields(values, "m.gguf"))
    size = len(values["tokenizer.ggml.tokens"])
    stops = {*read.stops(), *([read.info["eos_id"]] if read.info["eos_id"] is not None else [])}
    return Tokenizer(read.model_entry(size), read.data, size, sorted(stops)), sorted(stops), read


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_how_text_is_cut(name):
    vocabulary = NOTED["vocabularies"]["bytes" if PRE_TOKENIZERS[name].byte_letters else "text"]
    ours, _, _ = tokenizer(vocabulary, {"model": "gpt2", "pre": name})
    differ = set()
    for texts, noted in zip((NOTED["plain"], NOTED["traps"]), GROUPS[name]):
        for text, ids in zip(texts, noted):
            if ours.encode(text, add_special=False, parse_special=False) != ids:
                differ.add(text)
    assert differ == OWN.get(name, set())


@pytest.mark.parametrize("case", NOTED["files"], ids=lambda case: f"{case['vocabulary']}: {case['what']}")
def test_wrong_files(case):
    ours, stops, _ = tokenizer(NOTED["vocabularies"][case["vocabulary"]], case["changes"])
    for text, parsed, ordinary in zip(NOTED["file_texts"], case["parsed"], case["ordinary"]):
        assert ours.encode(text, add_special=False) == parsed, text
        assert ours.encode(text, add_special=False, parse_special=False) == ordinary, text
    assert ours.encode("the") == case["around"]
    assert stops == case["ends"]
