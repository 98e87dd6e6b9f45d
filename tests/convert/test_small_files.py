"""What is not a readable file of a sensible size, wherever the converter reads one: refused at once, in one line."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys

import pytest

from kvrun.convert import convert
from kvrun.convert.small_files import LIMIT, TOKENIZER_LIMIT
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError
from support.files import rewrite
from support.make_checkpoint import hf_folder, save_gguf, write_json

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "model.safetensors",
    "m.gguf",
)


def pipe(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


def device(path):
    path.symlink_to("/dev/zero")


def lost_link(path):
    path.symlink_to("../blobs/0123")


def circle(path):
    path.symlink_to(path.name)


def huge(path):
    with open(path, "wb") as file:
        file.truncate(10_000_000_000)


def listener(path):
    before = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


KINDS = {
    pipe: "not a regular file",
    folder: "it is a folder",
    device: "not a regular file",
    lost_link: "a link to ../blobs/0123, which is not there",
    circle: "symbolic links",
    huge: "10000000000 bytes; .* are the limit|not a safetensors file|neither a GGUF file",
    listener: "cannot read|not a regular file",
}


def checkpoint(tmp_path, name):
    """A checkpoint without this file, in which it is read: (what to convert, the path of the file)."""
    root = hf_folder(tmp_path / "hf")
    if name == "m.gguf":
        return tmp_path / name, tmp_path / name
    if name == "tokenizer.model":
        (root / "tokenizer.json").unlink()
    if name == "model.safetensors.index.json":
        (root / "model.safetensors").rename(root / "model-00001-of-00001.safetensors")
    (root / name).unlink(missing_ok=True)
    return root, root / name


def refusals(paths):
    """The lines with which paths are refused, by a process that may take neither long nor much memory."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from kvrun.convert.source import open_checkpoint\nfrom kvrun.errors import ConvertError\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        open_checkpoint(path)\n    except ConvertError as error:\n        print(error)"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and len(lines) == len(paths), run
    return lines


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """For each kind [(path of such a file, the line with which its checkpoint is refused)]."""
    paths, roots = {kind: [] for kind in KINDS}, []
    for kind in KINDS:
        for name in FILES:
            if (kind, name) != (folder, "m.gguf"):  # a folder is a checkpoint
                root, path = checkpoint(tmp_path_factory.mktemp("refused"), name)
                kind(path)
                roots.append(root)
                paths[kind].append(path)
    lines = iter(refusals(roots))
    return {kind: [(path, next(lines)) for path in paths[kind]] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_such_file_is_read(refused, kind):
    assert len(refused[kind]) >= len(FILES) - 1
    for path, line in refused[kind]:
        assert re.search(KINDS[kind], line) and str(path) in line and len(line) < 600


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read(tmp_path, name, monkeypatch):
    """Permissions do not stop root, so the refusal is the system call's that is in the way of every user."""
    root, path = checkpoint(tmp_path, name)
    path.write_bytes(b"{}")
    real = os.open

    def refuse(opened, *args, **kwargs):
        if os.fspath(opened) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(opened, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConvertError, match=rf"{name}: cannot read: Permission denied$"):
        open_checkpoint(str(root))


@pytest.mark.parametrize("name", FILES)
def test_an_empty_file(tmp_path, name):
    root, path = checkpoint(tmp_path, name)
    path.write_bytes(b"")
    if name == "chat_template.jinja":
        assert open_checkpoint(str(root)).chat_template == ""
        return
    with pytest.raises(ConvertError, match=f"{name}: ") as caught:
        open_checkpoint(str(root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_what_git_leaves_of_a_large_file(tmp_path, name):
    root, path = checkpoint(tmp_path, name)
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 538090408\n")
    with pytest.raises(ConvertError, match=f"{name}: a pointer of Git LFS instead of the file; .* git lfs pull$"):
        open_checkpoint(str(root))


def test_the_path_itself(tmp_path):
    for path, says in {
        "no/such": "no such file or folder; download the checkpoint first",
        str(tmp_path / "none"): "no such file or folder",
        "a\0b": "NUL",
        "": "no such file or folder",
        "/dev/zero": "not a regular file",
        str(tmp_path / ("x" * 300)): "too long",
    }.items():
        with pytest.raises(ConvertError, match=says) as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"tjgg\3\0\0\0", "a GGML file of the time before GGUF"),
        (b"lmgg", "a GGML file of the time before GGUF"),
        (b"PK\3\4", "neither a GGUF file nor a folder; for a Hugging Face checkpoint give the folder"),
        (b"GGU", "neither a GGUF file"),
        (b"GGUF", "truncated within its header"),
    ],
)
def test_other_files(tmp_path, content, says):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConvertError, match=says):
        open_checkpoint(str(tmp_path / "x"))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json") and name != "tokenizer.json"])
