"""Session files on the disk: any value in any field, other lengths, permissions, and several that write one."""

import contextlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import kvrun
from kvrun.errors import ModelFileError
from kvrun.files.model_file import header_checksum
from kvrun.files.model_writer import header_bytes
from support.files import rewrite
from support.sessions import GO_ON, talked, text
from support.wrong_values import WRONG, places_for, with_value


@pytest.fixture(scope="module")
def model(converted):
    return kvrun.load(converted("grouped-tied"))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """(header, data) of a session that has everything a file can have."""
    session = talked(model, ctx=300)
    text(session.stream("More", max_tokens=3, ignore_eos=True))
    path = tmp_path_factory.mktemp("saved") / "s.kv"
    session.save(path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def restored(model, path, where):
    """The session, or None if it is refused, in one line that says where."""
    try:
        return model.restore(path)
    except ModelFileError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 400 and message.startswith(str(path)), message
        assert any(words in message for words in (where, "not a kvrun session file")), (where, message)
        return None


@pytest.mark.parametrize("wrong", WRONG)
def test_every_field(model, saved, tmp_path, wrong):
    header, data = saved
    path = tmp_path / "s.kv"
    for field in ("cache", "conversation", "history", "checksums"):
        value = json.loads(header["__metadata__"][field])
        for place in [None, *places_for(wrong, value)]:
            changed = WRONG[wrong] if place is None else with_value(value, place, WRONG[wrong])
            meta = {**header["__metadata__"], field: changed}
            meta["header_checksum"] = header_checksum(meta)
            rewrite(path, header_bytes("", {**header, "__metadata__": meta}) + data)
            session = restored(model, path, "session")
            if session is not None:  # a value that the field can have
                text(session.stream([5], max_tokens=2, ignore_eos=True))
                assert np.isfinite(session.evaluate()).all()


@pytest.mark.parametrize("wrong", WRONG)
def test_every_entry_of_the_header(model, saved, tmp_path, wrong):
    header, data = saved
    path = tmp_path / "s.kv"
    for place in places_for(wrong, header):
        content = with_value(header, place, WRONG[wrong]).encode()
        content += b" " * (-(8 + len(content)) % 64)
        rewrite(path, len(content).to_bytes(8, "little") + content + data)
        assert restored(model, path, "session") is None


@pytest.mark.parametrize("field", ["cache", "conversation", "history", "checksums"])
def test_fields_of_another_version(model, saved, tmp_path, field):
    header, data = saved
    value = json.loads(header["__metadata__"][field])
    for changed in ({**value, "novelty": 1}, {name: value[name] for name in list(value)[1:]}):
        meta = {**header["__metadata__"], field: json.dumps(changed)}
        meta["header_checksum"] = header_checksum(meta)
        rewrite(tmp_path / "s.kv", header_bytes("", {**header, "__metadata__": meta}) + data)
        assert restored(model, tmp_path / "s.kv", f"metadata field {field} does not have the entries") is None


def with_history(header, data, **changes):
    """The file with other entries in its history; without one if there are none."""
    meta = dict(header["__metadata__"])
    history = json.loads(meta.pop("history"))
    meta["version"] = "1"
    if changes:
        meta.update(history=json.dumps({**history, **changes}), version="2")
    meta["header_checksum"] = header_checksum(meta)
    return header_bytes("", {**header, "__metadata__": meta}) + data


def test_how_a_text_came_about(model, saved, tmp_path):
    """Written tokens and ends of answers lie within the text, one after the other."""
    header, data = saved
    (n,) = header["tokens"]["shape"]
    chars = len(json.loads(header["__metadata__"]["conversation"])["text"])
    path = tmp_path / "s.kv"
    for changes in (
        {"written": []},
        {"written": [[0, n]]},
        {"written": [[0, 1], [2, 3], [n - 1, n]]},
        {"answers": []},
        {"answers": [[0, 0], [1, 0], [n, chars]]},
        {"answers": [[1, 4]], "story": "long"},
        {"answers": [], "story": ""},
    ):
        rewrite(path, with_history(header, data, **changes))
        session = model.restore(path)
        text(session.stream([5], max_tokens=2, ignore_eos=True))
        assert np.isfinite(session.evaluate()).all()
    for changes, where in (
        ({"written": [[0, n + 1]]}, "written is not runs"),
        ({"written": [[n, n + 1]]}, "written is not runs"),
        ({"written": [[3, 3]]}, "written is not runs"),
        ({"written": [[4, 3]]}, "written is not runs"),
        ({"written": [[0, 2], [2, 3]]}, "written is not runs"),
        ({"written": [[5, 6], [1, 2]]}, "written is not runs"),
        ({"written": [[-1, 2]]}, "written is not a list of pairs"),
        ({"written": [[0, True]]}, "written is not a list of pairs"),
        ({"written": [[0, 1, 2]]}, "written is not a list of pairs"),
        ({"written": [0, 1]}, "written is not a list of pairs"),
        ({"answers": [[n + 1, 1]]}, "answers are not places"),
        ({"answers": [[1, chars + 1]]}, "answers are not places"),
        ({"answers": [[1, 1]], "story": ""}, "answers are not places"),
        ({"answers": [[2, 3], [2, 4]]}, "answers are not places"),
        ({"answers": [[2, 4], [3, 3]]}, "answers are not places"),
        ({"answers": [[1, 0.5]]}, "answers is not a list of pairs"),
        ({"answers": None}, "answers is not a list of pairs"),
        ({"story": 3}, "story is not a text"),
    ):
        rewrite(path, with_history(header, data, **changes))
        assert restored(model, path, f"damaged session file: metadata field history: {where}") is None, changes


def test_a_file_without_history(model, saved, tmp_path):
    """As they were in the format's first version, which is also written where there is nothing to say."""
    path = tmp_path / "s.kv"
    rewrite(path, with_history(*saved))
    session = model.restore(path)
    assert session.n_tokens == saved[0]["tokens"]["shape"][0] and len(session.messages) == 6
    for prompt in ("Hello there", [5, 6, 7]):
        read = model.session()
        text(read.stream(prompt, max_tokens=0))
        for _ in range(2):
            read.save(path)
            assert version(path) == "1"
            read = model.restore(path)
    text(read.stream([5], max_tokens=1, ignore_eos=True))
    read.save(path)
    assert version(path) == "2"


def test_history_of_tokens_that_are_not_there(model, saved, tmp_path):
    header, _ = saved
    outgrown = model.session(ctx=132)
    text(outgrown.stream([5] * 300, max_tokens=1, ignore_eos=True))
    outgrown.save(tmp_path / "s.kv")
    assert version(tmp_path / "s.kv") == "1"
    content = (tmp_path / "s.kv").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"]["history"] = json.dumps({"written": [], "story": None, "answers": []})
    rewrite(tmp_path / "s.kv", with_history(header, content[start:], written=[[0, 1]]))
    assert restored(model, tmp_path / "s.kv", "history: the file does not have the tokens") is None


def version(path):
    with safe_open(path, "numpy") as file:
        return file.metadata()["version"]


def test_other_lengths(model, saved, tmp_path):
    header, data = saved
    content = header_bytes("", header) + data
    path = tmp_path / "s.kv"
    for changed, says in [
        (content[:-1], "truncated"),
        (content[: len(content) // 2], "truncated"),
        (content[:100], "truncated"),
        (content[:7], "not a kvrun session file"),
        (b"", "not a kvrun session file"),
        (content + b"\0", "bytes of data belong to it"),
        (content * 2, "bytes of data belong to it"),
    ]:
        rewrite(path, changed)
        with pytest.raises(ModelFileError, match=says):
            model.restore(path)


# --- on the disk ----------------------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_what_was_said_is_its_owners_alone(model, tmp_path):
    session = talked(model)
    before = os.umask(0o000)
    try:
        session.save(tmp_path / "s.kv")
        assert mode(tmp_path / "s.kv") == 0o600
        os.chmod(tmp_path / "s.kv", 0o644)  # whoever wants to share it
        session.save(tmp_path / "s.kv")
        assert mode(tmp_path / "s.kv") == 0o644
    finally:
        os.umask(before)


def test_a_link_to_a_session(model, tmp_path):
    (tmp_path / "link.kv").symlink_to("s.kv")
    with pytest.raises(ModelFileError, match=r"cannot read: a link to s\.kv, which is not there"):
        model.restore(tmp_path / "link.kv")
    talked(model).save(tmp_path / "link.kv")
    assert (tmp_path / "link.kv").is_symlink() and mode(tmp_path / "s.kv") == 0o600
    assert model.restore(tmp_path / "link.kv").n_tokens == model.restore(tmp_path / "s.kv").n_tokens


def as_nobody(function):
    """Exit status of a forked process that calls it without root's rights to read everything."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            with contextlib.suppress(PermissionError):  # not root, or without root's rights as it is
                os.setgid(65534)
                os.setuid(65534)
            status = function()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def open_folder():
    """A folder that every user can reach, and write to."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def test_a_session_that_may_not_be_read(model, open_folder):
    """Neither restored nor replaced."""
    session = model.session()
    path = open_folder / "s.kv"
    session.save(path)
    path.chmod(0o000)

    def refused():
        said = []
        for use in (model.restore, session.save):
            try:
                use(path)
            except ModelFileError as error:
                said.append(str(error))
        return (
            0
            if said == [f"{path}: cannot read: Permission denied", f"{path}: cannot write: it is write-protected"]
            else 1
        )

    assert as_nobody(refused) == 0
    path.chmod(0o600)
    assert model.restore(path).n_tokens == 0


def test_processes_that_save_to_one_file(model, tmp_path):
    """Each restores and saves many times; what is there is always a whole session of one of them."""
    path = tmp_path / "s.kv"
    model.session().save(path)
    code = """
import sys, kvrun
model = kvrun.load(sys.argv[1], threads=1)
for _ in range(15):
    session = model.restore(sys.argv[2])
    list(session.stream([7], max_tokens=1, ignore_eos=True))
    session.save(sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(model.file.path), str(path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(300) for process in processes] == [0] * 3
    assert 2 <= model.restore(path).n_tokens <= 45 * 2 and os.listdir(tmp_path) == ["s.kv"]


def test_a_session_goes_on_after_a_save_that_failed(model, tmp_path, monkeypatch):
    session = talked(model)
    session.save(tmp_path / "s.kv")
    before = (tmp_path / "s.kv").read_bytes()
    text(session.stream("a", **GO_ON))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(ModelFileError, match=r"s\.kv: cannot write: No space left on device"):
            session.save(tmp_path / "s.kv")
    assert (tmp_path / "s.kv").read_bytes() == before
    session.save(tmp_path / "s.kv")
    assert model.restore(tmp_path / "s.kv").n_tokens == session.n_tokens
