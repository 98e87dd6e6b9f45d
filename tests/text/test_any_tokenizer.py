"""A stored tokenizer with any value in any place, and damaged ones: used, or refused in one line."""

import json
import random
import subprocess
import sys

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from kvrun.errors import TokenizerError
from kvrun.text.tokenizer import Tokenizer
from support.wrong_values import WRONG, places_for, with_value

INFO = {"add_bos": False, "add_eos": False, **dict.fromkeys(("bos_id", "eos_id", "pad_id", "unk_id"))}


def bpe(byte_level):
    """A small tokenizer.json: byte-level, which is read here first, or in the style of SentencePiece, which is not."""
    letters = "abcde\u0120\u2581é"
    vocab = {text: i for i, text in enumerate([*letters, "ab", "cd", "abcd", "\u0120a"])}
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("\u0120", "a")]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="e", fuse_unk=True))
    if byte_level:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        made.decoder = decoders.ByteLevel()
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens([AddedToken("<s>", normalized=False, special=True)])
    return json.loads(made.to_str())


def use(kind, data):
    """Whether it can be used; if not, it is refused in one line."""
    try:
        tokenizer = Tokenizer({**INFO, "kind": kind}, data, 0, [2])
        for text in ("abcd <s> a", "<s>ab1é\n", "b a" * 2000):
            assert all(isinstance(i, int) for i in tokenizer.encode(text))
            tokenizer.encode(text, parse_special=False)
        tokenizer.decode(range(4))
        return True
    except TokenizerError as error:
        assert "\n" not in str(error) and len(str(error)) < 400, str(error)
        return False


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_any_value_in_any_place(wrong, byte_level):
    spec = bpe(byte_level)
    assert use("tokenizer.json", json.dumps(spec).encode())
    for place in places_for(wrong, spec):
        use("tokenizer.json", with_value(spec, place, WRONG[wrong]).encode())


@pytest.mark.parametrize("prefix", ["#", "##", "a", "é", "x" * 20])
def test_merges_without_the_prefix_they_should_have(prefix):
    """In a process of its own, since the library ends it."""
    spec = bpe(byte_level=False)
    spec["model"] |= {"continuing_subword_prefix": prefix, "merges": [["é", "a"], ["a", "é"], ["ab", "cd"]]}
    code = (
        "import sys\n"
        "from kvrun.text.tokenizer import Tokenizer\n"
        "from kvrun.errors import TokenizerError\n"
        "try:\n"
        "    Tokenizer({'kind': 'tokenizer.json'}, sys.stdin.buffer.read())\n"
        "except TokenizerError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(spec).encode(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"continuing_subword_prefix" in done.stdout


def test_merges_with_their_prefix():
    spec = bpe(byte_level=False)
    vocab = {text: i for i, text in enumerate(["a", "##b", "ab", "\u2581", "e", "##c", "abc"])}
    spec["model"] |= {"vocab": vocab, "continuing_subword_prefix": "##", "merges": [["a", "##b"], ["ab", "##c"]]}
    spec["added_tokens"] = []
    assert use("tokenizer.json", json.dumps(spec).encode())


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    rng = random.Random(0)
    (folder / "text").write_text("\n".join("".join(rng.choices("abcde  ", k=40)) for _ in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=40, minloglevel=2
    )
    return (folder / "m.model").read_bytes()


def test_damaged_sentencepiece_models(sentencepiece_model, seed):
    rng = random.Random(seed)
    assert use("tokenizer.model", sentencepiece_model)
    for _ in range(300):
        data = bytearray(sentencepiece_model)
        for _ in range(rng.choice([1, 1, 2, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        use("tokenizer.model", bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])]))
