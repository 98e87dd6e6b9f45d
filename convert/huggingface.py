"""A Hugging Face checkpoint folder: config.json, safetensors files, tokenizer and generation settings."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

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
from kvrun.convert.families import HF, Family, family_of_config, text_config
from kvrun.convert.family_config import refuse_other_attention
from kvrun.convert.fields import Fields, read_json, shown
from kvrun.convert.fp8 import with_factors
from kvrun.convert.hf_tokenizer import read_tokenizer
from kvrun.convert.names import (
    outer_prefix,
    refuse_adapter,
    refuse_quantised_weights,
    stored_names,
    surplus_line,
    surplus_of,
    unwrapped,
)
from kvrun.convert.other_folders import adapters_beside, refuse_other_folders
from kvrun.convert.quantised import fp8_block, refuse_packed
from kvrun.convert.safetensors_file import DTYPES, read_safetensors_header
from kvrun.convert.sampling import sampling_defaults
from kvrun.convert.small_files import read_text
from kvrun.convert.tensors import StoredTensor
from kvrun.convert.token_ids import token_ids
from kvrun.convert.views import ShiftedTensor, TransposedTensor
from kvrun.errors import ConvertError, one_line
from kvrun.files.description import ModelDescription

_T = TypeVar("_T")
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
# In models of text and images: tensors that are not part of the text model, and prefixes of those that are.
_NOT_TEXT = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector|image_newline)(?=\.|$)")
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")


def open_folder(folder: str, tokenizer: bool) -> Checkpoint:
    """The checkpoint in `folder`. Raises ConvertError if anything is missing, damaged or not supported."""
    refuse_other_folders(folder)
    config = read_json(folder, "config.json")
    if config is None:
        raise ConvertError(f"{folder}: no config.json: not a Hugging Face checkpoint")
    family, text = family_of_config(config), text_config(config)
    block = fp8_block(config, text)
    refuse_other_attention(text)
    name = _model_name(folder)
    description = describe(text.where, {"architecture": family.architecture, "name": name, **family.from_config(text)})
    wanted = list(family.source_names(description, HF))
    prefixes = (family.hf_prefix, "") if text is config else (*_TEXT_PREFIXES, "")
    stored, absent = _read_headers(folder)
    outer = outer_prefix([*stored, *absent], wanted[0][1], family.hf_prefix) if text is config else ""
    stored, absent = _without_prefix(stored, outer), _without_prefix(absent, outer)
    refuse_adapter(folder, stored)
    stored = with_factors(stored, block)
    refuse_quantised_weights(folder, stored, (theirs for _, theirs in wanted), prefixes)
    names = _names_of(wanted, family, stored, prefixes)
    _refuse_absent(folder, stored, wanted, family, names, absent, prefixes)
    available = {theirs: stored[name] for theirs, name in names.items()}
    _check_types(available)
    if not _is_tied(available, family, description, config):
        description = replace(description, tie_embeddings=False)
        wanted = list(family.source_names(description, HF))
    tensors = select_tensors(folder, _as_ours(available, wanted, family), wanted, description)
    if description.rotary_dim is not None:
        tensors = with_halves_apart(tensors, ROTARY, rotary_order(description))
    generation = read_json(folder, "generation_config.json")
    vocabulary = read_tokenizer(folder, config, generation, text) if tokenizer else Vocabulary("none", None, {})
    sampling, left_out = sampling_defaults(generation, "huggingface")
    return Checkpoint(
        form="Hugging Face",
        description=description,
        tensors=tensors,
        vocabulary=vocabulary,
        stop_ids=_stop_ids((generation, config) if text is config else (generation, config, text), vocabulary),
        chat_template=_chat_template(folder),
        sampling=sampling,
        files=tuple(
            sorted({tensor.path for tensor in tensors.values()} | {os.path.join(folder, f) for f in _SETTINGS})
        ),
        notes=(*_prefix_notes(outer), *left_out, *vocabulary.notes),
        surplus=(
            *_surplus_lines(surplus_of([*stored, *absent], set(names.values())), text is not config),
            *adapters_beside(folder),
        ),
    )


def _model_name(folder: str) -> str:
    """The folder's name, or in the hub's cache (models--ORG--NAME/snapshots/COMMIT) the model's."""
    path = os.path.abspath(folder)
    cached = re.search(r"models--(?:.*--)?([^/]+)/snapshots/[^/]+$", path)
    return cached[1] if cached else os.path.basename(path)


