"""Tokenizers: equal to the libraries they stand on, whole and streamed; special tokens only where meant."""

import io
import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from kvrun.errors import TokenizerError
from kvrun.text.special_tokens import ESCAPE
from kvrun.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again. It isn't over; they've 1234 more.",
    "def f(x):\n    return x  # naïve café — “quoted” 你好，世界 שלום мир 🙂🚀\n\t\tüber straße",
] * 3
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA2 = Path(__file__).resolve().parents[3] / "shared/data/llama2-tokenizer.model"


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIALS,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False), "  "])
    return tokenizer


def byte_fallback(**metaspace):
    """In the style of Llama 2's tokenizer.json; with `metaspace`, of newer ones."""
    alphabet = sorted({c for line in CORPUS[:1] for c in line if c != " "} | {"\u2581"})
    vocab = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *alphabet,
        "\u2581t",
        "he",
        "\u2581the",
    ]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(vocab)},
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
            merges=[("\u2581", "t"), ("h", "e"), ("\u2581t", "he")],
        )
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in vocab[:3]])
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False, **metaspace)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    replace = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return tokenizer


def unigram():
    alphabet = sorted({c for line in CORPUS for c in line if c != " "})
    vocab = [
        ("<unk>", 0.0),
        *((c, -5.0) for c in alphabet),
        ("\u2581", -2.0),
        ("\u2581the", -3.0),
        ("er", -3.0),
    ]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


LIBRARY = {
    "byte-level": byte_level(),
    "prepend": byte_fallback(),
    "metaspace-first": byte_fallback(prepend_scheme="first"),
    "metaspace-always": byte_fallback(prepend_scheme="always"),
    "metaspace-never": byte_fallback(prepend_scheme="never"),
    "unigram": unigram(),
}
INFO = {"kind": "tokenizer.json", "add_bos": False, "add_eos": False, "bos_id": 1, "eos_id": 2}


def wrap(library, **info):
    return Tokenizer(INFO | info, library.to_str().encode(), library.get_vocab_size())


OURS = {name: wrap(library) for name, library in LIBRARY.items()}
BOTH = pytest.mark.parametrize("name", LIBRARY)

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "a",
    "the",
    " the",
    "the  the\n\n",
    "\0",
    "a\0b",
    "\x1b[31m\x07\x7f",
    "e\u0301\u200d\u202e",
    "שלום עולם",
    "你好，世界。",
    "👩‍👩‍👧‍👦🇩🇪",
    "﻿bom",
    "\U0010ffff\ufdd0\ufffe",
    "def f(x):\r\n\treturn {x!r}",
    "<|im_end|>",
    "x<|im_start|>y",
    "</s> <s>",
    "<0x41>",
    "\u2581",
    "12345 67,8",
    "ÿĀġĢ",
    "'s 'S 've",
]


def streamed(tokenizer, ids, **options):
    stream = tokenizer.stream(**options)
    return "".join(map(stream.push, ids)) + stream.finish()


@BOTH
@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_a_text_are_the_librarys(name, text):
    assert OURS[name].encode(text) == LIBRARY[name].encode(text, add_special_tokens=False).ids


@BOTH
@settings(max_examples=170, deadline=None)
@given(
    text=st.text(
        st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\tthe<|im_end>s/")),
        max_size=60,
    )
)
def test_ids_of_any_text_are_the_librarys(name, text):
    ids = OURS[name].encode(text)
    assert ids == LIBRARY[name].encode(text, add_special_tokens=False).ids
    assert OURS[name].decode(ids) == LIBRARY[name].decode(ids, skip_special_tokens=False)


@BOTH
def test_decoding_any_ids_is_the_librarys_decoding(name):
    library, ours = LIBRARY[name], OURS[name]
    rng = random.Random(5)
    size = library.get_vocab_size()
    for _ in range(1000):
        ids = [rng.randrange(size) for _ in range(rng.randrange(12))]
        for skip in (False, True):
            assert ours.decode(ids, skip_special=skip) == library.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["byte-level", "unigram"])
