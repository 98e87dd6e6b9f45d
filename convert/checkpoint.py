"""A checkpoint as the converter sees it, whatever its form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvrun.convert.fields import valid
from kvrun.convert.tensors import StoredTensor
from kvrun.convert.token_ids import ends_of_turn
from kvrun.convert.views import rows_of
from kvrun.errors import ConvertError, ModelFileError
from kvrun.files.description import ModelDescription

_NAMED = ("bos_id", "eos_id", "pad_id", "unk_id")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer file as it goes into the model file, and what else the runtime must know about it."""

    kind: str
    data: bytes | None
    info: dict[str, Any]
    special: Mapping[str, int] = field(default_factory=dict)
    """Special tokens by text."""
    notes: tuple[str, ...] = ()
    """One line for each thing that is not as the checkpoint says."""
    ends: tuple[int, ...] = ()
    """Further tokens that end a turn or a text."""
    size: int = 0
    """How many tokens the tokenizer has; 0 if that is not known."""

    def model_entry(self, vocab_size: int) -> dict[str, Any]:
        """The model file's `tokenizer` entry. Ids beyond the embedding are dropped: no token has them."""
        info: dict[str, Any] = {"kind": self.kind, "add_bos": False, "add_eos": False}
        info |= dict.fromkeys(_NAMED)
        info |= self.info
        for key in _NAMED:
            if info[key] is not None and info[key] >= vocab_size:
                info[key] = None
        return info

    def without_rows(self, vocab_size: int, stop_ids: Iterable[int]) -> list[str]:
        """One line for each thing that is left out since the embedding has only `vocab_size` rows."""
        notes = []
        if self.size > vocab_size:
            notes.append(
                f"{self.size - vocab_size} of the tokenizer's {self.size} tokens left out, since the embedding has "
                f"{vocab_size} rows: their text is made of other tokens"
            )
        entry = self.model_entry(vocab_size)
        named = {key: self.info[key] for key in _NAMED if self.info.get(key) is not None and entry[key] is None}
        stops = sorted({token for token in stop_ids if token >= vocab_size} - {*named.values()})
        if named or stops:
            ids = ", ".join([*(f"{key} {token}" for key, token in named.items()), *map("stop id {}".format, stops)])
            notes.append(f"left out, since the embedding has {vocab_size} rows: {ids}")
        return notes

    def stops(self) -> list[int]:
        return [*ends_of_turn(self.special), *self.ends]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read, but for the tensors' data.

    `tensors` maps our names, in file order, to where the values are; all shapes have been checked. `files` are the
    files that the checkpoint consists of.
    """

    form: str
    description: ModelDescription
    tensors: dict[str, StoredTensor]
    vocabulary: Vocabulary
    stop_ids: list[int]
    chat_template: str | None
    sampling: dict[str, float]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """One line for each thing that was left out, or is not as the checkpoint says."""
    surplus: tuple[str, ...] = ()
    """One line for each kind of tensors that the model does not need and that are left out."""


def describe(where: str, values: Mapping[str, Any]) -> ModelDescription:
    """The description from a family's values. Raises ConvertError, which names the file, if they are contradictory."""
    try:
        return ModelDescription(**{**values, "name": valid(values["name"])})
    except ModelFileError as error:
        raise ConvertError(f"{where}: {error}") from None


def select_tensors(
    where: str,
    available: Mapping[str, StoredTensor],
    wanted: Iterable[tuple[str, str]],
    description: ModelDescription,
) -> dict[str, StoredTensor]:
    """The tensors of the model under our names. If several of ours have the same name there, each takes its share of
    the rows. Raises ConvertError if a tensor is missing or has the wrong shape."""
    wanted, shapes = list(wanted), description.tensor_shapes()
    chosen: dict[str, StoredTensor] = {}
    missing = list(dict.fromkeys(theirs for _, theirs in wanted if theirs not in available))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConvertError(f"{where}: tensor {missing[0]} is missing{more}")
    parts: dict[str, list[str]] = {}
    for ours, theirs in wanted:
        parts.setdefault(theirs, []).append(ours)
    for theirs, names in parts.items():
        tensor = available[theirs]
        rows = [shapes[name][0] for name in names]
        shape = (sum(rows), *shapes[names[0]][1:])
        if tensor.shape != shape:
            raise ConvertError(
                f"{where}: tensor {theirs} has shape {list(tensor.shape)}, but the config says {list(shape)}"
            )
        for i, name in enumerate(names):
            start = sum(rows[:i])
            chosen[name] = tensor if len(names) == 1 else rows_of(tensor, start, start + rows[i])
    return {ours: chosen[ours] for ours, _ in wanted}


ROTARY = ("attn.q", "attn.k", "attn.q_norm", "attn.k_norm")
"""The tensors whose rows (or values) are the channels of a head, in the order of its rotary pairs."""


def with_halves_apart(
    tensors: dict[str, StoredTensor], stems: tuple[str, ...], order: tuple[int, ...]
) -> dict[str, StoredTensor]:
    """These tensors with their rows in the model file's order: row i of a head is the one stored at order[i]."""
    return {
        name: tensor.with_rows_from(order) if name.rpartition(".")[0].endswith(stems) else tensor
        for name, tensor in tensors.items()
    }


def rotary_order(description: ModelDescription) -> tuple[int, ...]:
    """Where the rows of a head are stored if only the first `rotary_dim` of them turn. The two rows of a pair are half
    of `rotary_dim` apart there and half a head apart here, so the rows that do not turn fill up both halves."""
    size, width = description.head_dim, description.rotary_dim or description.head_dim
    middle = width + (size - width) // 2
    return (*range(width // 2), *range(width, middle), *range(width // 2, width), *range(middle, size))
