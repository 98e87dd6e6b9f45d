"""Typed access to the values of a config file or of GGUF metadata, with errors that name the field."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from kvrun.convert.small_files import parse_json, read_text
from kvrun.errors import ConvertError

REQUIRED: Any = object()
MAX_LAYERS = 1 << 12
"""Models with more layers are refused before anything is allocated for each layer."""


def shown(value: Any) -> str:
    """A value as an error message shows it, shortened: a value in a file may be a megabyte long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def valid(text: str) -> str:
    """A name with ? for what is no Unicode: names of files may be any bytes, and those in a file too."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Fields:
    """Values under names; `where` (a file) and the name appear in errors. A null value counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self._values, self.where, self._prefix = values, where, prefix

    def under(self, prefix: str) -> Fields:
        """The same values, seen through names that start with `prefix`."""
        return Fields(self._values, self.where, prefix)

    def without(self, name: str) -> Fields:
        """The same fields without this one."""
        others = {key: value for key, value in self._values.items() if key != self._prefix + name}
        return Fields(others, self.where, self._prefix)

    def __contains__(self, name: str) -> bool:
        return self._values.get(self._prefix + name) is not None

    def names(self) -> list[str]:
        """The names that are there and not null."""
        cut = len(self._prefix)
        return [key[cut:] for key, value in self._values.items() if key.startswith(self._prefix) and value is not None]

    def given(self, name: str) -> bool:
        """Whether the name is there, even with a null value: for fields in which null differs from the default."""
        return self._prefix + name in self._values

    def or_else(self, name: str, value: Any) -> Fields:
        """The same fields, with `value` under `name` if there is none yet."""
        return self if name in self else Fields({**self._values, self._prefix + name: value}, self.where, self._prefix)

    def fail(self, name: str, reason: str) -> NoReturn:
        raise ConvertError(f"{self.where}: field {self._prefix}{name}: {reason}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(self._prefix + name)
        if value is not None:
            return value
        return self.fail(name, "missing") if default is REQUIRED else default

    def integer(self, name: str, default: Any = REQUIRED, minimum: int = 1, maximum: int = (1 << 31) - 1) -> Any:
        value = self.get(name, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # GGUF may have one number per layer
        if isinstance(value, list):
            return self.fail(name, "different values per layer are not supported yet")
        if value is default and name not in self:
            return value
        if type(value) is not int or not minimum <= value <= maximum:
            limit = f"to {maximum}" if type(value) is int and value > maximum else "up"
            return self.fail(name, f"{shown(value)} is not an integer from {minimum} {limit}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A positive number, as float."""
        value = self.get(name, default)
        if value is default and name not in self:
            return value
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            return self.fail(name, f"{shown(value)} is not a positive number")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.get(name, default)
        return value if isinstance(value, bool) else self.fail(name, f"{shown(value)} is neither true nor false")

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.get(name, default)
        if value is default and name not in self:
            return value
        return value if isinstance(value, str) else self.fail(name, f"{shown(value)} is not a text")

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        """What `choices` maps the text under `name` to. Any other text is refused with an error that names it."""
        value = self.text(name, default)
        if value not in choices:
            return self.fail(name, f"{shown(value)} is not supported yet (supported: {', '.join(choices)})")
        return choices[value]

    def section(self, name: str) -> Fields | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            return self.fail(name, "not a JSON object")
        return Fields(value, f"{self.where}: {self._prefix}{name}")

    def refuse(self, name: str, neutral: tuple[Any, ...], reason: str) -> None:
        """Raise ConvertError for any value but the `neutral` ones, since it would call for unsupported arithmetic."""
        if name in self and self.get(name) not in neutral:
            self.fail(name, f"{shown(self.get(name))}: {reason}")


def read_json(folder: str, name: str) -> Fields | None:
    """The JSON object in a file of the checkpoint folder; None if there is no such file."""
    text, path = read_text(folder, name), os.path.join(folder, name)
    return None if text is None else Fields(parse_json(text, path), path)