def test_a_stream_of_any_ids_is_the_librarys_decoding(name):
    library, ours = LIBRARY[name], OURS[name]
    rng = random.Random(6)
    for _ in range(1000):
        ids = [rng.randrange(library.get_vocab_size()) for _ in range(rng.randrange(12))]
        for skip in (False, True):
            assert streamed(ours, ids, skip_special=skip) == library.decode(ids, skip_special_tokens=skip)


@BOTH
def test_a_stream_of_a_texts_ids_is_the_text(name):
    for text in TEXTS + CORPUS:
        ids = OURS[name].encode(text)
        whole = LIBRARY[name].decode(ids, skip_special_tokens=False)
        assert streamed(OURS[name], ids, skip_special=False) == whole


@BOTH
def test_every_token_in_a_stream_alone(name):
    for token in range(LIBRARY[name].get_vocab_size()):
        expected = LIBRARY[name].decode([token], skip_special_tokens=False)
        assert streamed(OURS[name], [token], skip_special=False) == expected


def test_a_character_is_held_back_until_it_is_whole():
    ours = OURS["byte-level"]
    ids = [ours.encode(c)[0] for c in "x"]
    for byte in "🚀".encode():
        ids += [i for i in range(ours.vocab_size) if ours.token_bytes(i) == bytes([byte])][:1]
    stream = ours.stream()
    assert [stream.push(i) for i in ids] == ["x", "", "", "", "🚀"]
    assert stream.finish() == ""


def test_invalid_bytes_are_replaced_as_soon_as_they_are_known():
    ours = OURS["byte-level"]
    token = {ours.token_bytes(i): i for i in range(ours.vocab_size)}
    stream = ours.stream()
    texts = [stream.push(token[bytes([b])]) for b in (0xE2, 0x82, 0x41, 0xFF, 0xF0)]
    assert texts == ["", "", "\ufffdA", "\ufffd", ""]
    assert stream.finish() == "\ufffd"


def test_invalid_bytes_of_byte_fallback_give_one_replacement_each():
    ours = OURS["prepend"]
    byte = next(i for i in range(ours.vocab_size) if ours.token_bytes(i) == b"\xe2")
    ids = [byte + n for n in (0, 0x82 - 0xE2, 0x41 - 0xE2)]
    assert streamed(ours, ids) == "\ufffd\ufffdA"


def test_token_bytes():
    ours, fallback = OURS["byte-level"], OURS["prepend"]
    assert b"".join(map(ours.token_bytes, ours.encode(" é🚀\n"))) == " é🚀\n".encode()
    assert ours.token_bytes(2) == b"<|im_end|>"
    assert b"".join(map(fallback.token_bytes, fallback.encode("the é"))) == " the é".encode()


@BOTH
def test_leading_space_only_where_a_text_begins(name):
    ours = OURS[name]
    ids = ours.encode("the the", add_special=False)
    assert streamed(ours, ids) == "the the"
    assert streamed(ours, ids, start=False) in ("the the", " the the")


@pytest.mark.parametrize("name", ["prepend", "metaspace-first", "metaspace-always"])
def test_continued_text_gets_no_dummy_space(name):
    ours = OURS[name]
    ids = ours.encode("the", add_special=False) + ours.encode("the the</s>", add_special=False, continued=True)
    assert ours.decode(ids) == "thethe the</s>"


def test_text_after_a_special_token_follows_the_library():
    for name in ("prepend", "metaspace-first", "metaspace-always"):
        parts = OURS[name].special.split("the<s>the")
        expected = LIBRARY[name].encode("the<s>the", add_special_tokens=False).ids
        assert OURS[name]._encode_parts(parts, False) == expected


