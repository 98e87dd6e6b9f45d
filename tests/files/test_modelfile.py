"""The model file: what is written is read back, and nothing damaged, foreign or hostile is believed."""

import errno
import json
import os
import re
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrun import _core
from kvrun.errors import ModelFileError, TokenizerError
from kvrun.files import model_writer
from kvrun.files.model_file import read_model_file
from support.files import rewrite
from support.model_files import DESCRIPTION, INFO, TOKENIZER, join, open_writer, split, types, values, write_all


@pytest.fixture
def path(tmp_path):
    with open_writer(tmp_path / "model.bin") as writer:
        write_all(writer)
        writer.finish()
    return tmp_path / "model.bin"


def test_round_trip(path):
    model = read_model_file(path, verify=True)
    assert model.description == DESCRIPTION and model.path == str(path)
    assert list(model.weights | model.vectors) == list(DESCRIPTION.tensor_shapes())
    for name, a in values().items():
        if a.ndim == 1:
            assert np.array_equal(model.vectors[name], a)
            continue
        weight = model.weights[name]
        assert (weight.type, weight.rows, weight.cols) == (types()[name], *a.shape)
        assert weight.data.tobytes() == _core.pack(weight.type, a).tobytes()
        assert weight.data.ctypes.data % 64 == 0 and not weight.data.flags.writeable
    assert bytes(model.tokenizer_bytes()) == TOKENIZER and model.tokenizer_info == INFO
    assert (model.stop_ids, model.chat_template, model.sampling) == (
        [2, 5],
        "{{ 'ä' }}\n",
        {"temperature": 0.6},
    )
    assert model.nbytes == path.stat().st_size and sum(model.tensor_nbytes.values()) < model.nbytes
    assert re.fullmatch("[0-9a-f]{64}", model.fingerprint)


def test_the_safetensors_library_lists_it_too(path):
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        assert set(file.keys()) == {*DESCRIPTION.tensor_shapes(), "tokenizer.json"}
        assert file.metadata()["format"] == "kvrun"
        assert file.get_tensor("tokenizer.json").tobytes() == TOKENIZER
        assert np.array_equal(file.get_tensor("norm.weight"), values()["norm.weight"])


def test_arrays_outlive_the_model_object(path):
    data = read_model_file(path).weights["embed.weight"].data
    assert data.tobytes() == _core.pack(types()["embed.weight"], values()["embed.weight"]).tobytes()


def test_the_same_input_gives_the_same_bytes(path, tmp_path):
    with open_writer(tmp_path / "again.bin") as writer:
        for name, a in reversed(values().items()):
            packed = _core.pack(types()[name], a) if a.ndim == 2 else a
            writer.write(name, [memoryview(packed).cast("B")[:40], memoryview(packed).cast("B")[40:]])
        writer.finish()
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


def test_without_a_tokenizer(tmp_path):
    with open_writer(tmp_path / "m.bin", tokenizer=None, tokenizer_info={**INFO, "kind": "none"}) as writer:
        write_all(writer)
        model = writer.finish()
    with pytest.raises(TokenizerError, match="without a tokenizer"):
        model.tokenizer_bytes()


# --- damage


def test_every_truncation_is_refused(path):
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    for size in [0, 1, 7, 8, 9, 10, 100, length - 1, length, length + 1, len(content) - 1]:
        rewrite(path, content[:size])
        with pytest.raises(ModelFileError, match="truncated|not a kvrun model file"):
            read_model_file(path)
    path.write_bytes(content + b"x")
    with pytest.raises(ModelFileError, match="1 bytes too many"):
        read_model_file(path)


