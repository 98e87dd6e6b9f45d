"""Every field of a model file's header with every kind of wrong value: refused by name, or harmless."""

import itertools
import json
import random

import pytest

from kvrun.errors import ModelFileError
from kvrun.files.description import ModelDescription
from kvrun.files.model_file import read_model_file
from support.files import rewrite
from support.model_files import DESCRIPTION, join, open_writer, split, write_all
from support.wrong_values import WRONG, places_for, with_value

FULL = {
    **json.loads(DESCRIPTION.to_json()),
    "head_dim": 16,
    "sliding_windows": [5, None],
    "rope_layers": [True, False],
    "rope_scaling": {
        "type": "longrope",
        "short_factors": [1.0] * 8,
        "long_factors": [2.0] * 8,
        "original_context_length": 64.0,
        "attention_factor": 1.0,
    },
    "rope_local": {
        "theta": 100.0,
        "scaling": {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_context_length": 64.0,
        },
    },
    "n_experts": 4,
    "experts_used": 2,
    "expert_size": 8,
    "expert_layers": [True, False],
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
}
"""A description in which every field that can have parts has them."""

OTHER_SCALINGS = [
    {"type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0, "original_context_length": 64.0},
    {"type": "yarn", "factor": 2.0, "low": 1.0, "high": 3.0, "attention_factor": 1.0},
    {"type": "factors", "factors": [1.0] * 8},
]


CONTRADICTED = {
    "n_layers": ("sliding_windows", "rope_layers", "expert_layers"),
    "n_experts": ("experts_used",),
    "head_dim": ("rope_scaling",),
}
"""Of fields whose number others go by: what is named instead where those no longer fit."""


def read_description(text, named=""):
    """The description, or None if it is refused, in one line that names the field."""
    try:
        return ModelDescription.from_json(text)
    except ModelFileError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 300, message
        said = (named, "not valid JSON", *CONTRADICTED.get(named, ()))
        assert any(words in message for words in said), message
        return None


@pytest.mark.parametrize("wrong", WRONG)
def test_every_field_of_the_description(wrong):
    descriptions = [FULL, *({**FULL, "rope_scaling": scaling} for scaling in OTHER_SCALINGS)]
    assert all(read_description(json.dumps(description)) for description in descriptions)
    for description in descriptions:
        for place in places_for(wrong, description):
            text = with_value(description, place, WRONG[wrong])
            found = read_description(text, place[0])
            if found is not None:  # a value that the field can have
                assert ModelDescription.from_json(found.to_json()) == found
                for ctx in (1, 1 << 30):
                    assert (abs(found.rope_tables(ctx).inv_freq) < 1e7).all()


@pytest.mark.thorough
def test_pairs_of_fields(seed):
    rng = random.Random(seed)
    pairs = list(itertools.combinations(FULL, 2))
    for one, other in pairs:
        for _ in range(40):
            text = with_value(FULL, (one,), rng.choice(list(WRONG.values())))
            try:
                text = with_value(json.loads(text), (other,), rng.choice(list(WRONG.values())))
            except (ValueError, RecursionError):
                continue
            read_description(text)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    info = {
        "kind": "tokenizer.model",
        "add_bos": True,
        "add_eos": False,
        "legacy": True,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": None,
        "unk_id": 0,
        "added_tokens": {"<a>": 19},
        "visible": [19],
        "lstrip": [19],
        "rstrip": [19],
        "single_word": [19],
        "space_is_dummy": True,
    }
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.1}
    path = tmp_path_factory.mktemp("fields") / "model.bin"
    with open_writer(path, tokenizer_info=info, sampling=sampling) as writer:
        write_all(writer)
        writer.finish()
    return path


def read(path, where):
    """Read a file, which may be refused in one line that names the field."""
    try:
        model = read_model_file(path)
    except ModelFileError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 400 and str(path) in message, message
        assert where in message or "damaged header" in message or "JSON" in message, (where, message)
        return None
    model.verify()
    return model


@pytest.mark.parametrize("wrong", WRONG)
def test_every_field_of_the_metadata(written, wrong):
    """Within the values that are JSON themselves: tokenizer, weights, checksums, defaults, stop ids, source."""
    header, data = split(written)
    path = written.with_name("changed.bin")
    for field in ("tokenizer", "weights", "checksums", "sampling", "stop_ids", "source"):
        value = json.loads(header["__metadata__"][field])
        all_places = [
            place for place in places_for(wrong, value) if field not in ("weights", "checksums") or "1" not in place[0]
        ]
        changed = [with_value(value, place, WRONG[wrong]) for place in all_places]
        for text in [WRONG[wrong], *changed]:
            join(path, {**header, "__metadata__": {**header["__metadata__"], field: text}}, data)
            model = read(path, field)
            assert model is None or field not in ("weights", "checksums")


@pytest.mark.parametrize("wrong", WRONG)
def test_every_entry_of_the_header(written, wrong):
    header, data = split(written)
    path = written.with_name("changed.bin")
    names = ["__metadata__", "embed.weight", "layers.1.attn.k.bias", "tokenizer.model"]
    for name in names:
        for place in [(name,), *((name, *rest) for rest in places_for(wrong, header[name]))]:
            text = with_value(header, place, WRONG[wrong]).encode()
            text += b" " * (-(8 + len(text)) % 64)
            rewrite(path, len(text).to_bytes(8, "little") + text + data)
            where = "" if name == "__metadata__" else name
            assert read(path, where) is None or json.loads(text) == header


@pytest.mark.parametrize("field", ["tokenizer", "source", "sampling", "weights", "checksums", "stop_ids", "model"])
def test_fields_that_do_not_belong_there(written, field):
    header, data = split(written)
    path = written.with_name("changed.bin")
    value = json.loads(header["__metadata__"][field])
    value = [*value, "novelty"] if isinstance(value, list) else {**value, "novelty": 1}
    join(path, {**header, "__metadata__": {**header["__metadata__"], field: json.dumps(value)}}, data)
    assert (read(path, field if field != "model" else "novelty") is None) == (field != "source")


@pytest.mark.parametrize("text", ["\ud800", "x\udfff", "\ud800\ud800"])
def test_text_that_is_no_text(written, text):
    """Halves of surrogate pairs, which JSON can write and UTF-8 cannot."""
    header, data = split(written)
    path = written.with_name("changed.bin")
    for field, value in [
        ("chat_template", text),
        ("model", json.dumps({**json.loads(header["__metadata__"]["model"]), "name": text})),
        ("source", json.dumps({"form": text})),
        ("tokenizer", json.dumps({**json.loads(header["__metadata__"]["tokenizer"]), "added_tokens": {text: 19}})),
    ]:
        join(path, {**header, "__metadata__": {**header["__metadata__"], field: value}}, data)
        with pytest.raises(ModelFileError, match=f"(?s)({field}|description).*not valid text"):
            read_model_file(path)
