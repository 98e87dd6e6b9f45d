"""Defaults of sampling that checkpoints recommend, in generation_config.json or in GGUF metadata."""

from __future__ import annotations

from kvrun.convert.fields import Fields
from kvrun.errors import OptionError, one_line
from kvrun.options import SamplingKeywords, declared, saved_names


def sampling_defaults(source: Fields | None, form: str) -> tuple[dict[str, float], list[str]]:
    """The defaults by the options' names, and a line about each that the option cannot have: it is left out, since
    nothing could be generated with it. `form` says whose names `source` uses, "huggingface" or "gguf"."""
    values: dict[str, float] = {}
    notes: list[str] = []
    for ours, theirs in saved_names(form).items():
        value = source.get(theirs) if source is not None else None
        if value is None:
            continue
        try:
            values[ours] = declared(SamplingKeywords)[ours].check(value)
        except OptionError as error:
            where = theirs if theirs != ours else "the checkpoint"
            notes.append(f"left out: a default of {where}, {one_line(str(error))[:120]}")
    return values, notes
