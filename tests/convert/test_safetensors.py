"""Headers of safetensors files: accepted and refused as the format's own reader does (the package safetensors, 0.8)."""

import json
import subprocess
import sys

import pytest

from kvrun.convert.safetensors_file import read_safetensors_header
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError
from support.make_checkpoint import CONFIG, hf_folder, hf_shapes, random_tensors, save_safetensors

A = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TEXT = json.dumps(A)


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path, header, data=b"", length=None):
    """A file with this header, a JSON value or its bytes, that says it has `length` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


FOUR = bytes(4)
ACCEPTED = {
    "spaces": (f' \n\t\r{{"a": {TEXT}}} \n'.encode(), FOUR, {"a": (1,)}),
    "another field": ({"a": A | {"more": [-1, 0.5, {"x": None}]}}, FOUR, {"a": (1,)}),
    "metadata": ({"__metadata__": {"format": "pt", "": "é"}, "a": A}, FOUR, {"a": (1,)}),
    "no metadata": ({"__metadata__": None, "a": A}, FOUR, {"a": (1,)}),
    "a scalar": ({"a": A | {"shape": []}}, FOUR, {"a": ()}),
    "no values": ({"z": entry("F32", [0, 5], 4, 4), "a": A}, FOUR, {"z": (0, 5), "a": (1,)}),
    "another order": ({"b": entry("I64", [2], 4, 20), "a": A}, bytes(20), {"b": (2,), "a": (1,)}),
    "half bytes": ({"a": entry("F4", [2, 4], 0, 4)}, FOUR, {"a": (2, 4)}),
    "three of four": ({"a": entry("F6_E2M3", [4], 0, 3)}, bytes(3), {"a": (4,)}),
    "the same twice": (f'{{"a": {TEXT}, "a": {TEXT}}}'.encode(), FOUR, {"a": (1,)}),
    "surrogates in a pair": (f'{{"\\ud83d\\ude00": {TEXT}}}'.encode(), FOUR, {"\U0001f600": (1,)}),
    "a name without letters": ({"": A}, FOUR, {"": (1,)}),
    "nothing at all": ({}, b"", {}),
}
REFUSED = {
    "overlap": ({"a": A, "b": A}, FOUR, "tensor b overlaps the one before it"),
    "a part of another": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, bytes(8), "overlaps"),
    "hole": ({"a": A, "b": entry("F32", [1], 8, 12)}, bytes(12), "tensor b leaves a hole of 4 bytes"),
    "hole at the start": ({"a": entry("F32", [1], 4, 8)}, bytes(8), "tensor a leaves a hole of 4 bytes"),
    "no values within another": ({"a": A, "z": entry("F32", [0], 2, 2)}, FOUR, "tensor z overlaps"),
    "no values beyond all": ({"a": A, "z": entry("F32", [0], 9, 9)}, FOUR, "tensor z leaves a hole"),
    "bytes after": ({"a": A}, bytes(5), "1 bytes too many after the last tensor"),
    "data without tensors": ({}, bytes(1), "1 bytes too many"),
    "truncated": ({"a": A}, bytes(3), "truncated: tensor a ends at byte"),
    "backwards": ({"a": entry("F32", [1], 4, 0)}, FOUR, "tensor a: F32"),
    "another size": ({"a": entry("F32", [2], 0, 4)}, FOUR, "takes 8 bytes, but data_offsets are 0 and 4"),
    "half a byte": ({"a": entry("F4", [7], 0, 3)}, bytes(3), "takes 3.5 bytes"),
    "too large": ({"a": entry("F32", [1 << 32, 1 << 32], 0, 4)}, FOUR, "shape .* is too large"),
    "too large times 0": ({"a": entry("F32", [1 << 32, 1 << 32, 0], 0, 0)}, b"", "shape .* is too large"),
    "a size of 65 bits": ({"a": entry("F32", [1 << 64, 0], 0, 0)}, b"", "is no list of sizes"),
    "negative": ({"a": entry("F32", [-1], 0, 4)}, FOUR, "is no list of sizes"),
    "negative zero": (f'{{"a": {TEXT.replace("[0", "[-0")}}}'.encode(), FOUR, "are not two numbers"),
    "a fraction": ({"a": entry("F32", [1.0], 0, 4)}, FOUR, "is no list of sizes"),
    "truth": ({"a": entry("F32", [True], 0, 4)}, FOUR, "is no list of sizes"),
    "a text for a shape": ({"a": entry("F32", "", 0, 4)}, FOUR, "is no list of sizes"),
    "three offsets": ({"a": A | {"data_offsets": [0, 4, 4]}}, FOUR, "are not two numbers"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR, "shape None"),
    "an unknown dtype": ({"a": A | {"dtype": "F99"}}, FOUR, "dtype 'F99' is none of safetensors' dtypes"),
    "small letters": ({"a": A | {"dtype": "f32"}}, FOUR, "dtype 'f32'"),
    "no dtype": ({"a": A | {"dtype": 7}}, FOUR, "dtype 7"),
    "no object": ({"a": None}, b"", "tensor a: not an object"),
    "a number in metadata": ({"__metadata__": {"n": 1}, "a": A}, FOUR, "__metadata__ is not an object of texts"),
    "a list as metadata": ({"__metadata__": [], "a": A}, FOUR, "__metadata__ is not an object of texts"),
    "metadata twice": (f'{{"__metadata__": {{}}, "__metadata__": {{}}, "a": {TEXT}}}'.encode(), FOUR, "appears twice"),
    "a field twice": (f'{{"a": {TEXT[:-1]}, "shape": [1]}}}}'.encode(), FOUR, "shape appears twice"),
    "a name twice": (f'{{"a": {TEXT}, "a": {json.dumps(entry("F32", [1], 4, 8))}}}'.encode(), bytes(8), "hole"),
    "a byte order mark": (b"\xef\xbb\xbf" + f'{{"a": {TEXT}}}'.encode(), FOUR, "damaged safetensors header"),
    "zeros for spaces": (f'{{"a": {TEXT}}}\0'.encode(), FOUR, "damaged safetensors header"),
    "not a number": (f'{{"a": {TEXT[:-1]}, "x": NaN}}}}'.encode(), FOUR, "NaN is not a JSON value"),
    "infinite": (f'{{"a": {TEXT[:-1]}, "x": 1e999}}}}'.encode(), FOUR, "1e999 is out of range"),
    "thousands of digits": (f'{{"a": {TEXT[:-1]}, "x": {"9" * 5000}}}}}'.encode(), FOUR, "out of range"),
    "half a surrogate": (f'{{"\\ud800": {TEXT}}}'.encode(), FOUR, "damaged safetensors header"),
    "Latin 1": (f'{{"é": {TEXT}}}'.encode("latin-1"), FOUR, r"not UTF-8 \(byte 10\)"),
    "deep": (b'{"a": ' + b"[" * 100_000, b"", "nested too deeply"),
    "a list": (b"[]", b"", "not a JSON object"),
}


@pytest.mark.parametrize("header, data, shapes", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(tmp_path, header, data, shapes):
    path = tmp_path / "x.safetensors"
    write(path, header, data)
    found = read_safetensors_header(str(path))
    assert {name: tensor.shape for name, tensor in found.items()} == shapes


@pytest.mark.parametrize("header, data, says", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, header, data, says):
    path = tmp_path / "x.safetensors"
    write(path, header, data)
    with pytest.raises(ConvertError, match=says) as caught:
        read_safetensors_header(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not a safetensors file"),
        (bytes(7), "not a safetensors file"),
        (bytes(8), "not a safetensors file"),
        (bytes(100), "not a safetensors file"),
        (b"\x01" + bytes(7) + b"{}", "not a safetensors file"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((50).to_bytes(8, "little") + b"{}", "truncated: the header has 50 bytes, the file 10"),
    ],
)
def test_what_cannot_be_a_header(tmp_path, content, says):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ConvertError, match=says):
        read_safetensors_header(str(tmp_path / "x.safetensors"))


def test_a_claim_costs_no_memory(tmp_path):
    """A header that says it is as large as it may be, in a file of that size, holes and all."""
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((99_000_000).to_bytes(8, "little") + b'{"a": ')
        file.truncate(1 << 40)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from kvrun.convert.safetensors_file import read_safetensors_header\nfrom kvrun.errors import ConvertError\n"
        "try:\n    read_safetensors_header(sys.argv[1])\nexcept ConvertError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert "damaged safetensors header" in run.stdout, run


def test_a_tensor_without_values_that_the_model_needs(tmp_path):
    tensors = random_tensors(hf_shapes())
    for name, shape in (("model.norm.weight", (0,)), ("model.layers.0.mlp.up_proj.weight", (0, 64))):
        folder = hf_folder(tmp_path / "hf")
        save_safetensors(folder / "model.safetensors", {**tensors, name: tensors[name][:0].reshape(shape)})
        with pytest.raises(ConvertError, match=rf"tensor {name.removeprefix('model.')} has shape \[0"):
            open_checkpoint(str(folder))
    config = {**CONFIG, "tie_word_embeddings": True}
    folder = hf_folder(tmp_path / "tied", config, {**tensors, "lm_head.weight": tensors["model.norm.weight"][:0]})
    with pytest.raises(ConvertError, match="lm_head"):
        open_checkpoint(str(folder))
