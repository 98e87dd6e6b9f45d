"""Tokenizers with more tokens than the model's embedding has rows: the text of the others is made of other tokens."""

import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from kvrun.convert.sentencepiece_model import BPE, BYTE_PIECES, Normalizer, model_bytes
from kvrun.errors import TokenizerError
from kvrun.text.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN, as_control, first_pieces, piece_types
from kvrun.text.tokenizer import Tokenizer

TEXT = "the cat sat on the mat and that is the end of the other hat"
TEXTS = [TEXT, "the", " the  end\n", "a[PAD2]b", "<|im_end|>then", "naïve 🙂", ""]
JSON = {"kind": "tokenizer.json"}
MODEL = {"kind": "tokenizer.model", "bos_id": 1, "eos_id": 2}


def byte_level(vocab_size, added=()):
    """Byte-level BPE, whose tokens are numbered in the order in which training made them."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in added])
    return tokenizer


def unigram(n):
    """The first n pieces of a Unigram vocabulary, in SentencePiece's style."""
    letters = [(c, -5.0) for c in sorted(set("".join(TEXTS)) - {" "})]
    pieces = [("<unk>", 0.0), ("\u2581", -2.0), *letters, ("\u2581the", -3.0), ("at", -3.0), ("\u2581that", -4.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces[:n], unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    return tokenizer, len(pieces)


def pieces(n):
    """The first n pieces of a SentencePiece model, as its file."""
    words = ["\u2581", *"aehnt", "th", "the", "\u2581the", "at", "hat", "that"]
    all_pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    all_pieces += [(byte, 0.0, BYTE) for byte in sorted(BYTE_PIECES)]
    all_pieces += [(word, -float(i), NORMAL) for i, word in enumerate(words)]
    return model_bytes(all_pieces[:n], BPE, {"unk": 0, "bos": 1, "eos": 2}, Normalizer(dummy_prefix=True))


@pytest.mark.parametrize("style", ["merges of two texts", "merges of one text"])
@pytest.mark.parametrize("rows", [256, 257, 270, 280])
def test_byte_level_bpe_is_the_one_with_fewer_tokens(rows, style):
    spec = json.loads(byte_level(280).to_str())
    if style == "merges of one text":
        spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    smaller = byte_level(rows)
    assert smaller.get_vocab_size() == rows
    ours = Tokenizer(JSON, json.dumps(spec).encode(), rows)
    assert ours.vocab_size == rows
    for text in TEXTS + TEXTS:  # the first is tokenised without building the whole tokenizer
        assert ours.encode(text) == smaller.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


def test_merges_of_word_parts_with_a_prefix():
    vocab = ["a", "##b", "##c", "##bc", "abc", "ab"]

    def library(n):
        merges = [("##b", "##c"), ("a", "##bc"), ("a", "##b")]
        within = [m for m in merges if all(t in vocab[:n] for t in (*m, m[0] + m[1][2:]))]
        model = models.BPE({t: i for i, t in enumerate(vocab[:n])}, within, continuing_subword_prefix="##")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.decoder = decoders.Replace("##", "")
        return tokenizer

    for rows in (3, 4, 5, 6):
        ours = Tokenizer(JSON, library(6).to_str().encode(), rows)
        for text in ("abc", "ab", "abcb"):
            assert ours.encode(text) == library(rows).encode(text).ids


def test_added_tokens_without_a_row_are_text():
    added = [("<|im_start|>", True), ("<|im_end|>", True), ("[PAD2]", False), ("[PAD3]", True)]
    library = byte_level(270, added)
    letters = byte_level(270)
    ours = Tokenizer(JSON, library.to_str().encode(), 272)
    assert ours.encode("a<|im_end|>b") == library.encode("a<|im_end|>b").ids
    for text in ("a[PAD2]b", "[PAD3]", "x [PAD2][PAD3]"):
        ids = letters.encode(text).ids
        assert ours.encode(text) == ids == ours.encode(text, parse_special=False)
        assert ours.encode_escaped(ours.special.escape(text)) == ids
        assert ours.decode(ids) == text
    assert sorted(ours.special.ids) == ["<|im_end|>", "<|im_start|>"]
    with pytest.raises(TokenizerError, match="272.*0 to 271"):
        ours.decode([272])


@pytest.mark.parametrize("less", [0, 1, 2, 3, 7])
def test_unigram_is_the_one_with_fewer_pieces(less):
    whole, size = unigram(None)
    ours, smaller = Tokenizer(JSON, whole.to_str().encode(), size - less), unigram(size - less)[0]
    for text in TEXTS:
        assert ours.encode(text) == smaller.encode(text).ids
    assert ours.vocab_size == size - less


@pytest.mark.parametrize("rows", [260, 263, 265, 268, 270, 271])
def test_sentencepiece_is_the_model_with_fewer_pieces(rows):
    whole = pieces(None)
    ours = Tokenizer(MODEL | {"added_tokens": {"<x>": 271, "<y>": 272}}, whole, rows)
    assert first_pieces(whole, rows).startswith(whole[:100]) and ours.vocab_size == rows
    smaller = sentencepiece.SentencePieceProcessor(model_proto=pieces(rows))
    for text in [*TEXTS, "<x>the<y>"]:
        assert ours.encode(text) == smaller.encode(text)
    assert sentencepiece.SentencePieceProcessor(model_proto=first_pieces(whole, rows)).get_piece_size() == rows


def test_bytes_without_a_row_are_unknown():
    """SentencePiece wants all 256 or none, so that a model with fewer has the others at its end."""
    here = sorted(BYTE_PIECES - {"<0xA9>", "<0x0A>"})
    entries = [("<unk>", 0.0, UNKNOWN), *((byte, 0.0, BYTE) for byte in here), ("x", -1.0, NORMAL)]
    entries += [("<0x0A>", 0.0, BYTE), ("<0xA9>", 0.0, BYTE)]
    ours = Tokenizer(
        {"kind": "tokenizer.model"}, model_bytes(entries, BPE, {"unk": 0}, Normalizer(dummy_prefix=False)), 256
    )
    assert ours.vocab_size == 256
    assert ours.encode("x\u00e9\nx") == [255, 1 + here.index("<0xC3>"), 0, 0, 255]


def test_an_added_token_of_sentencepiece_without_a_row_is_text():
    ours = Tokenizer(MODEL | {"added_tokens": {"<x>": 271, "<y>": 272}, "visible": [272]}, pieces(None), 272)
    assert ours.encode("<x>")[-1:] == [271]
    assert 272 not in ours.encode("<y>") and ours.decode(ours.encode("<y>"), skip_special=True) == "<y>"


def test_a_model_without_its_unknown_token_is_refused_in_one_line():
    data = model_bytes([("a", 0.0, NORMAL), ("b", 0.0, NORMAL), ("<unk>", 0.0, UNKNOWN)], BPE, {}, Normalizer(False))
    assert Tokenizer(MODEL, data, 3).vocab_size == 3
    with pytest.raises(TokenizerError) as error:
        Tokenizer(MODEL, data, 2)
    assert "\n" not in str(error.value)


def test_ids_without_a_token_have_no_text():
    for info, data, size in ((JSON, byte_level(270).to_str().encode(), 270), (MODEL, pieces(None), 271)):
        ours = Tokenizer(info, data, size + 5)
        for token in (size, size + 4):
            assert ours.token_bytes(token) == b"" and ours.decode([token]) == "" and not ours.is_special(token)
            stream = ours.stream()
            assert stream.push(token) + stream.finish() == ""


def test_types_of_pieces():
    assert piece_types(pieces(None)) == [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 12]


def test_pieces_that_become_control_pieces():
    changed = as_control(pieces(None), {2, 260, 266})
    model, before = (sentencepiece.SentencePieceProcessor(model_proto=data) for data in (changed, pieces(None)))
    assert [i for i in range(271) if model.is_control(i)] == [1, 2, 260, 266]
    assert [model.id_to_piece(i) for i in range(271)] == [before.id_to_piece(i) for i in range(271)]


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\x05abc", b"\xff" * 11, b"\x0f", b"\x0d\x00", b"\x0a\x02\x18\xff"])
def test_damaged_models_are_no_crash(data):
    with pytest.raises(ValueError, match="damaged"):
        piece_types(data)
