"""Tokens that the files of a Hugging Face folder declare: added, numbered and found as transformers does it.

tests/fixtures/declared_tokens.json has what transformers made of the same folders (make_declared_tokens.py).
"""

import json

import pytest
from tokenizers import pre_tokenizers

import kvrun
from kvrun.convert.fields import Fields, read_json
from kvrun.convert.hf_tokenizer import read_tokenizer
from kvrun.convert.pipeline import convert
from kvrun.convert.sentencepiece_model import BPE, BYTE_PIECES, Normalizer, model_bytes
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError, TokenizerError
from kvrun.text.sentencepiece_file import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from kvrun.text.tokenizer import Tokenizer
from support import ROOT
from support.cases import either, in_turn
from support.declared_tokens import letters, pieces, write_folder
from support.files import rewrite
from support.make_checkpoint import CONFIG, hf_folder, save_gguf, tokenizer_json, write_json
from support.wrong_values import WRONG, places, with_value

FIXTURE = json.loads((ROOT / "tests/fixtures/declared_tokens.json").read_text(encoding="utf-8"))
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", **ENDS}


def read(folder, base, **files):
    """The vocabulary of a folder of `base` with these files, and its tokenizer."""
    path = write_folder(folder, base, files)
    vocabulary = read_tokenizer(str(path), read_json(str(path), "config.json"), None)
    return vocabulary, Tokenizer(vocabulary.model_entry(300), vocabulary.data, 300, vocabulary.stops())


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: case["what"])
def test_tokens_are_those_of_transformers(tmp_path, case):
    vocabulary, tokenizer = read(tmp_path, case["base"], **case["files"])
    assert [tokenizer.encode(text, add_special=False) for text in FIXTURE["texts"]] == case["ids"]
    named = case["eos"] is not None or case["base"] == "letters"
    assert vocabulary.info["eos_id"] == (case["eos"] if named else 2)
    # SentencePiece says itself what its unknown token is.
    assert {t: i for t, i in vocabulary.special.items() if t != "<unk>"} == {
        t: i for t, i in case["special"].items() if t != "<unk>"
    }


def test_declared_tokens_are_shown_or_hidden_and_matched_as_they_are_declared(tmp_path):
    decoder = {"260": {"content": "<|im_start|>", "special": False}, "261": {"content": "<tool>", "special": True}}
    vocabulary, tokenizer = read(tmp_path, "letters", tokenizer_config=ENDS | {"added_tokens_decoder": decoder})
    assert "<tool>" in vocabulary.special and "<|im_start|>" not in vocabulary.special
    # Text that a user typed becomes the token that is not special, never the one that is.
    typed = tokenizer.encode_escaped(tokenizer.special.escape("a<tool>b<|im_start|>c"))
    assert typed.count(260) == 1 and 261 not in typed
    assert tokenizer.decode([260, 261, 258], skip_special=True) == "<|im_start|>"
    assert json.loads(vocabulary.data)["model"] == letters()["model"]


def test_a_tokenizer_file_that_says_all_is_kept_as_it_is(tmp_path):
    path = write_folder(tmp_path, "letters", {"tokenizer_config": ENDS})
    assert read(tmp_path, "letters", tokenizer_config=ENDS)[0].data == (path / "tokenizer.json").read_bytes()
    assert read(tmp_path / "model", "pieces", tokenizer_config=LLAMA)[0].data == pieces()


@pytest.mark.parametrize("base", ["letters", "pieces"])
def test_other_ids_than_the_files_say_are_noted(tmp_path, base):
    tokens = {"299": {"content": "<x>", "special": True}, "298": {"content": "<y>", "special": True}}
    vocabulary, _ = read(tmp_path, base, tokenizer_config=ENDS | {"added_tokens_decoder": tokens})
    size = 262 if base == "letters" else 271
    assert [vocabulary.special["<y>"], vocabulary.special["<x>"]] == [size, size + 1]
    assert len(vocabulary.notes) == 1
    assert f"'<y>' has id {size}" in vocabulary.notes[0] and "not 298" in vocabulary.notes[0]
    assert "tokenizer_config.json says (and 1 more" in vocabulary.notes[0]