# --- weights


def _read_headers(folder: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """All tensors of the folder's safetensors files, by the names they have there; and those that the index names but
    that are not there, each with a line that says so."""
    files = _weight_files(folder)
    of_index = {name: file for file, names in files.items() for name in names or ()}
    tensors: dict[str, StoredTensor] = {}
    absent: dict[str, str] = {}
    for file, names in files.items():
        path = os.path.join(folder, file)
        if names and not os.path.lexists(path):
            says = f"{folder}: {file} is missing; the index says that it has tensor"
            absent.update((name, f"{says} {one_line(name)[:80]}") for name in names)
            continue
        found = read_safetensors_header(path)
        for name, tensor in found.items():
            if of_index.get(name, file) != file:
                continue
            if name in tensors:
                raise ConvertError(f"{path}: tensor {name} is also in {tensors[name].path}")
            tensors[name] = tensor
        for name in set(names or ()) - set(found):
            absent[name] = f"{path}: tensor {one_line(name)[:80]} is missing; the index says it is here"
    refuse_packed(folder, tensors)
    return tensors, absent


def _weight_files(folder: str) -> Mapping[str, list[str] | None]:
    """File names, each with the tensors to take from it (None: all), chosen as transformers chooses them."""
    if os.path.lexists(os.path.join(folder, "model.safetensors")):
        return {"model.safetensors": None}
    index = read_json(folder, "model.safetensors.index.json")
    if index is not None:
        return _files_of_index(folder, index)
    found = sorted(os.path.basename(p) for p in glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    weights = [name for name in found if not name.startswith("adapter")]
    if not weights:
        raise ConvertError(f"{folder}: no safetensors file with weights (model.safetensors)")
    if len(weights) == 1:
        return {weights[0]: None}
    for name in weights:
        if not re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name):
            raise ConvertError(f"{folder}: several safetensors files and no model.safetensors.index.json")
    total = int(weights[0][15:20])
    if len(weights) != total:
        raise ConvertError(f"{folder}: {len(weights)} of {total} safetensors files are there; download the others")
    return dict.fromkeys(weights)


def _files_of_index(folder: str, index: Fields) -> Mapping[str, list[str] | None]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return index.fail("weight_map", "missing or empty")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or len(file) > 255 or os.path.basename(file) != file:
            return index.fail("weight_map", f"{shown(file)} is not a file name")
        files.setdefault(file, []).append(name)
    return files


def _without_prefix(tensors: Mapping[str, _T], outer: str) -> dict[str, _T]:
    """The same under names without the prefix `outer` (and what wrappers add), where they have it."""
    plain = {name: unwrapped(name) if outer else name for name in tensors}
    return {
        plain[name].removeprefix(outer) if plain[name].startswith(outer) else name: tensor
        for name, tensor in tensors.items()
    }


def _prefix_notes(outer: str) -> tuple[str, ...]:
    return (f"names of tensors are taken without {one_line(outer)[:80]}, which is before them",) if outer else ()


def _names_of(
    wanted: list[tuple[str, str]], family: Family, stored: Iterable[str], prefixes: tuple[str, ...]
) -> dict[str, str]:
    """The names that the wanted tensors, and the head even if it is not wanted, have in the checkpoint."""
    head = family.names["head"][HF] + ".weight"
    others = [theirs for _, theirs in wanted if theirs != head]
    return stored_names(stored, others, prefixes) | stored_names(stored, [head], ("", *prefixes))


def _refuse_absent(
    folder: str,
    stored: Mapping[str, StoredTensor],
    wanted: list[tuple[str, str]],
    family: Family,
    names: Mapping[str, str],
    absent: Mapping[str, str],
    prefixes: tuple[str, ...],
) -> None:
    """Raise ConvertError for a tensor that is wanted and not there, though the index names it; or if all have other
    names."""
    if stored and not names:
        raise ConvertError(
            f"{folder}: no tensor has a name of a {family.hf_class}; there is {one_line(min(stored))[:80]} "
            f"and not {prefixes[0]}{wanted[0][1]}"
        )
    gone = _names_of(wanted, family, absent, prefixes)
    for _, theirs in wanted:
        if theirs not in names and theirs in gone:
            raise ConvertError(absent[gone[theirs]])


def _surplus_lines(surplus: list[str], multimodal: bool) -> tuple[str, ...]:
    parts = {name: match[2] for name in surplus if multimodal and (match := _NOT_TEXT.match(name))}
    others = [name for name in surplus if name not in parts]
    lines = [surplus_line(others)] if others else []
    if parts:
        kinds = ", ".join(sorted(set(parts.values())))
        lines.insert(0, f"{len(parts)} tensors that are not part of the text model ({kinds})")
    return tuple(lines)


def _as_ours(
    available: dict[str, StoredTensor], wanted: list[tuple[str, str]], family: Family
) -> dict[str, StoredTensor]:
    """The tensors as [outputs, inputs], and norms with the offset that the model adds to them."""
    result = dict(available)
    for ours, theirs in wanted:
        tensor = available.get(theirs)
        if tensor is None:
            continue
        if family.hf_transposed and ours.startswith("layers.") and len(tensor.shape) == 2:
            result[theirs] = TransposedTensor.of(tensor)
        elif family.hf_norm_offset and ours.endswith("norm.weight") and len(tensor.shape) == 1:
            result[theirs] = ShiftedTensor.of(tensor, family.hf_norm_offset)
    return result


def _check_types(available: Mapping[str, StoredTensor]) -> None:
    for tensor in available.values():
        if tensor.type not in DTYPES.values():
            raise ConvertError(
                f"{tensor.path}: tensor {tensor.name} has type {tensor.type[:40]}, which is not supported "
                f"yet (supported: {', '.join(DTYPES)})"
            )


def _is_tied(
    available: Mapping[str, StoredTensor], family: Family, description: ModelDescription, config: Fields
) -> bool:
    """Whether the output head is the embedding. A head that is another one counts, unless the config says that there is
    none: then the older versions of transformers do without it, newer ones do not, and ConvertError is raised."""
    embed, head = (family.names[name][HF] + ".weight" for name in ("embed", "head"))
    if embed not in available or head not in available:
        if embed in available and not description.tie_embeddings:
            raise ConvertError(
                f"{config.where}: tensor {head} is missing, and tie_word_embeddings is not true: "
                "without an output head this is no language model"
            )
        return description.tie_embeddings
    if not description.tie_embeddings or _equal(available[embed], available[head]):
        return description.tie_embeddings
    if "tie_word_embeddings" in config:
        config.fail("tie_word_embeddings", f"true, but {head} differs from {embed}; set it to false to use both")
    return False


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape or len(a.shape) != 2:
        return False
    return (a.path, a.offset) == (b.path, b.offset) or all(
        np.array_equal(a.floats(start, stop), b.floats(start, stop)) for start, stop in a.slabs()
    )


# --- settings


def _stop_ids(sources: tuple[Fields | None, ...], vocabulary: Vocabulary) -> list[int]:
    ids = vocabulary.stops()
    if vocabulary.info.get("eos_id") is not None:
        ids.append(vocabulary.info["eos_id"])
    for source in sources:
        if source is not None:
            ids += token_ids(source, "eos_token_id")
    return ids


def _chat_template(folder: str) -> str | None:
    """The default chat template: chat_template.jinja, chat_template.json, or in tokenizer_config.json."""
    text = read_text(folder, "chat_template.jinja")
    if text is not None:
        return text
    for name in ("chat_template.json", "tokenizer_config.json"):
        source = read_json(folder, name)
        if source is None:
            continue
        template = source.get("chat_template")
        if isinstance(template, str):
            return template
        if template is not None:
            return _named_template(source, template)
    return None


def _named_template(source: Fields, templates: Any) -> str | None:
    """The template called "default", if there are several with names."""
    if isinstance(templates, list) and templates and all(isinstance(entry, dict) for entry in templates):
        pairs = [(entry.get("name"), entry.get("template")) for entry in templates]
        if all(isinstance(text, str) for pair in pairs for text in pair):
            return dict(pairs).get("default", pairs[0][1] if len(pairs) == 1 else None)
    return source.fail("chat_template", "neither a text nor a list of named templates")
