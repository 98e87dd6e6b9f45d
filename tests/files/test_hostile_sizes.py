"""Headers that announce more than the file has: what reading costs follows the file, not what it says."""

import itertools
import json
import subprocess
import sys

import pytest

from kvrun.errors import KvrunError, ModelFileError
from kvrun.files.description import MAX_TENSORS, ModelDescription
from kvrun.files.model_file import read_model_file
from support.model_files import DESCRIPTION, TOKENIZER, join, open_writer, split, write_all

READ_ALL = """
import resource, sys
from kvrun.commands.main import main
from kvrun.files.model_file import read_model_file
from kvrun.errors import ModelFileError

pages = int(open("/proc/self/statm").read().split()[0]) if sys.platform == "linux" else 0
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (400 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        read_model_file(path)
    except ModelFileError as error:
        print(len(str(error).splitlines()))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "model.bin"
    with open_writer(path) as writer:
        write_all(writer)
        writer.finish()
    return path


def with_description(path, to, **changes):
    header, data = split(path)
    model = {**json.loads(header["__metadata__"]["model"]), **changes}
    join(to, {**header, "__metadata__": {**header["__metadata__"], "model": json.dumps(model)}}, data)
    return to


def refused_cheaply(paths, seconds=120):
    """In a process of its own, with 400 MB to spare; the limit of time is many times what is needed."""
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *map(str, paths)], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["1"] * len(paths)


LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "n_layers": 1 << 12,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "head_dim": 1 << 10,
    "context_length": 1 << 30,
    "n_experts": 1 << 12,
    "expert_size": 1 << 22,
}
"""The largest that the description allows, each by itself."""


def test_every_count_huge_alone_and_in_pairs(written, tmp_path):
    few = {"n_experts": 2, "experts_used": 1, "expert_size": 8, "attention_bias": False}
    chosen = [*itertools.combinations(LARGEST, 1), *itertools.combinations(LARGEST, 2), tuple(LARGEST)]
    paths = []
    for names, offset in itertools.product(chosen, (0, 1)):
        changes = {name: LARGEST[name] + offset for name in names}
        paths.append(with_description(written, tmp_path / f"{len(paths)}.bin", **{**few, **changes}))
    refused_cheaply(paths)


def test_a_header_that_announces_more_tensors_than_it_has(written, tmp_path):
    """As many as a file has room for are looked for, up to the first that is missing; more are refused at once."""
    many = {"n_layers": 4096, "n_experts": 18, "experts_used": 1, "expert_size": 8}
    assert ModelDescription(**{**DESCRIPTION.__dict__, **many, "attention_bias": False}).n_tensors > 200_000
    path = with_description(written, tmp_path / "m.bin", **many, attention_bias=False)
    with pytest.raises(ModelFileError, match=r"tensor layers\.\d+\.\S+ is missing"):
        read_model_file(path)
    for experts in (40, 4096):
        path = with_description(written, tmp_path / "m.bin", **{**many, "n_experts": experts})
        with pytest.raises(ModelFileError, match=f"n_experts: .* tensors, a file has room for {MAX_TENSORS}"):
            read_model_file(path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_layers": 3, "n_experts": 5, "experts_used": 2, "expert_size": 8, "expert_layers": [True, False, True]},
        {"n_layers": 1, "n_experts": 7, "experts_used": 2, "expert_size": 8},
        {"norm": "layer", "learned_positions": True, "mlp_gated": False, "mlp_bias": True, "post_norms": True},
        {"tie_embeddings": True, "qk_norm": "all", "attention_out_bias": False, "pre_norms": False},
        {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "qk_norm": "head"},
    ],
)
def test_tensors_are_counted_as_they_are_listed(changes):
    description = ModelDescription(**{**DESCRIPTION.__dict__, **changes})
    assert description.n_tensors == len(description.tensor_shapes()) == len(list(description.tensors()))


def test_long_and_deep_values(written, tmp_path):
    header, data = split(written)
    meta, paths = header["__metadata__"], []

    def add(header):
        paths.append(tmp_path / f"{len(paths)}.bin")
        join(paths[-1], header, data)

    long = "x" * 500_000
    deep = "[" * 300_000 + "]" * 300_000
    for field in ("version", "model", "weights", "tokenizer", "stop_ids", "sampling", "checksums"):
        for text in (long, deep, json.dumps([long]), json.dumps({long: long}), "[" + "-1," * 200_000 + "0]"):
            add({**header, "__metadata__": {**meta, field: text}})
    for extra in (long, [[0] * 300_000], {str(i): [] for i in range(100_000)}, 7):
        add({**header, "extra": extra})
        add({**header, "embed.weight": extra})
    add({**{str(i): header["norm.weight"] for i in range(50_000)}, **header})
    refused_cheaply(paths)


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    "blob",
    [
        b"\0" * 100,
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["a"]]}, "added_tokens": [7]}',
        b'{"added_tokens": {"id": []}, "model": []}',
        b"\x0a\xff\xff\xff\xff\x0f" + b"x" * 100,
        b"\x80" * 1000,
    ],
    ids=lambda value: value[:12].hex() if isinstance(value, bytes) else value,
)
def test_tokenizers_that_are_none(tmp_path, kind, blob):
    import kvrun

    info = {"kind": kind, "add_bos": False, "add_eos": False}
    info |= dict.fromkeys(("bos_id", "eos_id", "pad_id", "unk_id"))
    with open_writer(tmp_path / "m.bin", tokenizer=blob, tokenizer_info=info) as writer:
        write_all(writer)
        writer.finish()
    with pytest.raises(KvrunError, match=r"m\.bin: the model's tokenizer\.\w+ (cannot be used|has a)") as error:
        kvrun.load(tmp_path / "m.bin").tokenize("a")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_the_order_of_the_header_is_that_of_the_data(written, tmp_path):
    """Also where all offsets are right: one content has one file."""
    header, data = split(written)
    meta, tensors = header.pop("__metadata__"), list(header)
    backwards = {"__metadata__": meta, **{name: header[name] for name in reversed(tensors)}}
    swapped = [*tensors[:5], tensors[6], tensors[5], *tensors[7:]]
    for entries, says in [
        (backwards, f"'{tensors[-1]}' is where {tensors[0]} should be: out of order"),
        ({"__metadata__": meta, **{name: header[name] for name in swapped}}, f"'{tensors[6]}' is where {tensors[5]} "),
        ({**header, "__metadata__": meta}, "__metadata__ is not the first entry"),
    ]:
        join(tmp_path / "m.bin", entries, data)
        with pytest.raises(ModelFileError, match=says):
            read_model_file(tmp_path / "m.bin")
    join(tmp_path / "m.bin", {"__metadata__": meta, **header}, data)
    assert bytes(read_model_file(tmp_path / "m.bin").tokenizer_bytes()) == TOKENIZER
