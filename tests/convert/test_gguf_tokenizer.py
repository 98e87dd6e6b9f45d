"""Tokenizers rebuilt from GGUF metadata: how text is cut, special tokens, and what is refused."""

import json
import re

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from kvrun.convert.pre_tokenizers import PRE_TOKENIZERS
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError
from support import ROOT
from support.make_checkpoint import gguf_vocabulary, save_gguf

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def vocabulary(tmp_path, pre="gpt-2", metadata=None, **entries):
    """The checkpoint of a GGUF file with all 256 bytes, a few merges and two special tokens."""
    tokens = ["<s>", "<|im_end|>", *BYTES, "12", "123", "ab", "Ġab", "abc"]
    merges = ["1 2", "12 3", "a b", "Ġ ab"]
    values = {
        **gguf_vocabulary(tokens),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        **{f"tokenizer.ggml.{key}": value for key, value in entries.items()},
        **(metadata or {}),
    }
    save_gguf(tmp_path / "m.gguf", metadata=values, pre=pre, vocab=len(values["tokenizer.ggml.tokens"] or []) or 40)
    return open_checkpoint(str(tmp_path / "m.gguf"))


def tokenizer(checkpoint):
    return Tokenizer.from_buffer(checkpoint.vocabulary.data)


def words(checkpoint, text):
    """The pieces into which the pre-tokenizer cuts a text."""
    pieces = tokenizer(checkpoint).pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


TEXT = "Hello  we'll WE'LL x1234\n\n 5½ ok!!\n"


@pytest.mark.parametrize(
    "pre, expected",
    [
        (
            "gpt-2",
            ["Hello", " ", " we", "'ll", " WE", "'", "LL", " x", "1234", "\n\n", " 5½", " ok", "!!", "\n"],
        ),
        (
            "smollm",
            [
                "Hello",
                " ",
                " we",
                "'ll",
                " WE",
                "'",
                "LL",
                " x",
                "1",
                "2",
                "3",
                "4",
                "\n\n ",
                "5",
                "½",
                " ok",
                "!!",
                "\n",
            ],
        ),
        (
            "llama-bpe",
            ["Hello", " ", " we", "'ll", " WE", "'LL", " x", "123", "4", "\n\n", " ", "5½", " ok", "!!\n"],
        ),
        ("gpt-4o", ["Hello", " ", " we'll", " WE'LL", " x", "123", "4", "\n\n", " ", "5½", " ok", "!!\n"]),
        ("tekken", ["Hello", " ", " we", "'ll", " WE", "'LL", " x", *"1234", "\n\n", " ", "5", "½", " ok", "!!\n"]),
        (
            "qwen2",
            [
                "Hello",
                " ",
                " we",
                "'ll",
                " WE",
                "'LL",
                " x",
                "1",
                "2",
                "3",
                "4",
                "\n\n",
                " ",
                "5",
                "½",
                " ok",
                "!!\n",
            ],
        ),
    ],
)
def test_how_text_is_cut(tmp_path, pre, expected):
    assert words(vocabulary(tmp_path, pre), TEXT) == expected


@pytest.mark.parametrize("pre", [name for name, rules in PRE_TOKENIZERS.items() if rules.byte_letters])
def test_every_pre_tokenizer_gives_back_the_text(tmp_path, pre):
    built = tokenizer(vocabulary(tmp_path, pre, add_bos_token=False))
    for text in [
        "",
        " ",
        TEXT,
        "日本語 text",
        "👩‍👩‍👧 مرحبا",
        "\0\x1f\x7f",
        "a\r\n\tb",
        "<|im_end|>",
        "x" * 500,
    ]:
        assert built.decode(built.encode(text).ids, skip_special_tokens=False) == text


def test_the_documentation_lists_every_name():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    table = page.partition("## Tokenizers in GGUF files")[2].partition("\n- ")[0]
    listed = re.findall(r"`([^`]+)`", table.partition("| rules of |")[2])
    assert sorted([*listed, "default"]) == sorted(PRE_TOKENIZERS)


def test_merges_and_special_tokens(tmp_path):
    checkpoint = vocabulary(tmp_path)
    built = tokenizer(checkpoint)
    assert built.encode("ab ab<|im_end|>123").tokens == ["ab", "Ġab", "<|im_end|>", "123"]
    assert built.decode([1], skip_special_tokens=True) == ""
    assert built.get_vocab_size() == 263 and [built.token_to_id(t) for t in ("<s>", "<|im_end|>", BYTES[0])] == [
        0,
        1,
        2,
    ]
    assert set(checkpoint.stop_ids) == {1}


