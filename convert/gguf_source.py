"""A GGUF file, or the first of several parts, as a checkpoint."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from kvrun.convert.checkpoint import (
    ROTARY,
    Checkpoint,
    Vocabulary,
    describe,
    rotary_order,
    select_tensors,
    with_halves_apart,
)
from kvrun.convert.families import GGUF, Family, family_of_gguf
from kvrun.convert.family_gguf import GgufFacts
from kvrun.convert.fields import Fields
from kvrun.convert.gguf_file import GgufFile
from kvrun.convert.gguf_tokenizer import read_tokenizer
from kvrun.convert.names import surplus_line
from kvrun.convert.sampling import sampling_defaults
from kvrun.convert.tensors import StoredTensor, is_readable
from kvrun.convert.token_ids import token_id
from kvrun.errors import ConvertError, one_line
from kvrun.files.description import ModelDescription

_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# In old files of Mixtral each expert of a layer has tensors of its own.
_ONE_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")


def open_gguf(path: str, tokenizer: bool) -> Checkpoint:
    """The checkpoint in a GGUF file. Raises ConvertError if anything is missing, damaged or not supported."""
    files = _all_parts(path)
    meta = Fields(files[0].metadata, path)
    family = family_of_gguf(meta)
    available = _all_tensors(files)
    _drop_copied_head(available)
    _check_scales(available)
    facts = _take_facts(path, available)
    description = describe(
        path,
        {
            "architecture": family.architecture,
            "name": meta.text("general.name", os.path.splitext(os.path.basename(path))[0]),
            **family.from_gguf(meta.under(f"{family.gguf_type}."), facts),
        },
    )
    vocabulary = read_tokenizer(meta) if tokenizer else Vocabulary("none", None, {})
    sampling, left_out = sampling_defaults(meta, "gguf")
    wanted = _wanted(available, family, description)
    surplus = _surplus(path, available, wanted, description)
    return Checkpoint(
        form="GGUF",
        description=description,
        tensors=_tensors_of(path, available, wanted, family, description),
        vocabulary=vocabulary,
        stop_ids=_stop_ids(meta, vocabulary),
        chat_template=_chat_template(meta),
        sampling=sampling,
        files=tuple(file.path for file in files),
        notes=(*left_out, *vocabulary.notes),
        surplus=(surplus_line(surplus),) if surplus else (),
    )


def _all_parts(path: str) -> list[GgufFile]:
    """The file and, if the model is split, the other parts, which must be in the same folder."""
    first = GgufFile(path)
    parts = Fields(first.metadata, path).integer("split.count", 1, minimum=0, maximum=99_999)
    if parts <= 1:
        return [first]
    named = re.fullmatch(r"(.*-)00001(-of-\d{5}\.gguf)", path, re.DOTALL)
    if not named:
        raise ConvertError(f"{path}: one of {parts} parts; give the first one, NAME-00001-of-{parts:05}.gguf")
    others = [f"{named[1]}{i:05}{named[2]}" for i in range(2, parts + 1)]
    for other in others:
        if not os.path.lexists(other):
            raise ConvertError(f"{other}: missing: the model has {parts} parts")
    return [first, *map(GgufFile, others)]


def _all_tensors(files: list[GgufFile]) -> dict[str, StoredTensor]:
    """The tensors of all parts by name; a layer's experts are one matrix."""
    available: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in available:
                raise ConvertError(f"{file.path}: tensor {name} is also in {available[name].path}")
            if name.endswith("_exps.weight") and len(tensor.shape) == 3:  # [experts, rows, cols]
                tensor = replace(tensor, shape=(tensor.rows, tensor.shape[2]))
            available[name] = tensor
    return available


def _take_facts(path: str, available: dict[str, StoredTensor]) -> GgufFacts:
    """What the tensors tell about the model. The rotary factors, which are settings, are removed from `available`."""
    factors, long, short = (_vector(available.pop(name, None)) for name in _ROPE_FACTORS)
    if factors is not None and all(value == 1.0 for value in factors):
        factors = None
    if (long is None) != (short is None):
        raise ConvertError(f"{path}: there is only one of {' and '.join(_ROPE_FACTORS[1:])}")
    shapes = {name: tensor.shape for name, tensor in available.items()}
    return GgufFacts(shapes, factors, None if long is None or short is None else (long, short))


def _wanted(available: Iterable[str], family: Family, description: ModelDescription) -> list[tuple[str, str]]:
    """(our name, the name in the file) of every tensor."""
    wanted = list(family.source_names(description, GGUF))
    if any(map(_ONE_EXPERT.fullmatch, available)):
        return [(ours, _of_one_expert(ours, theirs)) for ours, theirs in wanted]
    return wanted


