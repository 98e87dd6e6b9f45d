"""The GGUF file that `peers.py` gives to every runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any


class BenchmarkError(Exception):
    """Stated in one line."""


def _reader(path: str) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise BenchmarkError(f"{path}: not a usable GGUF file: {error}") from None


def gguf_facts(path: str) -> dict[str, Any]:
    """What workers and report need to know of a model: vocab, layers, kv_heads, head_dim, context, weights."""
    reader = _reader(path)

    def value(name: str, otherwise: Any = None) -> Any:
        found = reader.get_field(name)
        return otherwise if found is None else found.contents()

    arch = value("general.architecture")
    try:
        heads = value(f"{arch}.attention.head_count")
        facts = {
            "layers": value(f"{arch}.block_count"),
            "kv_heads": value(f"{arch}.attention.head_count_kv", heads),
            "head_dim": value(f"{arch}.attention.key_length") or value(f"{arch}.embedding_length") // heads,
            "vocab": next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"),
            "context": value(f"{arch}.context_length"),
        }
    except (TypeError, StopIteration):
        raise BenchmarkError(f"{path}: not a language model with a key/value cache") from None
    if not all(isinstance(number, int) for number in facts.values()):
        raise BenchmarkError(f"{path}: layers that differ in their heads are not supported here")
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    return {**facts, "weights": ", ".join(f"{count} x {name}" for name, count in types.most_common())}


def requantize(source: str, target: Path, type_name: str) -> None:
    """A copy of a GGUF file with its matrices, except embedding and output head, in another type."""
    import gguf

    reader, kind = _reader(source), gguf.GGMLQuantizationType[type_name.upper()]
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for key, item in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = item.types[-1] if len(item.types) > 1 else None
            file_type = key == "general.file_type"
            value = gguf.LlamaFileType[f"MOSTLY_{type_name.upper()}"] if file_type else item.contents()
            writer.add_key_value(key, value, item.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data, stored = tensor.data, tensor.tensor_type
        if len(tensor.shape) == 2 and tensor.name not in ("token_embd.weight", "output.weight"):
            data, stored = gguf.quants.quantize(gguf.quants.dequantize(data, stored), kind), kind
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
