"""A GGUF file, or the first of several parts, as a checkpoint."""

from __future__ import annotations

import os
import re

from kvrun.convert.checkpoint import Checkpoint, Vocabulary, describe, sampling_defaults, select_tensors
from kvrun.convert.families import GGUF, Family, GgufFacts, family_of_gguf
from kvrun.convert.fields import Fields
from kvrun.convert.gguf_file import GgufFile
from kvrun.convert.gguf_tokenizer import read_tokenizer
from kvrun.convert.tensors import StoredTensor
from kvrun.description import ModelDescription
from kvrun.errors import ConvertError

_ROPE_FACTORS = "rope_freqs.weight"
_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
}


def open_gguf(path: str, tokenizer: bool) -> Checkpoint:
    """The checkpoint in a GGUF file. ConvertError for anything missing, damaged or not supported."""
    files = _all_parts(path)
    meta = Fields(files[0].metadata, path)
    family = family_of_gguf(meta)
    available: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in available:
                raise ConvertError(f"{file.path}: tensor {name} is also in {available[name].path}")
            available[name] = tensor
    factors = available.pop(_ROPE_FACTORS, None)
    shapes = {name: tensor.shape for name, tensor in available.items()}
    facts = GgufFacts(shapes, _rope_factors(factors))
    description = describe(
        path,
        {
            "architecture": family.architecture,
            "name": meta.text("general.name", os.path.splitext(os.path.basename(path))[0]),
            **family.from_gguf(meta.under(f"{family.gguf_type}."), facts),
        },
    )
    tensors = select_tensors(path, available, family.source_names(description, GGUF), description)
    vocabulary = read_tokenizer(meta) if tokenizer else Vocabulary("none", None, {})
    return Checkpoint(
        form="GGUF",
        description=description,
        tensors=_unpermuted(tensors, family, description),
        vocabulary=vocabulary,
        stop_ids=_stop_ids(meta, vocabulary),
        chat_template=meta.text("tokenizer.chat_template", None),
        sampling=sampling_defaults(meta, _SAMPLING),
        files=tuple(file.path for file in files),
    )


def _all_parts(path: str) -> list[GgufFile]:
    """The file and, if the model is split, the other parts, which lie beside it."""
    first = GgufFile(path)
    parts = Fields(first.metadata, path).integer("split.count", 1, minimum=0)
    if parts <= 1:
        return [first]
    named = re.fullmatch(r"(.*-)00001(-of-\d{5}\.gguf)", path, re.DOTALL)
    if not named:
        raise ConvertError(f"{path}: one of {parts} parts; give the first one, NAME-00001-of-{parts:05}.gguf")
    others = [f"{named[1]}{i:05}{named[2]}" for i in range(2, parts + 1)]
    for other in others:
        if not os.path.isfile(other):
            raise ConvertError(f"{other}: missing: the model has {parts} parts")
    return [first, *map(GgufFile, others)]


def _rope_factors(tensor: StoredTensor | None) -> list[float] | None:
    if tensor is None:
        return None
    if len(tensor.shape) != 1:
        raise ConvertError(
            f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, not one dimension"
        )
    values = tensor.vector().tolist()
    return None if all(value == 1.0 for value in values) else values


def _unpermuted(
    tensors: dict[str, StoredTensor], family: Family, description: ModelDescription
) -> dict[str, StoredTensor]:
    """GGUF interleaves the halves of each head of these; ours keeps them one after the other."""
    order = tuple(range(0, description.head_dim, 2)) + tuple(range(1, description.head_dim, 2))
    return {
        name: tensor.with_rows_from(order)
        if name.rpartition(".")[0].endswith(family.gguf_permuted)
        else tensor
        for name, tensor in tensors.items()
    }


def _stop_ids(meta: Fields, vocabulary: Vocabulary) -> list[int]:
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ids = [meta.integer(key, None, minimum=0) for key in keys]
    return vocabulary.stops() + [token for token in ids if token is not None]
