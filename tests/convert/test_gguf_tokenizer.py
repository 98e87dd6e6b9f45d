"""Tokenizers rebuilt from GGUF metadata: how text is cut, special tokens, and what is refused."""

import json
import re

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from kvrun import load
from kvrun.convert.pipeline import convert
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


@pytest.mark.parametrize(
    "pre, text, expected",
    [
        ("gpt-4o", "नमस्ते e\u0301t ÉTÉ étéÉ", ["नमस्ते", " e\u0301t", " ÉTÉ", " été", "É"]),
        ("tekken", "नमस्ते e\u0301t étéÉ", ["नमस्ते", " e\u0301t", " été", "É"]),
        ("youtu", "camelCase XMLHttp", ["camel", "Case", " XMLHttp"]),
        ("kimi-k2", "camelCase 漢字かな漢 e\u0301", ["camel", "Case", " ", "漢字", "かな", "漢", " e\u0301"]),
        ("tiny_aya", "camelCase 1234 1234x", ["camel", "Case", " ", "1", "234", " ", "123", "4", "x"]),
        ("afmoe", "a  123456 x1234\x07", ["a", "  ", "123", "456", " x", "1", "234", "\x07"]),
        ("deepseek-llm", "a\u3000b \u3002\u3000 1234", ["a", "\u3000", "b", " ", "\u3002", "\u3000", " ", "1234"]),
        ("deepseek-coder", "a\u3000b 12", ["a", "\u3000", "b", " ", "1", "2"]),
        ("superbpe", "ab cd 1234567, x١٢٣٤", ["ab cd ", "1", "234", "567", ", x", "١", "٢٣٤"]),
    ],
)
def test_what_llama_cpp_only_comes_near_to(tmp_path, pre, text, expected):
    assert words(vocabulary(tmp_path, pre), text) == expected


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
    "named, expected",
    [
        ({"": "{{ x }}", ".default": "{{ y }}", ".tool_use": "{{ z }}"}, "{{ x }}"),
        ({".default": "{{ y }}", ".tool_use": "{{ z }}"}, "{{ y }}"),
        ({".chat": "{{ z }}"}, "{{ z }}"),
        ({".rag": "{{ y }}", ".tool_use": "{{ z }}"}, None),
        ({"s": ["rag"]}, None),
    ],
)
def test_templates_with_names(tmp_path, named, expected):
    metadata = {f"tokenizer.chat_template{name}": value for name, value in named.items()}
    assert vocabulary(tmp_path, metadata=metadata).chat_template == expected


def test_an_end_beyond_the_vocabulary_has_one_line(tmp_path):
    save_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eos_token_id": 4000})
    notes = convert(tmp_path / "m.gguf", tmp_path / "m.bin").notes
    assert notes == ["eos_token_id is 4000, but there are 40 tokens: ignored"]


@pytest.mark.parametrize("pre", [None, "", "default"])
def test_files_that_name_no_pre_tokenizer(tmp_path, pre):
    checkpoint = vocabulary(tmp_path, metadata={"tokenizer.ggml.pre": pre})
    assert words(checkpoint, "a ('ll) 1234") == ["a", " ", "('", "ll", ")", " ", "123", "4"]
    assert [note for note in checkpoint.notes if "llama.cpp's default rules" in note]
    named = vocabulary(tmp_path, "gpt-2")
    assert words(named, "a ('ll) 1234") == ["a", " ('", "ll", ")", " 1234"] and not named.notes


@pytest.mark.parametrize("pre", [None, "default"])
def test_llama3_is_known_by_its_tokens(tmp_path, pre):
    tokens = ["<|begin_of_text|>", "<|eot_id|>", *BYTES, "12", "123", "ab", "Ġab", "abc"]
    checkpoint = vocabulary(tmp_path, metadata={"tokenizer.ggml.pre": pre}, tokens=tokens)
    assert words(checkpoint, "a ('LL) 1234") == ["a", " ('", "LL", ")", " ", "123", "4"]
    assert tokenizer(checkpoint).encode("abc").tokens == ["<|begin_of_text|>", "abc"]
    assert [note for note in checkpoint.notes if "llama-bpe" in note]


NAMED = (
    *("bos", "eos", "unknown", "seperator", "padding", "cls", "mask", "eot", "eom"),
    *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle"),
)