def test_whole_words_come_before_merges_for_llama3(tmp_path):
    assert tokenizer(vocabulary(tmp_path, "gpt-2")).encode("abc").tokens == ["ab", "c"]
    built = tokenizer(vocabulary(tmp_path, "llama-bpe", add_bos_token=False))
    assert built.encode("abc").tokens == ["abc"]


def test_unicode_is_composed_for_qwen(tmp_path):
    assert tokenizer(vocabulary(tmp_path, "qwen2")).normalizer.normalize_str("e\u0301") == "\u00e9"
    assert tokenizer(vocabulary(tmp_path, "llama-bpe")).normalizer is None


@pytest.mark.parametrize(
    "pre, entries, expected",
    [
        ("gpt-2", {}, (False, False)),
        ("llama-bpe", {}, (True, False)),
        ("llama-bpe", {"add_bos_token": False}, (False, False)),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("llama-bpe", {"bos_token_id": None}, (False, False)),
        ("llama-bpe", {"bos_token_id": 5000}, (False, False)),
    ],
)
def test_what_is_put_around_a_text(tmp_path, pre, entries, expected):
    checkpoint = vocabulary(tmp_path, pre, **entries)
    info = checkpoint.vocabulary.model_entry(checkpoint.description.vocab_size)
    assert (info["add_bos"], info["add_eos"]) == expected
    tokens = tokenizer(checkpoint).encode("ab").tokens
    assert tokens == ["<s>"] * expected[0] + ["ab"] + ["<|im_end|>"] * expected[1]


def test_kinds_of_tokens(tmp_path):
    types = [3, 2, 4] + [1] * 260
    checkpoint = vocabulary(tmp_path, token_type=types, eot_token_id=7, eom_token_id=8)
    added = {t["id"]: t["special"] for t in json.loads(checkpoint.vocabulary.data)["added_tokens"]}
    assert added == {0: True, 1: True, 2: False}
    assert set(checkpoint.stop_ids) == {1, 7, 8}


def test_tokens_of_the_same_text_keep_their_ids(tmp_path):
    tokens = ["<s>", "<|im_end|>", *BYTES, "12", "123", "ab", "Ġab", "abc", "ab", "xyz"]
    built = tokenizer(vocabulary(tmp_path, tokens=tokens, token_type=[3, 3] + [1] * 263))
    assert built.token_to_id("ab") == 260 and built.token_to_id("xyz") == 264 and built.get_vocab_size() == 265


def test_template_sampling_and_ids(tmp_path):
    checkpoint = vocabulary(
        tmp_path,
        padding_token_id=1,
        unknown_token_id=0,
        metadata={
            "tokenizer.chat_template": "{{ x }}",
            "general.sampling.temp": 0.5,
            "general.sampling.top_k": 20,
        },
    )
    info = checkpoint.vocabulary.model_entry(263)
    assert (info["pad_id"], info["unk_id"]) == (1, 0)
    assert (checkpoint.chat_template, checkpoint.sampling) == ("{{ x }}", {"temperature": 0.5, "top_k": 20})


@pytest.mark.parametrize(
    "entries, says",
    [
        ({"pre": "none-such"}, "pre-tokenizer 'none-such' is unknown; docs/models.md lists"),
        ({"pre": 3}, "3 is not a text"),
        ({"model": "rwkv"}, r"not supported yet: tokenizer 'rwkv' \(.*\) \(supported: gpt2, gemma4, llama, t5\)"),
        ({"model": "bert"}, r"not supported yet: tokenizer 'bert' \(WordPiece, of encoders\)"),
        ({"model": "none"}, "has no tokenizer"),
        ({"model": "none-such"}, "not supported yet: tokenizer 'none-such' \\(supported"),
        ({"model": "llama"}, "scores: missing"),
        ({"model": None}, "has no tokenizer"),
        ({"merges": None}, "merges"),
        ({"merges": ["ab"]}, "merges"),
        ({"merges": ["q zz"]}, "merges"),
        ({"tokens": None}, "tokens"),
        ({"token_type": [1]}, "token_type"),
        ({"tokens": [1, 2]}, "tokens"),
        ({"add_bos_token": 7}, "add_bos_token"),
    ],
)
def test_what_is_refused(tmp_path, entries, says):
    with pytest.raises(ConvertError, match=says) as caught:
        vocabulary(tmp_path, **entries)
    assert "tokenizer.ggml." in str(caught.value)
