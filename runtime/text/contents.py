"""What messages say: given to a template as the text or the list of parts that it takes, and found again in the result.

Most templates write `message.content`, a str. Those of models that also see walk through it as a list of parts,
`{"type": "text", "text": ...}`, and make nothing of a str, often without an error; some take one in one role and the
other in another. Which it is, a conversation of words that stand nowhere else shows.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from kvrun.errors import OptionError
from kvrun.text.special_tokens import ESCAPE
from kvrun.text.thinking import answer_of

TEXT, PARTS = "text", "parts"
_ROLES = ("system", "user", "assistant")
# The longest first: what it shows, the others need not.
_SHAPES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("system", "user"), ("user",))


class ContentKinds:
    """Which kinds of content a template takes, found out with `render`: messages to text, None if it refuses them."""

    def __init__(self, render: Callable[[list[dict[str, Any]]], str | None]) -> None:
        self._render = render
        self._taken = {kind: self._shown(dict.fromkeys(_ROLES, kind)) for kind in (TEXT, PARTS)}
        # Some templates fail unless each of the roles has the kind that it needs.
        best = {role: TEXT if role in self._taken[TEXT] else PARTS for role in _ROLES}
        for role in _ROLES:
            for kind in (TEXT, PARTS):
                if not any(role in taken for taken in self._taken.values()):
                    self._taken[kind] |= {role} & self._shown({**best, role: kind})

    def _shown(self, kinds: Mapping[str, str]) -> set[str]:
        """The roles whose words come out when each has its kind of content."""
        shown: set[str] = set()
        for shape in _SHAPES:
            if shown.issuperset(shape):
                continue
            words = [f"{role}word{number}" for number, role in enumerate(shape)]
            pairs = list(zip(shape, words, strict=True))
            messages = [{"role": role, "content": _as_kind(word, kinds[role])} for role, word in pairs]
            text = self._render(messages) or ""
            hidden = {role for role, word in pairs if word not in text or _printed(word, text)}
            shown |= set(shape) - hidden
        return shown

    def takes(self, role: str, kind: str) -> bool:
        """Whether a message of a role may have content of a kind. Roles that are not usual are like the user's."""
        return (role if role in _ROLES else "user") in self._taken[kind]

    def fitted(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message with the kind of content that the template takes; as it is if it takes neither."""
        role, content = message.get("role", ""), message.get("content")
        if isinstance(content, str) and not self.takes(role, TEXT) and self.takes(role, PARTS):
            return {**message, "content": _as_kind(content, PARTS)}
        if isinstance(content, (list, tuple)):
            as_text = self.takes(role, TEXT) and not self.takes(role, PARTS)
            parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
            return {**message, "content": "\n".join(texts(parts)) if as_text else parts}
        return dict(message)


def _as_kind(text: str, kind: str) -> Any:
    return text if kind == TEXT else [{"type": "text", "text": text}]


def _printed(word: str, text: str) -> bool:
    """Whether a list of parts was written as Python or JSON writes one, instead of what is in it."""
    return re.search(rf"""["']text["']\s*:\s*["']{word}""", text) is not None


def texts(content: Any) -> Iterator[str]:
    """The texts of a content of either kind. What else is in a list, such as an image, has none."""
    for part in [content] if isinstance(content, str) else content if isinstance(content, (list, tuple)) else ():
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, str):
            yield text


def with_own_words(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[int, list[str]]]:
    """(the conversation with a word of its own in place of each text, the words by the number of the message).

    Answers stay as they are: templates look for their parts, and leave some of them out.
    """
    words: dict[int, list[str]] = {}

    def word(number: int, text: str) -> str:
        if not text.strip():
            return text
        words.setdefault(number, [])
        words[number].append(f"w{number}p{len(words[number])}e")
        return words[number][-1]

    def named(number: int, content: Any) -> Any:
        if isinstance(content, str):
            return word(number, content)
        if not isinstance(content, (list, tuple)):
            return content
        return [
            {**part, "text": word(number, part["text"])}
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]

    asked = [message.get("role") != "assistant" for message in messages]
    return [
        {**message, "content": named(number, message.get("content"))} if asked[number] else dict(message)
        for number, message in enumerate(messages)
    ], words


def first_lost(
    messages: Sequence[Mapping[str, Any]],
    rendered: str,
    words: Mapping[int, Sequence[str]] | None = None,
    with_words: str | None = None,
) -> int | None:
    """The number (from 0) of the first message with a text that is not in a rendered conversation; None if all are.

    `words`, `with_words`: those of `with_own_words`, and what the template makes of them. A short text may stand in a
    conversation that does not have the message; a word of its own does not.

    Templates trim messages, take switches such as /no_think out of a text, and write JSON, HTML or capitals. Of an
    answer they leave out the thinking, often what stands beside tool calls, and tags that the model writes around its
    parts.
    """
    rendered = rendered.replace(ESCAPE, "")
    shown = None if with_words is None else with_words.replace(ESCAPE, "").casefold()
    for number, message in enumerate(messages):
        answer = message.get("role") == "assistant"
        if answer and message.get("tool_calls"):
            continue
        if shown is not None and not all(word in shown for word in (words or {}).get(number, ())):
            return number
        for text in texts(message.get("content")):
            said = (answer_of(text) if answer else text).replace(ESCAPE, "").strip()
            if not (said in rendered or _words_are_in(said, rendered, any if answer else all)):
                return number
    return None


def _words_are_in(text: str, rendered: str, enough: Callable[[Iterable[bool]], bool]) -> bool:
    """Whether the words of a text, without what stands between them, are in a rendered one in one of the ways in which
    templates write them."""
    written = html.unescape(rendered)
    written += written.casefold()
    said = [word for word in text.split() if not word.startswith("/")]
    words = dict.fromkeys(word for part in said for word in re.findall(r"\w+", part))
    return not words or enough(any(way in written for way in _ways(word)) for word in words)


def _ways(word: str) -> Iterator[str]:
    yield word.casefold()
    yield word.upper()
    yield json.dumps(word)[1:-1]
    yield quote(word)


def check_content(content: Any, where: str) -> None:
    """OptionError if a list of parts has one that is not text."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind == "thinking" or isinstance(part.get("text") if isinstance(part, Mapping) else part, str):
            continue
        raise OptionError(f"{where}: a part of type {kind!r:.40} cannot be used, only text can")
