"""Tokens of a thousand varied strings (in the quick run fewer) against the library and the checkpoint's file; every id
in a stream."""

from __future__ import annotations

import json
import random

import pytest

from kvrun.files.model_file import read_model_file
from kvrun.text.sentencepiece_file import with_dummy_prefix
from kvrun.text.tokenizer import Tokenizer
from support import FIXTURES, cases
from support.library_tokenizers import library_from_gguf
from support.strings import varied_strings

CHECKPOINTS = FIXTURES / "checkpoints"
COUNT = cases.examples(1000)
# Fixture and the checkpoint whose tokenizer.json it has; the GGUF files hold theirs as metadata only.
JSON_CASES = {
    "grouped-tied": "grouped-tied",
    "llama3-rope": "llama3-rope",
    "biases": "biases",
    "odd-sizes": "odd-sizes",
    "gguf-q8_0": "grouped-tied",
    "gguf-mixed": "llama3-rope",
    "smollm2": None,
}
ALL_BYTES = ("grouped-tied", "llama3-rope", "gguf-q8_0", "gguf-mixed")


def load_tokenizer(path) -> Tokenizer:
    file = read_model_file(path)
    return Tokenizer(file.tokenizer_info, file.tokenizer_bytes(), file.description.vocab_size, file.stop_ids)


def lossless(ours: Tokenizer, library, texts: list[str]) -> list[str]:
    """The texts whose every byte has a token; SmolLM2's vocabulary lacks some, others have <unk>."""
    if library.model.unk_token is not None:
        return []
    tokens = (ours.token_bytes(i) for i in range(ours.vocab_size))
    known = {token[0] for token in tokens if len(token) == 1}
    return [text for text in texts if known.issuperset(text.encode())]


@pytest.fixture(scope="module", params=JSON_CASES)
def case(request, converted):
    """(name, our tokenizer, the library's)"""
    import tokenizers

    name = request.param
    if name == "smollm2":
        path = request.getfixturevalue("smollm2")
        return name, load_tokenizer(path), library_from_gguf(str(request.getfixturevalue("smollm2_gguf")))
    library = tokenizers.Tokenizer.from_file(str(CHECKPOINTS / JSON_CASES[name] / "tokenizer.json"))
    return name, load_tokenizer(converted(name)), library


def test_varied_strings(case):
    _, ours, library = case
    for text in varied_strings(COUNT, seed=1):
        expected = library.encode(text)
        assert ours.encode(text) == expected.ids, repr(text)
        assert ours.decode(expected.ids) == library.decode(expected.ids, skip_special_tokens=False), repr(text)
        assert ours.decode(expected.ids, skip_special=True) == library.decode(expected.ids), repr(text)


def test_special_tokens_are_text_when_asked(case):
    _, ours, library = case
    for text in lossless(ours, library, varied_strings(COUNT, seed=2)):
        ids = ours.encode(text, add_special=False, parse_special=False)
        assert not any(ours.is_special(i) for i in ids), repr(text)
        assert ours.decode(ids) == text


def test_strings_come_back_in_a_stream(case):
    """Piece by piece the same text, and never half a character."""
    name, ours, library = case
    texts = varied_strings(COUNT, seed=3)
    exact = set(lossless(ours, library, texts))
    assert len(exact) == len(set(texts)) or name not in ALL_BYTES
    assert len(exact) > 0.7 * COUNT or name != "smollm2"
    for text in texts:
        ids = ours.encode(text, add_special=False)
        stream = ours.stream(skip_special=False)
        pieces = [stream.push(i) for i in ids]
        whole = "".join(pieces) + stream.finish()
        assert whole == library.decode(ids, skip_special_tokens=False), repr(text)
        if text in exact:
            assert whole == text
            assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces), repr(text)


