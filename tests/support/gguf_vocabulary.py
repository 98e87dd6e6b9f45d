"""Vocabularies as GGUF metadata have them, with some of their values changed."""

from __future__ import annotations

from typing import Any


def changed(vocabulary: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The vocabulary with other values under some keys (null: none); `types` and `texts` replace those of some tokens,
    `more` are further tokens with their types."""
    values = {key: list(value) if isinstance(value, list) else value for key, value in vocabulary.items()}
    changes = dict(changes)
    for text, kind in changes.pop("more", {}).items():
        values["tokens"].append(text)
        values["token_type"].append(kind)
        if "scores" in values:
            values["scores"].append(0.0)
    for old, kind in changes.pop("types", {}).items():
        values["token_type"][values["tokens"].index(old)] = kind
    for old, text in changes.pop("texts", {}).items():
        values["tokens"][values["tokens"].index(old)] = text
    return {key: value for key, value in {**values, **changes}.items() if value is not None}