def test_an_added_token_of_tokenizer_json_follows_the_others(tmp_path):
    path = write_folder(tmp_path, "letters", {"tokenizer_config": ENDS})
    spec = letters()
    spec["added_tokens"][-1]["id"] = 280
    write_json(path / "tokenizer.json", spec)
    vocabulary = read_tokenizer(str(path), read_json(str(path), "config.json"), None)
    assert Tokenizer(vocabulary.model_entry(300), vocabulary.data, 300).encode("<tool>") == [261]
    assert len(vocabulary.notes) == 1 and "'<tool>' has id 261" in vocabulary.notes[0]
    assert "not 280 as" in vocabulary.notes[0] and "tokenizer.json says" in vocabulary.notes[0]


def test_a_piece_gets_the_text_that_the_files_give_its_id(tmp_path):
    tokens = {"2": {"content": "</s>", "special": True}, "260": {"content": "<|im_end|>", "special": True}}
    settings = ENDS | {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": tokens}
    vocabulary, tokenizer = read(tmp_path, "pieces", tokenizer_config=settings)
    assert vocabulary.special["<|im_end|>"] == 260 and not vocabulary.notes
    assert tokenizer.encode("<|im_end|>", add_special=False) == [260]
    assert tokenizer.decode([260]) == "<|im_end|>"


def test_control_pieces_need_no_declaration(tmp_path):
    vocabulary, tokenizer = read(tmp_path, "pieces")
    assert vocabulary.special == {"<s>": 1, "</s>": 2} and vocabulary.stops() == [2] and not vocabulary.notes
    assert tokenizer.encode("</s>", add_special=False) == [2]


@pytest.mark.parametrize(
    "model_type, class_, said, legacy",
    [
        ("llama", "LlamaTokenizer", None, False),
        ("llama", "LlamaTokenizerFast", None, False),
        ("llama", "LlamaTokenizer", True, True),
        ("mistral", "LlamaTokenizer", None, True),
        ("mistral", "LlamaTokenizer", False, False),
        ("llama", "PreTrainedTokenizerFast", None, True),
    ],
)
def test_the_dummy_space_after_special_tokens(tmp_path, model_type, class_, said, legacy):
    folder = hf_folder(tmp_path / "hf", CONFIG, tokenizer=False)
    (folder / "tokenizer.model").write_bytes(pieces())
    write_json(folder / "config.json", CONFIG | {"model_type": model_type})
    write_json(folder / "tokenizer_config.json", ENDS | {"tokenizer_class": class_, "legacy": said})
    vocabulary = read_tokenizer(str(folder), read_json(str(folder), "config.json"), None)
    assert vocabulary.info["legacy"] is legacy


@pytest.mark.parametrize(
    "model_type, settings, expected",
    [
        # The texts "a", " a", "<w>a" and "<w> a", as transformers 5.24 cuts them; s is the piece of a space.
        ("llama", {}, ["sa", "sa", "wa", "wsa"]),
        ("llama", {"legacy": True}, ["sa", "sa", "wsa", "wsa"]),
        ("llama", {"legacy": False}, ["sa", "sa", "wa", "wsa"]),
        ("llama", {"add_prefix_space": False}, ["a", "sa", "wa", "wsa"]),
        ("llama", {"add_prefix_space": False, "legacy": True}, ["a", "sa", "wa", "wsa"]),
        ("mistral", {}, ["sa", "ssa", "wsa", "wssa"]),
        ("mistral", {"legacy": True, "add_prefix_space": True}, ["sa", "ssa", "wsa", "wssa"]),
        ("mistral", {"legacy": False}, ["sa", "sa", "wa", "wsa"]),
        # Here transformers 5 adds one all the same; transformers 4 and llama.cpp do not.
        ("mistral", {"add_prefix_space": False}, ["a", "sa", "wa", "wsa"]),
    ],
)
def test_the_dummy_space_and_spaces_that_are_there(tmp_path, model_type, settings, expected):
    path = write_folder(tmp_path, "pieces", {})
    entries = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    entries += [("\u2581", -1.0, NORMAL), ("a", -2.0, NORMAL)]
    ids = {"unk": 0, "bos": 1, "eos": 2}
    (path / "tokenizer.model").write_bytes(model_bytes(entries, BPE, ids, Normalizer(dummy_prefix=True)))
    settings = LLAMA | settings | {"added_tokens_decoder": {"5": {"content": "<w>", "special": True}}}
    write_json(path / "tokenizer_config.json", settings)
    config = Fields(CONFIG | {"model_type": model_type}, "config.json")
    vocabulary = read_tokenizer(str(path), config, None)
    tokenizer = Tokenizer(vocabulary.model_entry(6), vocabulary.data, 6)
    texts = ("a", " a", "<w>a", "<w> a")
    found = ["".join("...saw"[i] for i in tokenizer.encode(text, add_special=False)) for text in texts]
    assert found == expected
    assert tokenizer.decode(tokenizer.encode("a", add_special=False)) == "a"


def test_special_pieces_that_sentencepiece_finds_in_any_text(tmp_path):
    """Pieces of the user-defined type that the folder declares special, and a word: nobody types them."""
    path = write_folder(tmp_path, "pieces", {})
    entries = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("\u2581", -1.0, NORMAL)]
    entries += [
        ("<turn>", 0.0, USER_DEFINED),
        ("<tool>", 0.0, USER_DEFINED),
        ("the", -2.0, NORMAL),
        ("th", -1.0, NORMAL),
    ]
    entries += [(c, -9.0, NORMAL) for c in "aehlnortu<>"]
    ids = {"unk": 0, "bos": 1, "eos": 2}
    (path / "tokenizer.model").write_bytes(model_bytes(entries, BPE, ids, Normalizer(dummy_prefix=False)))
    settings = LLAMA | {"extra_special_tokens": ["<turn>", "the"], "added_tokens_decoder": {}}
    vocabulary, tokenizer = read(path, None, tokenizer_config=settings)
    assert tokenizer.encode("a<turn>the<tool>", add_special=False) == [8, 4, 6, 5]
    typed = tokenizer.encode("a<turn>the<tool>", add_special=False, parse_special=False)
    assert not {4, 6} & {*typed} and typed[-1] == 5 and tokenizer.decode(typed) == "a<turn>the<tool>"
    assert tokenizer.encode_escaped(tokenizer.special.escape("a<turn>the<tool>")) == typed
    assert set(vocabulary.info["added_tokens"].values()) == {1, 2, 4, 6}


