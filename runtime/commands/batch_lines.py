"""Lines of `kvrun batch`: what each asks for, and the records that its answer or its error becomes."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

from kvrun.commands import openai_forms
from kvrun.commands.arguments import LONGEST_TEXT, utf8
from kvrun.errors import OptionError
from kvrun.options import StreamKeywords, declared, shown

if TYPE_CHECKING:
    from kvrun.request import GenerationResult

Key = str | int | tuple[str, int]
"""What tells lines apart: custom_id, or ("line", number)."""


class Line:
    """A plain line: a prompt or messages, with options of `Session.stream` beside it. `number` counts from 1."""

    def __init__(self, number: int, entry: dict[str, Any]) -> None:
        self.number, self.entry = number, entry
        self._given_id = entry.get("custom_id")
        self.custom_id = _usable(self._given_id)

    @property
    def key(self) -> Key:
        return ("line", self.number) if self.custom_id is None else self.custom_id

    def request(self) -> tuple[str | list[Any], dict[str, Any]]:
        """The prompt and the options that are given. OptionError for what cannot be answered, as far as that can be
        said without a model."""
        if self.custom_id is None and self._given_id is not None:
            raise OptionError(f"custom_id: must be text or a whole number, not {shown(self._given_id)}")
        prompt, options = self._request()
        spec = options.get("spec")
        if spec is not None and not (isinstance(spec, str) and spec in ("ngram", "none")):
            raise OptionError(f"spec: a line can have ngram or none, a model only the command, not {shown(spec)}")
        return prompt, options

    def _request(self) -> tuple[str | list[Any], dict[str, Any]]:
        known = declared(StreamKeywords)
        options = {name: value for name, value in self.entry.items() if name in known}
        for name in self.entry:
            if name not in known and name not in ("prompt", "messages", "custom_id"):
                raise OptionError(f"{shown(name)} is not an option; there is {', '.join(known)}")
        prompt, messages = self.entry.get("prompt"), self.entry.get("messages")
        if (prompt is None) == (messages is None):
            raise OptionError("a line needs a prompt or messages" + ("" if prompt is None else ", and not both"))
        return (openai_forms.conversation(messages) if prompt is None else prompt), options

    def answer(self, result: GenerationResult, model: str) -> dict[str, Any]:
        """The record of an answer by the model of this name."""
        record = {"text": result.text, "finish_reason": result.finish_reason, "usage": openai_forms.usage(result.stats)}
        return {**self._name(), **record}

    def error(self, message: str) -> dict[str, Any]:
        return {**self._name(), "error": {"message": message}}

    def _name(self) -> dict[str, Any]:
        return {"line": self.number} if self.custom_id is None else {"custom_id": self.custom_id}


class OpenAILine(Line):
    """A line of OpenAI's batch format: `custom_id`, `method`, `url` and `body`."""

    def _request(self) -> tuple[str | list[Any], dict[str, Any]]:
        if self.entry.get("method", "POST") != "POST":
            raise OptionError(f"method: must be POST, not {shown(self.entry['method'])}")
        url = self.entry.get("url")
        if url not in openai_forms.URLS:
            raise OptionError(f"url: must be {' or '.join(openai_forms.URLS)}, not {shown(url)}")
        return openai_forms.request(url, self.entry.get("body"))

    def answer(self, result: GenerationResult, model: str) -> dict[str, Any]:
        asked = self.entry["body"].get("model")
        name = asked if isinstance(asked, str) else model
        return self._record(200, openai_forms.response(self.entry["url"], name, result))

    def error(self, message: str) -> dict[str, Any]:
        return self._record(400, openai_forms.error(message))

    def _record(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
        name = {"custom_id": self.custom_id, **self._name()}
        return {"id": f"batch_req_{uuid.uuid4().hex}", **name, "response": response, "error": None}


def read_line(data: bytes, number: int) -> Line:
    """A line that is not blank. OptionError if it is no JSON object."""
    if len(data) > LONGEST_TEXT:
        raise OptionError(f"the line is longer than {LONGEST_TEXT >> 20} MiB")
    text = utf8(data, "the line")
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise OptionError(f"the line is not JSON: {what}") from None
    if not isinstance(entry, dict):
        raise OptionError(f"the line is not a JSON object, but {shown(entry)}")
    return OpenAILine(number, entry) if "url" in entry or "body" in entry else Line(number, entry)


def answered_key(data: bytes) -> Key | None:
    """Which line a record answers; None if it is an error. OptionError for what is no record, ValueError for what is no
    JSON, such as a part of a record."""
    try:
        record = json.loads(data)
    except RecursionError:
        record = None
    if not isinstance(record, dict) or not {"text", "error"} & record.keys():
        raise OptionError("not a record")
    key: Key | None = _usable(record.get("custom_id"))
    if key is None:
        if not isinstance(record.get("line"), int):
            raise OptionError("not a record")
        key = ("line", record["line"])
    response = record.get("response")
    answered = "text" in record or (isinstance(response, dict) and response.get("status_code") == 200)
    return key if answered else None


def _usable(custom_id: Any) -> str | int | None:
    """A custom_id if it can be one."""
    return custom_id if isinstance(custom_id, (str, int)) and not isinstance(custom_id, bool) else None