def test_json_that_is_not_usable(tmp_path, name):
    root, path = checkpoint(tmp_path, name)
    config = json.loads((root / "config.json").read_text()) if name != "config.json" else {}
    for content, says in {
        b'{"a": [}': "not valid JSON",
        b'{"a": 1} x': "not valid JSON",
        b"[]": "not a JSON object",
        b"7": "not a JSON object",
        b'"' + b"x" * 70: "not valid JSON",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested more than 100 deep",
        b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}": "nested more than 100 deep",
        b'{"a":' * 300 + b"7" + b"}" * 300: "nested more than 100 deep",
        b'{"a": ' + b"7" * 5000 + b"}": "a number of 5000 digits",
        b'{"a": "\xff"}': r"not UTF-8 \(byte 7\)",
        "{}".encode("utf-16"): r"not UTF-8 \(byte 0\)",
    }.items():
        rewrite(path, content)
        with pytest.raises(ConvertError, match=says) as caught:
            open_checkpoint(str(root))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert config or name == "config.json"


def test_json_is_read_as_transformers_reads_it(tmp_path):
    """A byte order mark is dropped; NaN and infinities are numbers, harmless where none is used; the last of equal keys
    counts."""
    root = hf_folder(tmp_path / "hf")
    text = (root / "config.json").read_text()
    plain = open_checkpoint(str(root)).description
    for changed in (
        "\ufeff" + text,
        text.replace("{", '{"time_step_limit": [0.0, Infinity, -Infinity, NaN], ', 1),
        text.replace("{", '{"hidden_size": 17, ', 1),
    ):
        (root / "config.json").write_text(changed, encoding="utf-8")
        assert open_checkpoint(str(root)).description == plain
    (root / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": NaN'))
    with pytest.raises(ConvertError, match="rope_theta: nan is not a positive number"):
        open_checkpoint(str(root))


def test_the_limits(tmp_path):
    root = hf_folder(tmp_path / "hf")
    (root / "chat_template.jinja").write_text("x" * 100)
    for name, limit in (("chat_template.jinja", LIMIT), ("tokenizer.json", TOKENIZER_LIMIT)):
        size = (root / name).stat().st_size
        os.truncate(root / name, limit + 1)
        with pytest.raises(ConvertError, match=f"{name}: cannot read: {limit + 1} bytes; {limit} are the limit"):
            open_checkpoint(str(root))
        os.truncate(root / name, size)
    assert open_checkpoint(str(root)).chat_template == "x" * 100


def test_a_gguf_file_whose_parts_are_no_files(tmp_path):
    save_gguf(tmp_path / "m-00001-of-00002.gguf", metadata={"split.count": 2})
    for kind, says in KINDS.items():
        other = tmp_path / "m-00002-of-00002.gguf"
        kind(other)
        with pytest.raises(ConvertError, match="not a readable GGUF file" if kind is huge else says):
            open_checkpoint(str(tmp_path / "m-00001-of-00002.gguf"))
        other.rmdir() if kind is folder else other.unlink()


def test_an_index_that_names_what_is_no_file(tmp_path):
    root, path = checkpoint(tmp_path, "model.safetensors.index.json")
    write_json(path, {"weight_map": {"model.norm.weight": "x.safetensors"}})
    pipe(root / "x.safetensors")
    assert "not a regular file" in refusals([root])[0]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_names_that_are_no_unicode(tmp_path):
    """Files may be called by any bytes; a model's name is only shown."""
    folder = hf_folder(tmp_path / os.fsdecode(b"tiny\xff"))
    model = convert(folder, tmp_path / "model.bin").model
    assert (model.description.name, model.source["name"]) == ("tiny?", "tiny?")
    save_gguf(tmp_path / "m.gguf", metadata={"general.name": "QQ"})
    odd = tmp_path / os.fsdecode(b"\xfe.gguf")
    odd.write_bytes((tmp_path / "m.gguf").read_bytes().replace(b"QQ", b"\xfeQ"))
    model = convert(odd, tmp_path / "model.bin").model
    assert (model.description.name, model.source["name"]) == ("?Q", "?.gguf")


def test_a_chat_template_that_is_no_unicode(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    write_json(folder / "chat_template.json", {"chat_template": "a\ud800"})
    with pytest.raises(ConvertError, match="hf: its chat template is not valid Unicode"):
        convert(folder, tmp_path / "model.bin")