# --- names without a token


@pytest.mark.parametrize("base", ["letters", "pieces"])
@pytest.mark.parametrize("name", ["bos", "eos"])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_an_end_that_names_no_token_is_refused(tmp_path, base, name, file):
    files = {"tokenizer_config": ENDS, file: ENDS | {f"{name}_token": {"content": "<|nothing|>"}}}
    with pytest.raises(ConvertError) as error:
        read(tmp_path, base, **files)
    message = str(error.value)
    assert f"{file}.json: field {name}_token: '<|nothing|>' is no token" in message and "\n" not in message


@pytest.mark.parametrize("base", ["letters", "pieces"])
def test_an_end_that_another_file_declares_is_a_token(tmp_path, base):
    for i, files in enumerate(
        (
            {"added_tokens": {"<|im_end|>": 271}},
            {"special_tokens_map": {"additional_special_tokens": ["<|im_end|>"]}},
            {"tokenizer_config": {"extra_special_tokens": {"turn_token": "<|im_end|>"}}},
            {"tokenizer_config": {"pad_token": "<|im_end|>"}},
        )
    ):
        files["tokenizer_config"] = ENDS | {"eos_token": "<|im_end|>"} | files.get("tokenizer_config", {})
        vocabulary, _ = read(tmp_path / str(i), base, **files)
        assert vocabulary.info["eos_id"] == vocabulary.special["<|im_end|>"] == (262 if base == "letters" else 271)