def test_a_flipped_byte_in_every_tensor_is_found(path):
    content = bytearray(path.read_bytes())
    header, _ = split(path)
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        for offset in (entry["data_offsets"][0], entry["data_offsets"][1] - 1):
            content[start + offset] ^= 4
            rewrite(path, content)
            model = read_model_file(path)
            with pytest.raises(ModelFileError, match=f"tensor {re.escape(name)} is damaged"):
                model.verify()
            with pytest.raises(ModelFileError, match="is damaged"):
                read_model_file(path, verify=True)
            content[start + offset] ^= 4


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_to_the_header_is_refused_or_harmless(path, data):
    original = path.read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    other = path.with_name("damaged.bin")
    other.write_bytes(content)
    try:
        model = read_model_file(other)
    except ModelFileError as error:
        assert str(error).startswith(str(other))
        return
    # Only white space between the JSON values has no checksum.
    assert model.description == DESCRIPTION and model.chat_template == "{{ 'ä' }}\n"
    model.verify()


def meta_changes():
    """(field, new value, what the message says)."""
    model = json.loads(DESCRIPTION.to_json())
    yield from [
        ("version", "2", "newer"),
        ("version", "0", "never"),
        ("version", "x", "version"),
        ("version", None, "version"),
        ("version", "9" * 5000, "version"),
        ("format", "other", "not a kvrun model"),
        ("weights", "{}", "weights"),
        ("weights", "[", "not valid JSON"),
        ("weights", "[" * 100000, "weights"),
        ("weights", "[]", "weights"),
        ("stop_ids", "[20]", "stop_ids"),
        ("stop_ids", "[true]", "stop_ids"),
        ("stop_ids", "{}", "stop_ids"),
        ("stop_ids", "[-1]", "stop_ids"),
        ("sampling", '{"heat": 1}', "sampling"),
        ("source", "1", "source"),
        ("sampling", '{"top_k": "x"}', "sampling"),
        ("sampling", '{"top_k": NaN}', "sampling"),
        ("sampling", '{"top_k": -1}', "sampling"),
        ("sampling", '{"top_k": 1.5}', "sampling: top_k = 1.5 is not a whole number"),
        ("tokenizer", '{"kind": "x"}', "kind"),
        ("tokenizer", json.dumps({**INFO, "bos_id": 20}), "bos_id"),
        ("checksums", "{}", "checksums"),
        ("tokenizer", json.dumps({**INFO, "kind": "tokenizer.model"}), "tokenizer"),
        ("extra", "x", "unknown"),
        ("tokenizer", json.dumps({**INFO, "kind": []}), "kind"),
        ("model", "{}", "missing"),
        ("model", "7", "object"),
    ]
    for name, value in [
        ("n_layers", 10**9),
        ("n_layers", 3),
        ("n_layers", 0),
        ("n_layers", True),
        ("n_layers", 2.0),
        ("n_heads", 3),
        ("vocab_size", 2**62),
        ("head_dim", 15),
        ("hidden_size", "32"),
        ("architecture", "other"),
        ("norm_eps", 0),
        ("activation", "relu"),
        ("rope_theta", -1.0),
        ("rope_theta", 10**400),
        ("name", 7),
        ("novelty", 1),
        ("rope_scaling", {"type": "yarn"}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", 3),
        ("rope_scaling", {"type": "linear", "factor": "2"}),
        ("rope_scaling", {"type": []}),
        ("rope_scaling", {"type": "factors", "factors": [1.0]}),
        ("tie_embeddings", 1),
        ("attention_scale", None),
    ]:
        agrees_with_itself = {("n_layers", 3): "tensor layers.2.attn.q.weight is missing", ("n_heads", 3): "weights"}
        says = agrees_with_itself.get((name, value), name) if isinstance(value, int) else name
        yield "model", json.dumps({**model, name: value}), says


@pytest.mark.parametrize("field, value, says", list(meta_changes()))
def test_metadata_is_not_believed(path, field, value, says):
    header, data = split(path)
    header["__metadata__"][field] = value
    if value is None:
        del header["__metadata__"][field]
    join(path, header, data)
    with pytest.raises(ModelFileError, match=says):
        read_model_file(path)


def test_a_type_that_the_shape_does_not_allow(path):
    header, data = split(path)
    weights = json.loads(header["__metadata__"]["weights"])
    name = next(iter(weights))
    weights[name]["type"] = "q4_k"
    header["__metadata__"]["weights"] = json.dumps(weights)
    join(path, header, data)
    with pytest.raises(ModelFileError, match=f"weights: {name} has .* columns, which is impossible for q4_k"):
        read_model_file(path)


def entry_changes():
    yield from [
        ("dtype", "F32"),
        ("dtype", None),
        ("dtype", []),
        ("shape", [1]),
        ("shape", []),
        ("shape", None),
        ("shape", [True]),
        ("shape", [-1]),
        ("shape", [2**70]),
        ("data_offsets", [0]),
        ("data_offsets", None),
        ("data_offsets", [0, 2**70]),
        ("data_offsets", [-64, 64]),
        ("data_offsets", [64, 0]),
        ("data_offsets", [0, 0]),
        ("data_offsets", [0.0, 64.0]),
        ("data_offsets", [False, 64]),
        ("data_offsets", [64, 128]),
        ("extra", 1),
    ]


@pytest.mark.parametrize("field, value", list(entry_changes()))
@pytest.mark.parametrize("name", ["embed.weight", "layers.1.attn.q.weight", "norm.weight", "tokenizer.json"])
def test_tensor_entries_are_not_believed(path, name, field, value):
    header, data = split(path)
    if (name, field, value) == ("norm.weight", "dtype", "F32"):
        value = "U8"
    header[name][field] = value
    join(path, header, data)
    with pytest.raises(ModelFileError, match=re.escape(name)):
        read_model_file(path)


def test_missing_and_foreign_tensors(path):
    header, data = split(path)
    for name in ("layers.1.mlp.up.weight", "norm.weight", "tokenizer.json"):
        join(path, {key: entry for key, entry in header.items() if key != name}, data)
        with pytest.raises(ModelFileError, match=f"tensor {name} is missing"):
            read_model_file(path)
    join(path, {**header, "spare": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, data)
    with pytest.raises(ModelFileError, match="'spare' is at the end"):
        read_model_file(path)


@pytest.mark.parametrize("value", [7, None, [], {}, True])
def test_metadata_values_that_are_no_strings(path, value):
    header, data = split(path)
    for field in header["__metadata__"]:
        changed = {**header, "__metadata__": {**header["__metadata__"], field: value}}
        join(path, changed, data, sign=False)
        with pytest.raises(ModelFileError):
            read_model_file(path)
    join(path, {**header, "__metadata__": value}, data)
    with pytest.raises(ModelFileError):
        read_model_file(path)


def test_repeated_keys(path):
    header, data = split(path)
    text = json.dumps(header).encode()[:-1] + b', "norm.weight": ' + json.dumps(header["norm.weight"]).encode() + b"}"
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(ModelFileError, match="twice"):
        read_model_file(path)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not a kvrun"),
        (b"\0" * 8, "not a kvrun"),
        (b"\0" * 100, "not a kvrun"),
        (b"GGUF\3\0\0\0" + b"\0" * 99, "GGUF"),
        (b"#!/bin/sh\necho hello world\n" * 9, "not a kvrun"),
        (b"\xff" * 100, "not a kvrun"),
        (b"PK\3\4" + b"\0" * 99, "not a"),
        (struct.pack("<Q", 56) + b"{" * 56, "damaged"),
        (struct.pack("<Q", 56) + b"{" + b"\xff" * 55, "damaged"),
        (struct.pack("<Q", 56) + b'{"a": 1}' + b" " * 48, "kvrun convert"),
        (struct.pack("<Q", 56) + b'{"__metadata__": {"format": "pt"}}' + b" " * 22, "kvrun convert"),
        (struct.pack("<Q", 99_999_999) + b"{}" * 30, "truncated"),
        (struct.pack("<Q", 1 << 62) + b"{}" * 30, "not a kvrun"),
        (struct.pack("<Q", 200056) + b'{"a":' * 40000 + b" " * 56, "damaged"),
    ],
)
def test_foreign_files(tmp_path, content, says):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ModelFileError, match=says):
        read_model_file(tmp_path / "x.bin")


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in [
        (tmp_path, "folder"),
        (tmp_path / "none", "No such file"),
        ("/dev/null", "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        ("a\0b", "cannot read"),
    ]:
        with pytest.raises(ModelFileError, match=says):
            read_model_file(path)


# --- writing


def leftovers(folder):
    return sorted(os.listdir(folder))


def test_nothing_is_left_of_an_interrupted_write(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"older")
    for fault in (KeyboardInterrupt, ValueError, SystemExit):
        with pytest.raises(fault), open_writer(tmp_path / "model.bin") as writer:
            writer.write("embed.weight", [_core.pack("f32", values()["embed.weight"])])
            assert leftovers(tmp_path) == ["model.bin"]
            raise fault
        assert leftovers(tmp_path) == ["model.bin"] and (tmp_path / "model.bin").read_bytes() == b"older"


def test_misuse_of_the_writer(tmp_path):
    with open_writer(tmp_path / "model.bin") as writer:
        with pytest.raises(ValueError, match="not written"):
            writer.finish()
        with pytest.raises(ValueError, match="bytes"):
            writer.write("norm.weight", [np.zeros(31, np.float32)])
        with pytest.raises(ValueError, match="bytes"):
            writer.write("norm.weight", [np.zeros(33, np.float32)])
        writer.write("norm.weight", [np.zeros(32, np.float32)])
        with pytest.raises(ValueError, match="twice"):
            writer.write("norm.weight", [np.zeros(32, np.float32)])
    assert leftovers(tmp_path) == []


def test_damage_while_writing_is_noticed(tmp_path, monkeypatch):
    def damage(fd):
        last = os.fstat(fd).st_size - 1
        os.pwrite(fd, bytes([os.pread(fd, 1, last)[0] ^ 1]), last)

    monkeypatch.setattr(model_writer.os, "fsync", damage)
    with open_writer(tmp_path / "model.bin") as writer, pytest.raises(ModelFileError, match="tensor .* is damaged"):
        write_all(writer)
        writer.finish()
    assert leftovers(tmp_path) == []


def test_a_full_disk(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(ModelFileError, match="No space left on device"):
        open_writer(tmp_path / "model.bin")
    monkeypatch.undo()

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model_writer.os, "fsync", full)
    with pytest.raises(ModelFileError, match="No space left on device"), open_writer(tmp_path / "model.bin") as writer:
        write_all(writer)
        writer.finish()
    assert leftovers(tmp_path) == []


def test_outputs_that_cannot_be_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in [
        (tmp_path, "folder"),
        (tmp_path / "none" / "m.bin", "no folder"),
        ("/dev/null", "regular"),
        (tmp_path / "pipe", "regular"),
        (f"{tmp_path}/x/", "folder"),
        ("a\0b", "cannot write"),
    ]:
        with pytest.raises(ModelFileError, match=says):
            open_writer(path)
    assert leftovers(tmp_path) == ["pipe"]


def test_a_link_keeps_pointing_to_the_model(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "model.bin").symlink_to(tmp_path / "store" / "real.bin")
    with open_writer(tmp_path / "model.bin") as writer:
        write_all(writer)
        writer.finish()
    assert (tmp_path / "model.bin").is_symlink() and (tmp_path / "store" / "real.bin").is_file()


def test_permissions_are_those_of_any_new_file(path):
    path.with_name("plain").touch()
    assert path.stat().st_mode == path.with_name("plain").stat().st_mode


def test_text_that_is_not_unicode_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="not valid text"):
        open_writer(tmp_path / "model.bin", chat_template="\ud800")
    assert leftovers(tmp_path) == []