def test_beginning_and_end_of_text():
    ours = wrap(LIBRARY["byte-level"], add_bos=True, add_eos=True)
    assert ours.encode("")[:1] == [1] and ours.encode("")[-1:] == [2]
    assert ours.encode("a") == [1, *OURS["byte-level"].encode("a"), 2]
    assert ours.encode("a", add_special=False) == OURS["byte-level"].encode("a")
    assert wrap(LIBRARY["byte-level"], add_bos=True, bos_id=None).encode("") == []


# --- special tokens only where they are meant -----------------------------------------------------


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>system\nb", "<|im_end|><|im_end|>", "<<|im_end|>>"])
def test_special_tokens_can_be_left_as_text(text):
    ours = OURS["byte-level"]
    assert any(map(ours.is_special, ours.encode(text)))
    ids = ours.encode(text, parse_special=False)
    assert not any(map(ours.is_special, ids)) and ours.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(content=st.lists(st.sampled_from([*SPECIALS, *"<|im_end>/ \n", ESCAPE])).map("".join))
def test_escaped_text_never_becomes_a_special_token(content):
    ours = OURS["byte-level"]
    marked = "<|im_start|>" + ours.special.escape(content) + "<|im_end|>"
    ids = ours.encode_escaped(marked)
    assert ids[0] == 1 and ids[-1] == 2 and not any(map(ours.is_special, ids[1:-1]))
    assert ours.decode(ids) == "<|im_start|>" + content + "<|im_end|>"
    assert ids[1:-1] == ours.encode(content, parse_special=False)


def test_text_split_over_two_contents_is_no_special_token():
    ours = OURS["byte-level"]
    for n in range(1, len("<|im_end|>")):
        parts = [ours.special.escape("<|im_end|>"[:n]), ours.special.escape("<|im_end|>"[n:])]
        assert not any(map(ours.is_special, ours.encode_escaped("".join(parts))))


def test_a_stop_token_is_special_even_if_not_marked_so():
    library = LIBRARY["byte-level"]
    token = library.token_to_id("<think>")
    ours = Tokenizer(INFO, library.to_str().encode(), 0, stop_ids=[token])
    assert ours.encode("a<think>")[-1] == token
    ids = ours.encode_escaped(ours.special.escape("a<think>"))
    assert token not in ids and ours.decode(ids) == "a<think>"


def test_special_tokens_that_take_white_space_with_them():
    library = byte_level()
    library.add_special_tokens([AddedToken("<|user|>", rstrip=True), AddedToken("<mask>", lstrip=True)])
    ours = Tokenizer(INFO, library.to_str().encode())
    text = "a <|user|> \n b <mask> c >"
    expected = library.encode(text, add_special_tokens=False).ids
    escaped = text[:-1] + ours.special.escape(">")
    assert escaped != text and ours.encode_escaped(escaped) == expected == ours.encode(text)


def special_word(model, **parts):
    """A tokenizer whose model itself makes the special token "the" of a text, and one token that is not special."""
    tokenizer = tokenizers.Tokenizer(model)
    for part, value in parts.items():
        setattr(tokenizer, part, value)
    tokenizer.add_special_tokens([AddedToken("the", normalized=False), AddedToken("<unk>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<|x|>", normalized=False), AddedToken("<tool>", special=False)])
    return tokenizer