def test_no_end_is_what_an_empty_name_says(tmp_path):
    vocabulary, _ = read(tmp_path, "letters", tokenizer_config={"bos_token": "", "eos_token": None})
    assert (vocabulary.info["bos_id"], vocabulary.info["eos_id"]) == (None, None)


def test_ids_of_unnamed_tokens_come_from_the_configs_in_order(tmp_path):
    path = str(write_folder(tmp_path, "letters", {}))
    generation, config, text = (
        Fields(ids, "config.json")
        for ids in (
            {"eos_token_id": [-1, 5, 6], "bos_token_id": 4294967295},
            {"eos_token_id": 7, "bos_token_id": None, "pad_token_id": 8},
            {"eos_token_id": 9, "bos_token_id": 10, "pad_token_id": 11},
        )
    )
    info = read_tokenizer(path, config, generation, text).info
    assert (info["eos_id"], info["bos_id"], info["pad_id"], info["unk_id"]) == (5, 10, 8, None)
    info = read_tokenizer(path, config, None, config).info
    assert (info["eos_id"], info["bos_id"]) == (7, None)


@pytest.mark.parametrize("base", ["letters", "pieces"])
@pytest.mark.parametrize(
    "file, content, says",
    [
        ("tokenizer_config", {"eos_token": 2}, "eos_token: 2 is not a token"),
        ("tokenizer_config", {"eos_token": ["</s>"]}, "eos_token: .* is not a token"),
        ("tokenizer_config", {"eos_token": {"text": "</s>"}}, "eos_token: .* is not a token"),
        ("tokenizer_config", {"eos_token": {"content": "</s>", "lstrip": 1}}, "eos_token: .* is not a token"),
        ("tokenizer_config", {"image_token": "\udc80"}, "image_token: not valid Unicode"),
        ("tokenizer_config", {"extra_special_tokens": "<x>"}, "extra_special_tokens: not a list of tokens"),
        ("tokenizer_config", {"extra_special_tokens": [3]}, "extra_special_tokens: 3 is not a token"),
        ("tokenizer_config", {"extra_special_tokens": {"a": ["<x>"]}}, "extra_special_tokens: .* is not a token"),
        ("tokenizer_config", {"additional_special_tokens": {"a": 3}}, "additional_special_tokens: not a list"),
        ("tokenizer_config", {"added_tokens_decoder": []}, "added_tokens_decoder: not a JSON object"),
        ("tokenizer_config", {"added_tokens_decoder": {"-1": {"content": "<x>"}}}, "entry '-1' is not a token"),
        ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: {"content": "<x>"}}}, "entry '99.* is not a token"),
        ("tokenizer_config", {"added_tokens_decoder": {"3": "<x>"}}, "entry '3' is not a token"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"3": {"content": 3}}},
            "added_tokens_decoder: .* is not a token",
        ),
        ("special_tokens_map", {"pad_token": 2}, "pad_token: 2 is not a token"),
        ("special_tokens_map", {"additional_special_tokens": "<x>"}, "additional_special_tokens: not a list"),
        ("added_tokens", {"<x>": "270"}, "<x>: '270' is not a token id"),
        ("added_tokens", {"<x>": 1.5}, "<x>: 1.5 is not a token id"),
        ("added_tokens", {"\udc80": 270}, "not valid Unicode"),
    ],
)
def test_what_is_no_token_is_refused_by_name(tmp_path, base, file, content, says):
    with pytest.raises(ConvertError, match=f"{file}.json: field .*{says}") as error:
        read(tmp_path, base, **{file: content})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("base", ["letters", "pieces"])
