"""SentencePiece tokenizers rebuilt from GGUF metadata: the same ids as the model they were taken from."""

import io
import struct

import pytest
import sentencepiece

from kvrun.convert.fields import Fields
from kvrun.convert.gguf_tokenizer import read_tokenizer
from kvrun.errors import ConvertError
from kvrun.text.tokenizer import Tokenizer
from support.strings import varied_strings

TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again. It isn't over; they've 1234 more.",
    "def f(x):  return x  # naïve café — quoted 你好，世界 שלום мир über straße",
] * 4


def trained(kind="bpe", normalization="identity", **options):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=out,
        vocab_size=370 if kind == "bpe" else 320,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name=normalization,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **{"remove_extra_whitespaces": False, **options},
    )
    return out.getvalue()


def kind_of(model, i):
    flags = (model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)
    return next((number for is_it, number in flags if is_it(i)), 1)


def metadata(data, user_defined=(), **more):
    """What a GGUF file says of this model."""
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    n = model.get_piece_size()
    pieces = [model.id_to_piece(i) for i in range(n)]
    values = {
        "model": "llama",
        # GGUF has spaces in these where SentencePiece has its own sign.
        "tokens": [p.replace("\u2581", " ") if p in user_defined else p for p in pieces],
        "scores": [model.get_score(i) for i in range(n)],
        "token_type": [4 if pieces[i] in user_defined else kind_of(model, i) for i in range(n)],
        "unknown_token_id": model.unk_id(),
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def rebuilt(values):
    vocabulary = read_tokenizer(Fields(values, "m.gguf"))
    n = len(values["tokenizer.ggml.tokens"])
    return Tokenizer(vocabulary.model_entry(n), vocabulary.data, n, vocabulary.stops())


USER = ["\u2581\u2581", "\u2581\u2581\u2581", "\n\n", "<b>", "</b>"]
CASES = {
    "llama": ({}, (), {}),
    "gemma": (
        {"add_dummy_prefix": False, "user_defined_symbols": USER},
        USER,
        {"add_space_prefix": False},
    ),
    "unigram": (
        {"kind": "unigram", "normalization": "nmt_nfkc", "remove_extra_whitespaces": True},
        (),
        {"model": "t5", "add_space_prefix": True, "remove_extra_whitespaces": True},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    options, user_defined, more = CASES[request.param]
    data = trained(**options)
    if request.param == "unigram":
        more = more | {"precompiled_charsmap": list(charsmap(data))}
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    return library, rebuilt(metadata(data, user_defined, **more))


def charsmap(data):
    """Field 2 of normalizer_spec, which is field 3 of the model."""
    return fields(fields(data)[3])[2]


def fields(data):
    """Fields of a Protocol Buffers message, the last of each number."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 2:
            size = varint()
            found[number], at = data[at : at + size], at + size
        elif wire == 5:
            found[number], at = struct.unpack_from("<f", data, at)[0], at + 4
        else:
            found[number] = varint()
    return found


def test_ids_of_varied_strings(pair):
    library, ours = pair
    texts = varied_strings(1500, seed=31, special=False) + ["a  b   c", "\n\n\n<b>x</b> ", "<b></b>\n\n  "]
    for text in texts:
        expected = library.encode(text)
        assert ours.encode(text, add_special=False, parse_special=False) == expected, repr(text)
        assert ours.decode(expected) == library.decode(expected), repr(text)


def test_the_model_says_the_same_of_itself(pair):
    library, ours = pair
    other = ours._backend._model
    names = ("unk_id", "bos_id", "eos_id", "pad_id", "get_piece_size")
    assert [getattr(other, n)() for n in names] == [getattr(library, n)() for n in names]
    assert [other.id_to_piece(i) for i in range(ours.vocab_size)] == [
        library.id_to_piece(i) for i in range(ours.vocab_size)
    ]


def test_bos_and_special_tokens():
    values = metadata(trained(), bos_token_id=1)
    assert rebuilt(values).encode("a")[0] == 1
    assert rebuilt(values | {"tokenizer.ggml.add_bos_token": False}).encode("a")[0] != 1
    ours = rebuilt(values)
    ids = ours.encode("<s>a</s>", add_special=False)
    assert (ids[0], ids[-1]) == (1, 2) and len(ids) > 2
    assert 2 not in ours.encode("a</s>", parse_special=False)
    assert ours.stream().push(2) == ""


def test_tokens_without_a_text_of_their_own_keep_their_ids():
    values = metadata(trained())
    tokens = values["tokenizer.ggml.tokens"]
    n = len(tokens)
    values["tokenizer.ggml.tokens"] = [*tokens, "", tokens[300], "<|x|>"]
    values["tokenizer.ggml.token_type"] += [1, 1, 3]
    values["tokenizer.ggml.scores"] += [0.0, 0.0, 0.0]
    ours, library = rebuilt(values), sentencepiece.SentencePieceProcessor(model_proto=trained())
    assert ours.encode("<|x|>", add_special=False) == [n + 2]
    for text in varied_strings(200, seed=32, special=False):
        assert ours.encode(text, parse_special=False)[1:] == library.encode(text)


def test_white_space_after_the_tokens_of_phi3():
    values = metadata(trained())
    values["tokenizer.ggml.tokens"] += ["<|user|>", "<|endoftext|>"]
    values["tokenizer.ggml.token_type"] += [3, 3]
    values["tokenizer.ggml.scores"] += [0.0, 0.0]
    n = len(values["tokenizer.ggml.tokens"])
    phi = rebuilt(values | {"general.architecture": "phi3"})
    a = phi.encode("a", add_special=False)
    assert phi.encode("<|user|>\n \na", add_special=False) == [n - 2, *a]
    assert phi.encode("<|endoftext|>\na", add_special=False) != [n - 1, *a]
    assert rebuilt(values).encode("<|user|>\na", add_special=False) != [n - 2, *a]
    named = rebuilt(values | {"general.name": "My Phi-3 mini"})
    assert named.encode("<|user|>\n \na", add_special=False) == [n - 2, *a]


def test_what_follows_a_token_that_a_user_defined_is_a_text_of_its_own():
    values = metadata(trained())
    for text, kind in (("[INST]", 4), ("  ", 4), ("[/INST]", 3)):
        values["tokenizer.ggml.tokens"].append(text)
        values["tokenizer.ggml.token_type"].append(kind)
        values["tokenizer.ggml.scores"].append(0.0)
    n = len(values["tokenizer.ggml.tokens"])
    ours = rebuilt(values)
    a = ours.encode("a", add_special=False)
    for parsed in (True, False):
        assert ours.encode("[INST]a  a", add_special=False, parse_special=parsed) == [n - 3, *a, n - 2, *a]
    assert ours.encode("[INST]a[/INST]a", add_special=False) == [n - 3, *a, n - 1, *a]
    assert ours.decode([n - 3, *a, n - 2, *a]) == "[INST] a   a"


def changed(index, text, kind):
    """The model's metadata with another text and type of one token."""
    values = metadata(trained())
    for key, value in (("tokens", text), ("token_type", kind)):
        values[f"tokenizer.ggml.{key}"][index] = value
    return values


def test_a_character_may_stand_for_its_byte():
    byte = metadata(trained())["tokenizer.ggml.tokens"].index("<0x25>")
    ours, library = rebuilt(changed(byte, "%", 1)), sentencepiece.SentencePieceProcessor(model_proto=trained())
    for text in ("100% %%", "%", *varied_strings(200, seed=33, special=False)):
        ids = ours.encode(text, add_special=False, parse_special=False)
        assert ids == library.encode(text) and ours.decode(ids) == library.decode(ids)


def test_bytes_of_other_types():
    values = metadata(trained())
    values["tokenizer.ggml.token_type"] = [1 if kind == 6 else kind for kind in values["tokenizer.ggml.token_type"]]
    vocabulary = read_tokenizer(Fields(values, "m.gguf"))
    assert vocabulary.data == read_tokenizer(Fields(metadata(trained()), "m.gguf")).data
    assert vocabulary.notes == ("256 tokens <0xNN> are bytes although the file does not say so",)


@pytest.mark.parametrize("value", [None, 5000])
def test_ids_that_such_a_model_has_if_the_metadata_do_not_say(value):
    ids = dict.fromkeys(("unknown_token_id", "bos_token_id", "eos_token_id"), value)
    info = read_tokenizer(Fields(metadata(trained(), **ids), "m.gguf")).info
    assert [info[key] for key in ("unk_id", "bos_id", "eos_id", "pad_id", "add_bos")] == [0, 1, 2, None, True]
    absent = read_tokenizer(Fields(metadata(trained(), **dict.fromkeys(ids, 2**32 - 1)), "m.gguf")).info
    assert [absent[key] for key in ("unk_id", "bos_id", "eos_id", "add_bos")] == [0, None, None, False]


def test_the_space_before_a_text_of_unigram_is_only_there_if_the_file_says_so():
    values = metadata(trained("unigram"), model="t5")
    assert not rebuilt(values).decode(rebuilt(values).encode("the", add_special=False)).startswith(" ")
    assert not rebuilt(values)._backend.dummy_space
    assert rebuilt(values | {"tokenizer.ggml.add_space_prefix": True})._backend.dummy_space


BASE = metadata(trained())


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"scores": None}, "scores: missing"),
        ({"scores": [0.0]}, "scores: missing, or not one number"),
        ({"scores": ["x"] * len(BASE["tokenizer.ggml.tokens"])}, "scores"),
        ({"token_type": [9]}, "token_type: not one integer for each token"),
        ({"token_type": [1.0] * len(BASE["tokenizer.ggml.tokens"])}, "token_type: not one integer for each token"),
        (
            {"tokens": ["<0x00"] + BASE["tokenizer.ggml.tokens"][1:4] + ["x"] + BASE["tokenizer.ggml.tokens"][5:]},
            "tokens: token 4 is of the type of bytes, but",
        ),
        ({"precompiled_charsmap": ["a"]}, "precompiled_charsmap"),
        ({"precompiled_charsmap": [255, 255, 0, 0, 1]}, "model: the tokenizer cannot be built: "),
        ({"bos_token_id": "x"}, "bos_token_id: 'x' is not a token id"),
        ({"add_space_prefix": 3}, "add_space_prefix"),
        ({"tokens": ["\ud800"] + BASE["tokenizer.ggml.tokens"][1:]}, "tokens: not valid UTF-8"),
    ],
)
def test_what_is_refused(changes, says):
    values = dict(BASE)
    for key, value in changes.items():
        values[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ConvertError, match=says) as caught:
        read_tokenizer(Fields(values, "m.gguf"))
    assert "tokenizer.ggml." in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_missing():
    byte = metadata(trained())["tokenizer.ggml.tokens"].index("<0xE2>")
    values = changed(byte, "<x>", 1)
    note = "1 of the 256 byte tokens are missing, the first is <0xE2>: what needs them is unknown"
    assert read_tokenizer(Fields(values, "m.gguf")).notes == (note,)
    ours, library = rebuilt(values), sentencepiece.SentencePieceProcessor(model_proto=trained())
    for text in ("\u2603", "a\u2603\U0001f642", "\U0001f642"):
        expected = [0 if token == byte else token for token in library.encode(text)]
        assert ours.encode(text, add_special=False) == expected