LETTERS = ["<unk>", "\u2581", *"aethx|<>lo", "the"]
SPECIAL_WORDS = {
    "merges": special_word(
        models.BPE(
            {text: i for i, text in enumerate([*LETTERS, "th", "thea"])},
            [("t", "h"), ("th", "e"), ("the", "a")],
            unk_token="<unk>",
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    ),
    "whole words": special_word(
        models.BPE({text: i for i, text in enumerate(LETTERS)}, [], unk_token="<unk>", ignore_merges=True),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    ),
    "unigram": special_word(
        models.Unigram([(text, -1.0 * len(LETTERS) / len(text)) for text in LETTERS], 0, False),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    ),
}


@pytest.mark.parametrize("name", SPECIAL_WORDS)
def test_what_the_model_itself_makes_of_a_special_tokens_text_is_left_as_text_too(name):
    library = SPECIAL_WORDS[name]
    ours, the, tool = wrap(library), library.token_to_id("the"), library.token_to_id("<tool>")
    # It is the model that finds the token, although the library was told to leave special tokens alone.
    library.encode_special_tokens = True
    assert the in library.encode("the", add_special_tokens=False).ids
    library.encode_special_tokens = False
    for text in ("the", "the<tool>ax", "<|x|>the", "thea"):
        for ids in (ours.encode(text, parse_special=False), ours.encode_escaped(ours.special.escape(text))):
            assert not any(map(ours.is_special, ids)) and ours.decode(ids).replace(" ", "") == text
            assert ids.count(tool) == text.count("<tool>")
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_special_tokens_that_are_whole_words():
    library = byte_level()
    library.add_special_tokens([AddedToken("<|user|>", single_word=True), AddedToken("stop", single_word=True)])
    ours = Tokenizer(INFO, library.to_str().encode())
    text = "a<|user|> <|user|>b é<|user|> stop, (stop) nonstop stops _stop <|im_end|>stop<|im_end|> >"
    expected = library.encode(text, add_special_tokens=False).ids
    assert expected.count(library.token_to_id("stop")) == 3 and library.token_to_id("<|user|>") not in expected
    assert ours.encode_escaped(text[:-1] + ours.special.escape(">")) == expected == ours.encode(text)


# --- tokenizer.model ------------------------------------------------------------------------------


def small_sentencepiece():
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        character_coverage=1.0,
    )
    return out.getvalue()


@pytest.fixture(scope="module", params=["small", "llama2"])
def sentencepiece_pair(request):
    import sentencepiece

    if request.param == "llama2" and not LLAMA2.exists():
        pytest.skip("no Llama 2 tokenizer.model at hand")
    data = LLAMA2.read_bytes() if request.param == "llama2" else small_sentencepiece()
    info = {"kind": "tokenizer.model", "add_bos": True, "add_eos": False, "bos_id": 1, "eos_id": 2}
    return Tokenizer(info, data), sentencepiece.SentencePieceProcessor(model_proto=data)


def test_sentencepiece_texts(sentencepiece_pair):
    ours, library = sentencepiece_pair
    for text in [*TEXTS, *CORPUS]:
        ids = ours.encode(text, parse_special=False)
        assert ids == [1, *library.encode(text)]
        assert ours.decode(ids, skip_special=True) == library.decode(ids)


def test_sentencepiece_decoding_any_ids(sentencepiece_pair):
    ours, library = sentencepiece_pair
    rng = random.Random(7)
    for _ in range(2000):
        ids = [
            rng.choice([rng.randrange(1, library.get_piece_size()), rng.randrange(3, 259)])
            for _ in range(rng.randrange(12))
        ]
        assert ours.decode(ids, skip_special=True) == library.decode(ids) == streamed(ours, ids)


def test_sentencepiece_special_tokens_and_continuation(sentencepiece_pair):
    ours, library = sentencepiece_pair
    the = library.encode("the")
    assert ours.encode("<s>the</s>", add_special=False) == [1, *the, 2]
    assert ours.decode([1, *the, 2]) == "<s> the</s>"
    more = ours.encode("the </s>", add_special=False, continued=True)
    assert ours.decode(ours.encode("the") + more) == "<s> thethe </s>"
    assert 2 not in ours.encode_escaped(ours.special.escape("a</s>b"))


def test_sentencepiece_without_dummy_space_after_special_tokens():
    data = small_sentencepiece()
    info = {"kind": "tokenizer.model", "bos_id": 1, "legacy": False, "added_tokens": {"<|user|>": 340}}
    ours = Tokenizer(info, data)
    assert ours.decode(ours.encode("<|user|>the")) == "<|user|>the"
    assert ours.vocab_size == 341 and ours.token_bytes(340) == b"<|user|>"
    with pytest.raises(TokenizerError):
        Tokenizer(info | {"added_tokens": {"x": -1}}, data)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[-1], [10**9], [2**70], ["a"], [1.0], [None]])
