"""The ids of a first, short text: cut with a few of the tokens, equal to those of the whole tokenizer."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kvrun.text import pruned
from kvrun.text.pruned import PrunedBpe, read_prunable
from kvrun.text.tokenizer import Tokenizer as Ours
from support.strings import varied_strings

TEXT = ["The cat sat on the mat; it's 12345 o'clock, naïve café 你好 🙂 the  the\n\n\tx = y(1000)"] * 3
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def trained(split, alphabet=None, normalizer=None, ignore_merges=False, unknown=None):
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|endoftext|>", "<|im_start|>"] + ([unknown] if unknown else []),
            initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False), AddedToken("[X]", lstrip=True)])
    tokenizer.add_tokens([AddedToken("cat", single_word=True), "  ", AddedToken("<think>", normalized=False)])
    spec = json.loads(tokenizer.to_str())
    spec["model"]["ignore_merges"] = ignore_merges
    return spec


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPECS = {
    "gpt2": trained(GPT2),
    "prefix space": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "digits": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2])),
    "llama3": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]), ignore_merges=True
    ),
    "qwen": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
        normalizer=normalizers.NFC(),
    ),
    # Bytes that have no token: dropped, or unknown.
    "some bytes": trained(GPT2, alphabet=[c for c in pre_tokenizers.ByteLevel.alphabet() if c < "é"]),
    "unknown": trained(GPT2, alphabet=[c for c in pre_tokenizers.ByteLevel.alphabet() if c < "é"], unknown="<unk>"),
}
for name in ("some bytes", "unknown"):  # the trainer keeps the bytes of its text
    vocab = {t: i for i, t in enumerate(t for t in SPECS[name]["model"]["vocab"] if t.isascii() or t[:1] == "<")}
    SPECS[name]["model"]["merges"] = [
        m for m in SPECS[name]["model"]["merges"] if all(t in vocab for t in (*m, "".join(m)))
    ]
    SPECS[name]["model"]["vocab"] = vocab
    n = len(vocab)
    for token in SPECS[name]["added_tokens"]:
        token["id"] = vocab.get(token["content"], n)
        n += token["content"] not in vocab


def library(spec):
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


@pytest.mark.crossed
@pytest.mark.parametrize("merges", ["pairs", "texts"])
@pytest.mark.parametrize("name", SPECS)
def test_ids_of_varied_strings(name, merges):
    spec = json.loads(json.dumps(SPECS[name]))
    if merges == "texts":
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    data = json.dumps(spec, ensure_ascii=False).encode()
    parsed = read_prunable(data)
    assert parsed is not None
    pruned, whole = PrunedBpe(parsed, tokenizers.Tokenizer.from_buffer), library(spec)
    for text in varied_strings(400, seed=41) + ["the cat", "thecat", "a<|im_end|>b  [X]<think>", *TEXT]:
        assert pruned.ids(text) == whole.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("name", SPECS)
def test_the_first_text_and_those_after_it(name):
    spec = SPECS[name]
    data, whole = json.dumps(spec).encode(), library(spec)
    info = {"kind": "tokenizer.json", "bos_id": 0}
    for text in ("the cat<|im_end|>", "x" * (pruned.LONGEST + 1), ""):
        ours = Ours(info, data)
        for _ in range(2):
            assert ours.encode(text) == whole.encode(text, add_special_tokens=False).ids
    ours = Ours(info, data)
    tokens = [ours.token_bytes(i) for i in range(ours.vocab_size)]
    ours.encode("a"), ours.encode("b")
    assert tokens == [ours.token_bytes(i) for i in range(ours.vocab_size)]
    assert ours.vocab_size == whole.get_vocab_size() == len(tokens)
    assert ours.special.ids == {t.content: i for i, t in whole.get_added_tokens_decoder().items() if t.special}


def changed(**parts):
    spec = json.loads(json.dumps(SPECS["gpt2"]))
    for key, value in parts.items():
        (spec["model"] if key in spec["model"] else spec)[key] = value
    return spec


@pytest.mark.parametrize(
    "spec",
    [
        changed(dropout=0.1),
        changed(byte_fallback=True),
        changed(continuing_subword_prefix="##"),
        changed(type="WordPiece"),
        changed(pre_tokenizer=None),
        changed(pre_tokenizer={"type": "Metaspace"}),
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "Digits"}]}),
        changed(decoder={"type": "Fuse", "note": "ByteLevel"}),
        changed(vocab={"a": 5}),
        changed(added_tokens=[{"id": 7, "content": "nowhere"}]),
        changed(merges=3),
        {"pre_tokenizer": "ByteLevel", "vocab": 3},
        [],
    ],
)
def test_what_is_left_to_the_library(spec):
    assert read_prunable(json.dumps(spec).encode()) is None