def test_any_value_in_any_place_is_taken_or_refused_in_one_line(tmp_path, base):
    token = {"content": "<x>", "special": True, "lstrip": True, "rstrip": False, "single_word": True}
    decoder = {"added_tokens_decoder": {"260": token}}
    lists = {"extra_special_tokens": [token], "additional_special_tokens": ["<y>"], "image_token": "<z>"}
    files = {
        "tokenizer_config": LLAMA | lists | {"extra_special_tokens": {"a": "<b>"}, "legacy": True, "pad_token": token},
        "special_tokens_map": lists | {"eos_token": token},
        "added_tokens": {"<x>": 271, "<w>": 272},
    }
    taken = 0
    for name, content in [*files.items(), ("tokenizer_config", LLAMA | decoder)]:
        path = write_folder(tmp_path, base, files)
        for turn, place in enumerate(places(content)):
            for text in in_turn(WRONG.values(), turn):
                rewrite(path / f"{name}.json", with_value(content, place, text))
                try:
                    vocabulary = read_tokenizer(str(path), read_json(str(path), "config.json"), None)
                    Tokenizer(vocabulary.model_entry(300), vocabulary.data, 300).encode("the<x>")
                    taken += 1
                except (ConvertError, TokenizerError) as error:
                    assert len(str(error).splitlines()) == 1 and str(error).isprintable()
    assert taken > either(100, 33)


# --- more tokens than rows


def test_tokens_and_ids_without_a_row_are_left_out_with_a_note(tmp_path):
    folder = hf_folder(tmp_path / "hf", CONFIG | {"pad_token_id": 40})
    extra = ["[PAD2]", {"content": "[PAD3]"}]
    settings = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": extra, "unk_token": "[PAD3]"}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 5, 40, 99]})
    result = convert(folder, tmp_path / "model")
    assert result.notes == [
        "2 of the tokenizer's 42 tokens left out, since the embedding has 40 rows: their text is made of other tokens",
        "left out, since the embedding has 40 rows: pad_id 40, unk_id 40, stop id 99",
    ]
    info = result.model.tokenizer_info
    assert (info["bos_id"], info["eos_id"], info["pad_id"], info["unk_id"]) == (0, 1, None, None)
    assert result.model.stop_ids == [1, 5]
    model = kvrun.load(tmp_path / "model", threads=1)
    plain = tokenizer_json()["model"]["vocab"]
    assert model.tokenize("[PAD2]A") == [plain[c] for c in "AD2A"]  # it has no other letters
    session = model.session()
    for prompt in ("A[PAD2]B", "A[PAD3]", "B"):
        list(session.stream(prompt, max_tokens=2, raw=True))


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_tokens_of_gguf_files_without_a_row(tmp_path, form):
    """The last two tokens of 264 have no row: a word, and a control token."""
    if form == "llama":
        bytes_, words, kind = sorted(BYTE_PIECES), ["\u2581", "t", "h", "th"], 6
    else:
        bytes_, words, kind = sorted(pre_tokenizers.ByteLevel.alphabet()), ["ab", "cd", "ef", "th"], 1
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *words, "<|im_end|>"]
    metadata = {
        "tokenizer.ggml.model": form,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[kind] * 256, 1, 1, 1, 1, 3],
        "tokenizer.ggml.scores": [-float(i) for i in range(264)],
        "tokenizer.ggml.merges": ["a b", "c d", "e f", "t h"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 263,
    }
    save_gguf(tmp_path / "m.gguf", metadata=metadata, vocab=262)
    result = convert(tmp_path / "m.gguf", tmp_path / "model")
    assert result.notes[-1] == "left out, since the embedding has 262 rows: eos_id 263"
    assert result.notes[-2].startswith("2 of the tokenizer's 264 tokens left out, since the embedding has 262 rows:")
    model = kvrun.load(tmp_path / "model", threads=1)
    for text in ("th", "<|im_end|>"):
        ids = model.tokenize(text, add_special=False)
        assert len(ids) > 1 and max(ids) < 262 and model.detokenize(ids).strip() == text
    list(model.session().stream("a<|im_end|>th", max_tokens=2, raw=True))