def test_ids_that_are_none(ids):
    for name in OURS:
        with pytest.raises(TokenizerError):
            OURS[name].decode(ids)
        with pytest.raises(TokenizerError):
            OURS[name].token_bytes(ids[0])
        with pytest.raises(TokenizerError):
            OURS[name].stream().push(ids[0])


def test_padding_of_the_models_vocabulary_has_no_text():
    library = LIBRARY["byte-level"]
    ours = Tokenizer(INFO, library.to_str().encode(), vocab_size=1000)
    assert ours.token_bytes(999) == b"" and ours.decode([999]) == "" == streamed(ours, [999])
    with pytest.raises(TokenizerError, match="1000.*0 to 999"):
        ours.decode([1000])


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", b"bytes", None, 3])
def test_text_that_cannot_be_encoded(text):
    for name in OURS:
        with pytest.raises(TokenizerError) as error:
            OURS[name].encode(text)
        assert "\n" not in str(error.value)


def test_tokenizers_that_cannot_be_used():
    good = json.loads(LIBRARY["byte-level"].to_str())
    for data in (
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        json.dumps(good | {"decoder": None}).encode(),
        json.dumps(good | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}).encode(),
        json.dumps(good | {"model": {"type": "BPE"}}).encode(),
    ):
        with pytest.raises(TokenizerError) as error:
            Tokenizer(INFO, data)
        assert "\n" not in str(error.value)
    for data in (b"", b"garbage" * 10, json.dumps(good).encode()):
        with pytest.raises(TokenizerError):
            Tokenizer({"kind": "tokenizer.model"}, data)
    with pytest.raises(TokenizerError):
        Tokenizer({"kind": "none"}, b"")


def test_stored_truncation_and_padding_are_ignored():
    library = byte_level()
    library.enable_truncation(4)
    library.enable_padding(length=8)
    ours = Tokenizer(INFO, library.to_str().encode())
    assert len(ours.encode(CORPUS[0])) > 8 and len(ours.encode("a")) == 1


def test_shared_between_threads():
    from concurrent.futures import ThreadPoolExecutor

    ours = wrap(LIBRARY["byte-level"])
    text = "the <|im_end|> fox " * 20
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: ours.encode(text, parse_special=n % 2 == 0), range(200)))
    assert all(r == results[n % 2] for n, r in enumerate(results))


def test_added_tokens_of_sentencepiece_that_are_shown_or_take_white_space():
    data = small_sentencepiece()
    info = {
        "kind": "tokenizer.model",
        "bos_id": 1,
        "added_tokens": {"<tool>": 340, "<|user|>": 341, "<mask>": 342},
        "visible": [340],
        "rstrip": [341],
        "lstrip": [342],
    }
    ours = Tokenizer(info, data)
    a, b = ours.encode("a"), ours.encode("b")
    assert ours.encode("<|user|>\n a  <mask>b") == [341, *a, 342, *b]
    # Found in ordinary text too, and shown; its neighbours are texts of their own.
    for parse in (True, False):
        assert ours.encode("a<tool>b\ufdd0<tool>", parse_special=parse)[: len(a) + 1] == [*a, 340]
    assert ours.encode("<tool>b", parse_special=False) == [340, *b]
    stream = ours.stream(skip_special=True)
    assert "".join(map(stream.push, [340, 341, *a])) + stream.finish() == "<tool> a"
    assert not ours.is_special(340) and ours.is_special(341)
    with pytest.raises(TokenizerError, match="rstrip"):
        Tokenizer(info | {"rstrip": ["x"]}, data)
    whole = Tokenizer(info | {"single_word": [340, 341]}, data)
    assert {340, 341} <= {*whole.encode("<tool>, <|user|>")}
    assert not {340, 341} & {*whole.encode("a<tool> <|user|>b")}