def _surplus(
    path: str, available: Iterable[str], wanted: Iterable[tuple[str, str]], description: ModelDescription
) -> list[str]:
    """Tensors that the model does not need. Raises ConvertError for one that would act on it: all that a layer has, and
    biases and scales of what the model needs."""
    needed = {theirs for _, theirs in wanted}
    stems = {name.rpartition(".")[0] for name in needed}
    surplus = [name for name in available if name not in needed]
    for name in surplus:
        layer = re.match(r"blk\.(\d{1,5})\.(?!attn_rot_embd)", name)
        if name.rpartition(".")[0] in stems or (layer and int(layer[1]) < description.n_layers):
            raise ConvertError(
                f"{path}: tensor {one_line(name)[:80]}: not part of a {description.architecture} model with this "
                "metadata, though it would change what one computes"
            )
    return surplus


def _tensors_of(
    path: str,
    available: dict[str, StoredTensor],
    wanted: list[tuple[str, str]],
    family: Family,
    description: ModelDescription,
) -> dict[str, StoredTensor]:
    """The model's tensors under our names, rows in our order."""
    tensors = select_tensors(path, available, wanted, description)
    for tensor in tensors.values():
        _check_readable(tensor)
    if family.gguf_permuted:
        order = (*range(0, description.head_dim, 2), *range(1, description.head_dim, 2))
        return with_halves_apart(tensors, family.gguf_permuted, order)
    if description.rotary_dim is not None:
        return with_halves_apart(tensors, ROTARY, rotary_order(description))
    return tensors


def _vector(tensor: StoredTensor | None) -> list[float] | None:
    if tensor is None:
        return None
    if len(tensor.shape) != 1:
        raise ConvertError(f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, not one dimension")
    _check_readable(tensor)
    values: list[float] = tensor.vector().tolist()
    return values


def _check_readable(tensor: StoredTensor) -> None:
    if not is_readable(tensor.type):
        raise ConvertError(
            f"{tensor.path}: tensor {tensor.name} has type {tensor.type.upper()}, which is not supported yet; "
            "use a file of another type (Q4_K_M, Q8_0, ...)"
        )


def _check_scales(available: dict[str, StoredTensor]) -> None:
    """Raise ConvertError if a matrix is to be multiplied by a number in a tensor of its own (files in NVFP4 have such).
    Factors of 1 are removed."""
    for name in [name for name in available if name.endswith(".scale")]:
        stem = name.removesuffix(".scale").removesuffix(".weight")
        if f"{stem}.weight" not in available:
            continue
        if any(value != 1.0 for value in _vector(available[name]) or ()):
            raise ConvertError(
                f"{available[name].path}: tensor {name}: factors beside the weights are not supported yet; "
                "use a file of another type (Q4_K_M, Q8_0, ...)"
            )
        del available[name]


def _drop_copied_head(available: dict[str, StoredTensor]) -> None:
    """Some files of models with a tied head, GPT-2's among them, store the embedding again as the head: remove that."""
    embed, head = available.get("token_embd.weight"), available.get("output.weight")
    if embed is None or head is None or (embed.type, embed.shape) != (head.type, head.shape):
        return
    if all(np.array_equal(embed.raw(*rows), head.raw(*rows)) for rows in embed.slabs()):
        del available["output.weight"]


def _of_one_expert(ours: str, theirs: str) -> str:
    """The name of a single expert's tensor: blk.0.ffn_up.3.weight instead of blk.0.ffn_up_exps.weight."""
    expert = re.search(r"\.experts\.(\d+)\.", ours)
    return theirs.replace("_exps.", f".{expert[1]}.") if expert else theirs


def _chat_template(meta: Fields) -> str | None:
    """The default template; of several with names the one called "default", or the only one."""
    template: str | None = meta.text("tokenizer.chat_template", None)
    if template is None:
        named = meta.under("tokenizer.chat_template.")
        names = named.names()
        name = "default" if "default" in names else names[0] if len(names) == 1 else None
        template = named.text(name) if name is not None else None
    return template


def _stop_ids(meta: Fields, vocabulary: Vocabulary) -> list[int]:
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ids = [token_id(meta, key) for key in keys]
    ids.append(vocabulary.info.get("eos_id"))
    size = vocabulary.size or math.inf  # ids beyond it have their line already
    return vocabulary.stops() + [token for token in ids if token is not None and token < size]