# --- tokens that end a turn


@pytest.mark.parametrize("text", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
@pytest.mark.parametrize("base", ["letters", "pieces"])
def test_a_known_end_that_is_not_special(tmp_path, base, text):
    vocabulary, tokenizer = read(tmp_path, base, tokenizer_config=ENDS, added_tokens={text: 262})
    token = tokenizer.encode(text, add_special=False)[-1]
    assert token in vocabulary.stops() and vocabulary.special[text] == token
    assert tokenizer.is_special(token) and tokenizer.decode([token], skip_special=True) == ""
    assert token not in tokenizer.encode_escaped(tokenizer.special.escape(f"a{text}"))
    assert any(text in note and "end a turn" in note for note in vocabulary.notes)


@pytest.mark.parametrize("base", ["letters", "pieces"])
def test_a_known_end_keeps_its_other_flags(tmp_path, base):
    number = "262" if base == "letters" else "271"
    end = {"content": "<|im_end|>", "special": False, "single_word": True, "rstrip": True}
    settings = LLAMA | {"added_tokens_decoder": {number: end}}
    vocabulary, tokenizer = read(tmp_path, base, tokenizer_config=settings)
    assert tokenizer.encode("<|im_end|>  ,", add_special=False)[0] == int(number) in vocabulary.stops()
    assert int(number) not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode(tokenizer.encode("<|im_end|> \n,", add_special=False)).replace(" ", "") == "<|im_end|>,"


def test_a_known_end_that_is_only_in_the_vocabulary(tmp_path):
    path = write_folder(tmp_path, "letters", {"tokenizer_config": ENDS})
    spec = letters()
    spec["model"]["vocab"]["<|im_end|>"] = spec["model"]["vocab"].pop("the")
    spec["model"]["merges"].pop()
    write_json(path / "tokenizer.json", spec)
    vocabulary = read_tokenizer(str(path), read_json(str(path), "config.json"), None)
    tokenizer = Tokenizer(vocabulary.model_entry(300), vocabulary.data, 300, vocabulary.stops())
    assert tokenizer.encode("a<|im_end|>") == [64, 257] and set(vocabulary.stops()) == {257, 259}
    assert "<|im_end|>" in vocabulary.notes[0]


def test_notes_and_stops_reach_the_checkpoint(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 40, "content": "<|eom_id|>", "special": False})
    write_json(folder / "tokenizer.json", spec)
    checkpoint = open_checkpoint(str(folder))
    assert 40 in checkpoint.stop_ids and any("<|eom_id|>" in note for note in checkpoint.notes)
    assert str(folder / "added_tokens.json") in checkpoint.files


@pytest.mark.parametrize("text", ["<|user|>", "<start_of_turn>", "[INST]"])
@pytest.mark.parametrize("base", ["letters", "pieces"])
def test_a_known_beginning_of_a_turn_is_not_typed(tmp_path, base, text):
    """added_tokens.json cannot say whether it is special; added_tokens_decoder can."""
    number = 262 if base == "letters" else 271
    added = {text: number, "<word>": number + 1}
    vocabulary, tokenizer = read(tmp_path / "json", base, tokenizer_config=ENDS, added_tokens=added)
    assert vocabulary.special[text] == number
    assert tokenizer.encode(f"a{text}b", add_special=False).count(number) == 1
    for typed in (
        tokenizer.encode_escaped(tokenizer.special.escape(f"a{text}b<word>")),
        tokenizer.encode(f"a{text}b<word>", parse_special=False),
    ):
        assert number not in typed and number + 1 in typed
    assert vocabulary.notes == (f"special although the checkpoint does not say so, since they begin a turn: {text}",)
    decoder = {"added_tokens_decoder": {str(number): {"content": text, "special": False}}}
    vocabulary, tokenizer = read(tmp_path / "decoder", base, tokenizer_config=ENDS | decoder)
    assert text not in vocabulary.special and not vocabulary.notes