def test_every_id_in_a_stream(case):
    """All ids, one by one and in random order: bytes that are no UTF-8 become what the library says."""
    _, ours, library = case
    n = library.get_vocab_size()
    for i in range(n):
        stream = ours.stream(skip_special=False)
        assert stream.push(i) + stream.finish() == library.decode([i], skip_special_tokens=False), i
    rng = random.Random(7)
    for _ in range(3):
        order = rng.sample(range(n), n)
        stream = ours.stream(skip_special=False)
        text = "".join(stream.push(i) for i in order) + stream.finish()
        assert text == library.decode(order, skip_special_tokens=False)


def test_ids_without_a_token(converted):
    """A model may have more ids than its tokenizer: they stand for no text."""
    ours = load_tokenizer(converted("grouped-tied"))
    assert ours.vocab_size == 304
    assert [ours.token_bytes(i) for i in range(300, 304)] == [b""] * 4


# --- SentencePiece --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_case(converted):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINTS / "multi-head" / "tokenizer.model"))
    return load_tokenizer(converted("multi-head")), library


def test_sentencepiece_strings(sentencepiece_case):
    import sentencepiece

    ours, library = sentencepiece_case
    # For Llama's class a space that a text begins with is the dummy space.
    no_dummy = with_dummy_prefix(library.serialized_model_proto(), False)
    without = sentencepiece.SentencePieceProcessor(model_proto=no_dummy)
    for text in varied_strings(COUNT, seed=4, special=False):
        expected = (without if text.startswith((" ", "\u2581")) else library).encode(text)
        assert ours.encode(text) == [library.bos_id(), *expected], repr(text)
        assert ours.encode(text, add_special=False, parse_special=False) == expected, repr(text)
        assert ours.decode(expected) == library.decode(expected), repr(text)
        stream = ours.stream()
        pieces = [stream.push(i) for i in expected]
        assert "".join(pieces) + stream.finish() == library.decode(expected), repr(text)


def test_sentencepiece_every_id(sentencepiece_case):
    ours, library = sentencepiece_case
    n = library.get_piece_size()
    ordinary = [i for i in range(n) if not library.is_control(i) and not library.is_unknown(i)]
    for i in ordinary:
        stream = ours.stream()
        assert stream.push(i) + stream.finish() == library.decode([i]), (i, library.id_to_piece(i))
    rng = random.Random(8)
    for _ in range(3):
        order = rng.sample(ordinary, len(ordinary))
        stream = ours.stream()
        assert "".join(stream.push(i) for i in order) + stream.finish() == library.decode(order)


# --- what the checkpoints say beside their tokenizers ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stop_ids"),
    [
        ("grouped-tied", {0, 2}),
        ("llama3-rope", {297, 300}),
        ("gguf-q8_0", {2}),
        ("gguf-mixed", {300}),
        ("biases", {2}),
        ("multi-head", {2}),
    ],
)
def test_stop_ids(name, stop_ids, converted):
    """Every end-of-turn id that the checkpoint names, and well-known ones of its vocabulary besides."""
    found = set(read_model_file(converted(name)).stop_ids)
    assert stop_ids <= found
    vocabulary = load_tokenizer(converted(name))
    ends = {"<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>"}
    assert {vocabulary.token_bytes(i).decode() for i in found} <= ends


@pytest.mark.parametrize(
    ("name", "source"),
    [("grouped-tied", "tokenizer_config.json"), ("llama3-rope", "chat_template.jinja"), ("biases", None)],
)
def test_chat_template(name, source, converted):
    template = read_model_file(converted(name)).chat_template
    if source is None:
        assert template is None
    elif source.endswith(".json"):
        assert template == json.loads((CHECKPOINTS / name / source).read_text("utf-8"))["chat_template"]
    else:
        assert template == (CHECKPOINTS / name / source).read_text("utf-8")


def test_sampling_defaults(converted):
    assert read_model_file(converted("llama3-rope")).sampling == {"temperature": 0.6, "top_p": 0.9}
    assert read_model_file(converted("biases")).sampling == {}