@pytest.mark.parametrize("value", [2**32 - 1, -1, 2**31, 263])
@pytest.mark.parametrize("name", NAMED)
def test_ids_that_name_no_token(tmp_path, name, value):
    checkpoint = vocabulary(tmp_path, metadata={f"tokenizer.ggml.{name}_token_id": value})
    info = checkpoint.vocabulary.model_entry(263)
    ids = {"bos": 0, "eos": 1, "padding": None, "unknown": None} | ({name: None} if name in ("bos", "eos") else {})
    assert [info[key] for key in ("bos_id", "eos_id", "pad_id", "unk_id")] == list(ids.values())
    assert {token for token in checkpoint.stop_ids if token < 263} == {1}  # <|im_end|>, by its text
    used = name in ("bos", "eos", "unknown", "padding", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    assert len(checkpoint.notes) == (used and value in (2**31, 263)), checkpoint.notes


def test_a_missing_id_has_llama_cpps_default_if_that_token_is_special(tmp_path):
    metadata = {"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.bos_token_id": None}
    plain = vocabulary(tmp_path, metadata=metadata)
    assert (plain.vocabulary.info["bos_id"], plain.vocabulary.info["eos_id"]) == (None, None)
    types = [3, 3] + [1] * 9 + [3] + [1] * 251
    for pre, bos in (("falcon", 11), ("glm4", None)):
        other = vocabulary(tmp_path, pre, metadata=metadata, token_type=types)
        assert (other.vocabulary.info["bos_id"], other.vocabulary.info["eos_id"]) == (bos, 11)
        assert 11 in other.stop_ids


@pytest.mark.parametrize("kind", [1, 4, 5, 6, 0, 9])
def test_an_end_of_a_turn_of_any_type(tmp_path, kind):
    checkpoint = vocabulary(tmp_path, eos_token_id=None, token_type=[3, kind] + [1] * 261)
    assert set(checkpoint.stop_ids) == {1} and [note for note in checkpoint.notes if "<|im_end|>" in note]
    assert tokenizer(checkpoint).encode("a<|im_end|>").ids[-1] == 1


def test_an_ordinary_token_that_looks_like_a_tag(tmp_path):
    tokens = ["<|endoftext|>", "</s>", *BYTES, "12", "123", "ab", "Ġab", "abc"]
    checkpoint = vocabulary(tmp_path, eos_token_id=0, tokens=tokens, token_type=[3, 1] + [1] * 261)
    assert set(checkpoint.stop_ids) == {0} and not checkpoint.notes
    named = vocabulary(tmp_path, eos_token_id=1, tokens=tokens, token_type=[3, 1] + [1] * 261)
    assert set(named.stop_ids) == {0, 1} and named.notes


def test_files_of_code_end(tmp_path):
    tokens = ["<s>", "<|im_end|>", *BYTES[:-2], "<|file_sep|>", "<|fim_prefix|>", "12", "123", "ab", "Ġab", "abc"]
    checkpoint = vocabulary(tmp_path, tokens=tokens, fim_rep_token_id=20)
    assert set(checkpoint.stop_ids) == {1, 20, 256}
    assert tokenizer(checkpoint).encode("<|fim_prefix|>ab<|file_sep|>").ids == [257, 260, 256]


def test_more_tokens_than_rows(tmp_path):
    tokens = ["<s>", "<|im_end|>", *BYTES, "12", "123", "ab", "Ġab", "<|eot_id|>", "abc"]
    types = [3, 3] + [1] * 260 + [3, 1]
    save_gguf(
        tmp_path / "m.gguf",
        pre="gpt-2",
        vocab=261,
        metadata={
            **gguf_vocabulary(tokens),
            "tokenizer.ggml.merges": ["1 2", "12 3", "a b", "Ġ ab", "ab c"],
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.eot_token_id": 262,
        },
    )
    convert(str(tmp_path / "m.gguf"), str(tmp_path / "m.kv"), "q8_0")
    model = load(tmp_path / "m.kv")
    assert model.stop_ids == {1}
    ids = model.tokenize("abc ab<|eot_id|>")
    assert ids[:2] == [260, BYTES.index("c") + 2] and max(ids) < 261 and model.detokenize(ids) == "abc ab<|eot_id|>"


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
        ({"tokens": "abc"}, "tokens: missing, or not a list of texts"),
        ({"merges": [1, 2]}, "merges: missing, or not a list of texts"),
        ({"token_type": [1.0] * 263}, "token_type: not one integer for each token"),
        ({"token_type": "x"}, "token_type: not one integer for each token"),
        ({"eos_token_id": "x"}, "eos_token_id: 'x' is not a token id"),
        ({"fim_pad_token_id": 1.5}, "fim_pad_token_id: 1.5 is not a token id"),
        ({"add_bos_token": 7}, "add_bos_token"),
    ],
)
def test_what_is_refused(tmp_path, entries, says):
    with pytest.raises(ConvertError, match=says) as caught:
        vocabulary(tmp_path, **entries)
    assert "tokenizer.ggml." in str(caught.value)
