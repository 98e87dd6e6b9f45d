"""GGUF files written byte by byte, of which no library makes such: refused in one line, as llama.cpp refuses them, and
without taking more memory than a file of their size is worth."""

import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from kvrun.convert.gguf_file import GgufFile
from kvrun.errors import ConvertError


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def info(name, dims, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def container(keys=(), infos=(), data=b"", n_keys=None, n_tensors=None, alignment=32):
    """A GGUF file of these parts, its counts those of the parts or others."""
    counts = len(infos) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join((*keys, *infos))
    return head + bytes(-len(head) % alignment) + data


UINT8, UINT32, STRING, ARRAY, UINT64 = 0, 4, 8, 9, 10
HUGE = 1 << 62
FAULTS = {
    "more values than bytes": (container(n_keys=HUGE), "truncated within its header, or damaged"),
    "more tensors than bytes": (container(n_tensors=HUGE), "truncated within its header, or damaged"),
    "as many as 64 bits hold": (container(n_keys=(1 << 64) - 1, n_tensors=(1 << 64) - 1), "or damaged"),
    "a text beyond the file": (
        container([key("a", STRING, struct.pack("<Q", 1 << 40))]),
        "truncated within its header",
    ),
    "a text of 64 bits": (container([key("a", STRING, struct.pack("<Q", (1 << 64) - 1))]), "truncated within"),
    "a name beyond the file": (container([struct.pack("<Q", HUGE) + b"abc" + bytes(9)]), "truncated within"),
    "an array beyond the file": (container([key("a", ARRAY, struct.pack("<IQ", UINT64, HUGE))]), "truncated within"),
    "texts beyond the file": (container([key("a", ARRAY, struct.pack("<IQ", STRING, HUGE))]), "truncated within"),
    "nested arrays": (container([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9 + bytes(99))]), "too deep an array"),
    "arrays beyond the file": (container([key("a", ARRAY, struct.pack("<IQ", ARRAY, HUGE))]), "truncated within"),
    "a type of value": (container([key("a", 13, bytes(8))]), "unknown type of value 13"),
    "an empty key": (container([key("", UINT32, bytes(4))]), "a key is empty"),
    "a key twice": (container([key("a", UINT32, bytes(4))] * 2), "the key a appears twice"),
    "a tensor twice": (container([], [info("x", [8]), info("x", [8], 0, 32)], bytes(64)), "tensor x appears twice"),
    "five dimensions": (container([], [info("x", [1] * 5)], bytes(64)), "tensor x has 5 dimensions"),
    "no values": (container([], [info("x", [8, 0])], bytes(64)), r"the impossible shape \[0, 8\]"),
    "too many values": (container([], [info("x", [1 << 32, 1 << 32])], bytes(64)), "the impossible shape"),
    "half a block": (container([], [info("x", [40], 2)], bytes(64)), "the impossible shape"),
    "beyond the end": (container([], [info("x", [1 << 20])], bytes(64)), "truncated: tensor x ends at byte 41943"),
    "far beyond the end": (
        container([], [info("x", [8], 0, HUGE)], bytes(64)),
        f"at byte {HUGE} of the data",
    ),
    "overlap": (container([], [info("x", [16]), info("y", [8], 0, 32)], bytes(96)), "y is at byte 32 .* not at 64"),
    "the same bytes": (container([], [info("x", [8]), info("y", [8])], bytes(64)), "y is at byte 0 .* not at 32"),
    "hole": (container([], [info("x", [8]), info("y", [8], 0, 64)], bytes(96)), "y is at byte 64 .* not at 32"),
    "another order": (container([], [info("x", [8], 0, 32), info("y", [8])], bytes(64)), "x is at byte 32 .* not at 0"),
    "not aligned": (container([], [info("x", [8], 0, 4)], bytes(64)), "tensor x is at byte 4 .* not at 0"),
    "a removed type": (container([], [info("x", [32], 31)], bytes(64)), "type Q4_0_4_4, which llama.cpp has removed"),
    "an unknown type": (container([], [info("x", [32], 140)], bytes(64)), "the unknown type 140"),
    "a type of 32 bits": (container([], [info("x", [32], (1 << 32) - 1)], bytes(64)), "the unknown type 4294967295"),
}


@pytest.mark.parametrize("content, says", FAULTS.values(), ids=FAULTS)
def test_damage(tmp_path, content, says):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ConvertError, match=says) as caught:
        GgufFile(str(tmp_path / "m.gguf"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


UNSIGNED = struct.Struct("<I").pack
ALIGNMENTS = {
    **{str(n): key("general.alignment", UINT32, UNSIGNED(n)) for n in (0, 1, 4, 12, 24, 33, 1 << 31)},
    "-32": key("general.alignment", 5, struct.pack("<i", -32)),
    "32.0": key("general.alignment", 6, struct.pack("<f", 32)),
    "True": key("general.alignment", 7, b"\1"),
    "'32'": key("general.alignment", STRING, text("32")),
    "[32]": key("general.alignment", ARRAY, struct.pack("<IQI", UINT32, 1, 32)),
}


@pytest.mark.parametrize("said", ALIGNMENTS)
def test_alignments_that_cannot_be(tmp_path, said):
    (tmp_path / "m.gguf").write_bytes(container([ALIGNMENTS[said]], [info("x", [8])], bytes(32)))
    with pytest.raises(ConvertError, match=f"general.alignment is {re.escape(said)}$"):
        GgufFile(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_other_alignments(tmp_path, alignment):
    values = [np.arange(n, dtype="<f4") for n in (3, 2, 40)]
    offsets, data = [], b""
    for a in values:
        offsets.append(len(data))
        data += a.tobytes() + bytes(-a.nbytes % alignment)
    keys = [key("general.alignment", UINT32, struct.pack("<I", alignment))]
    infos = [info(f"t{i}", [len(a)], 0, at) for i, (a, at) in enumerate(zip(values, offsets, strict=True))]
    (tmp_path / "m.gguf").write_bytes(container(keys, infos, data.rstrip(b"\0"), alignment=alignment))
    for tensor, a in zip(GgufFile(str(tmp_path / "m.gguf")).tensors.values(), values, strict=True):
        assert np.array_equal(tensor.vector(), a)


def test_a_tensor_without_dimensions_is_one_number(tmp_path):
    (tmp_path / "m.gguf").write_bytes(container([], [info("x", [])], struct.pack("<f", 2.5)))
    assert GgufFile(str(tmp_path / "m.gguf")).tensors["x"].vector() == [2.5]


CLAIMS = {
    "values": container(n_keys=1 << 30),
    "tensors": container(n_tensors=1 << 30),
    "numbers": container([key("a", ARRAY, struct.pack("<IQ", UINT8, 1 << 40))]),
    "texts": container([key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 30))]),
    "a text": container([key("a", STRING, struct.pack("<Q", 1 << 40))]),
    "a name": container(n_keys=1) + struct.pack("<Q", 1 << 40),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is limited as Linux does it")
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_takes_no_memory(tmp_path, claim):
    """In a file so large that everything it says could be in it."""
    path = tmp_path / "m.gguf"
    path.write_bytes(CLAIMS[claim])
    os.truncate(path, 1 << 42)
    code = (
        "import resource, sys\n"
        "from kvrun.convert.gguf_file import GgufFile\nfrom kvrun.errors import ConvertError\n"
        "limit = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (64 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try:\n    GgufFile(sys.argv[1])\nexcept ConvertError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert "not a readable GGUF file" in run.stdout, run
