"""Token ids as checkpoints write them, and the tokens that end a turn by their text."""

import pytest

from kvrun.convert.checkpoint import Vocabulary
from kvrun.convert.fields import Fields
from kvrun.convert.source import open_checkpoint
from kvrun.convert.token_ids import ENDS, ends_of_turn, note_of_ends, token_id, token_ids, undeclared_ends
from kvrun.errors import ConvertError
from support.make_checkpoint import CONFIG, hf_folder, write_json

ABSENT = [None, -1, -100, 2**32 - 1, 2**64 - 1]


def fields(value):
    return Fields({"x_token_id": value}, "config.json")


@pytest.mark.parametrize("value", ABSENT)
def test_an_id_that_says_there_is_none(value):
    assert token_id(fields(value), "x_token_id") is None
    assert token_ids(fields(value), "x_token_id") == []
    assert token_ids(fields([3, value, 4]), "x_token_id") == [3, 4]


def test_ids_that_are_there():
    assert token_id(fields(0), "x_token_id") == 0 and token_ids(fields(7), "x_token_id") == [7]
    assert token_id(Fields({}, "config.json"), "x_token_id") is None
    assert token_ids(fields([]), "x_token_id") == []


@pytest.mark.parametrize("value", ["2", 1.5, True, {}, [[3]], "x"])
def test_what_is_no_id_is_refused_by_name(value):
    with pytest.raises(ConvertError, match="^config.json: field x_token_id: .* is not a token id$"):
        token_ids(fields(value), "x_token_id")


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_absent_ids_in_a_folder(tmp_path, file, absent):
    ids = {f"{name}_token_id": absent for name in ("bos", "pad", "unk")} | {"eos_token_id": [absent, 9]}
    folder = hf_folder(tmp_path / "hf")
    write_json(folder / "tokenizer_config.json", {})
    config = {key: value for key, value in CONFIG.items() if not key.endswith("_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / file, (config if file == "config.json" else {}) | ids)
    checkpoint = open_checkpoint(str(folder))
    info = checkpoint.vocabulary.info
    assert (info["bos_id"], info["eos_id"], info["pad_id"], info["unk_id"]) == (None, 9, None, None)
    assert set(checkpoint.stop_ids) == {1, 9}  # 1 is </s>


# --- tokens that end a turn


@pytest.mark.parametrize("text", ENDS)
def test_a_known_end_of_a_turn_is_one_whatever_its_type(text):
    vocabulary = {"a": 0, text: 1, "<s>": 2}
    assert undeclared_ends(vocabulary, {"<s>"}) == [text]
    assert undeclared_ends(vocabulary, {"<s>", text}) == []
    assert ends_of_turn({"<s>": 2, text: 1}) == [1]
    assert text in note_of_ends([text])


def test_a_tag_of_html_is_text_beside_another_end():
    assert undeclared_ends({"</s>", "<eos>", "<s>"}, {"<eos>"}) == []
    assert undeclared_ends({"</s>", "<|im_end|>"}, set()) == ["<|im_end|>"]
    assert ends_of_turn({"</s>": 1, "<eos>": 2}) == [2, 1]  # declared special, it is an end
    assert ends_of_turn({"</s>": 1, "<|tool_response>": 2}) == [2]


@pytest.mark.parametrize("others", [("<|return|>", "<|call|>"), ("<|flush|>", "<|calls|>")])
def test_the_end_of_one_of_several_messages_is_not_the_end_of_a_turn(others):
    special = {text: i for i, text in enumerate((*others, "<|end|>"))}
    assert sorted(ends_of_turn(special)) == [0, 1]
    assert undeclared_ends({*others, "<|end|>"}, set(others)) == []
    assert ends_of_turn({"<|end|>": 7, others[0]: 8}) == [7, 8]


def test_other_ends_count_if_the_checkpoint_calls_them_special():
    assert ends_of_turn({"<|end_of_turn|>": 3}) == [3] and undeclared_ends({"<|end_of_turn|>"}, set()) == []
    assert Vocabulary("tokenizer.json", b"", {}, {"<|end_of_turn|>": 3, "<|im_start|>": 4}).stops() == [3]
