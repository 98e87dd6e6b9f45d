"""Chat templates: messages in, the text a model was trained on out.

Templates come with the checkpoint, so they are rendered in a sandbox (`kvrun.text.sandbox`), which keeps them from
the rest of Python, and their work and memory within bounds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from kvrun.errors import KvrunError, OptionError
from kvrun.text.budget import Budget, LimitError, limited
from kvrun.text.contents import ContentKinds, check_content, first_lost, texts, with_own_words
from kvrun.text.thinking import separated, special_marks

if TYPE_CHECKING:
    from kvrun.text.special_tokens import SpecialTokens

Message = Mapping[str, Any]
_SWITCHES: dict[str, tuple[Any, Any]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning": (True, False),
    "thinking_budget": (512, 0),
}
"""Variables by which templates tell a model to think, and not to."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message may hold its thinking."""


class ChatTemplate:
    """A model's chat template.

    `tokens` are the variables that name special tokens (`bos_token`, `eos_token`). With `special`, the text
    of messages is escaped (see `SpecialTokens.escape`), so that what a person types stays ordinary text
    whatever special tokens it spells. Raises KvrunError if the template cannot be used.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str] | None = None, special: SpecialTokens | None = None
    ) -> None:
        self._source = source
        self._tokens = dict(tokens or {})
        self._special = special
        try:
            self._template = _sandbox().compiled(source)
        except Exception as error:
            raise KvrunError(_report("cannot be used", error)) from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation, ready for the answer.

        What a message says is given as the text or the list of parts that the template takes. KvrunError if the
        template refuses the conversation, or leaves out what one of its messages says.
        """
        fitted = self._fitted(messages)
        variables = {**self._tokens, "add_generation_prompt": add_generation_prompt, **variables}
        text = self._render(self._escaped(fitted), variables)
        named, words = with_own_words(fitted)
        lost = first_lost(fitted, text, words, self._tried(self._escaped(named), variables))
        if lost is not None:
            raise KvrunError(
                f"the model's chat template leaves out what message {lost + 1} says (role {messages[lost]['role']!r}); "
                "--raw does without it"
            )
        return text

    def with_another_end(self, messages: Sequence[Message], **variables: Any) -> str | None:
        """A conversation as `render` makes it, but that the last message says something else, from its first character
        on; None if the template refuses it."""
        *before, last = messages
        other = "?" if "".join(texts(last.get("content"))).lstrip()[:1] != "?" else "!"
        fitted = self._fitted([*before, {**last, "content": other}])
        return self._tried(self._escaped(fitted), {**self._tokens, "add_generation_prompt": True, **variables})

    def _fitted(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [self._kinds.fitted(self._separated(message)) for message in messages]

    def _escaped(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [_with_reasoning(self._message(message)) for message in messages]

    def _tried(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str | None:
        """A rendered conversation, None if the template refuses it."""
        try:
            return self._text(messages, variables, Budget(messages))
        except Exception:
            return None

    def _render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        budget = None
        try:
            budget = Budget(messages)
            return self._text(messages, variables, budget)
        except Exception as error:
            reason = None if budget is None else self._lacking(messages, variables, budget, error)
            raise KvrunError(_report("fails on this conversation", error, reason)) from None

    def _text(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], budget: Budget) -> str:
        with limited(budget):
            values = {"messages": messages, "tools": None, "documents": None, **variables}
            text: str = self._template.render(values)
        return text

    def _lacking(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any], budget: Budget, error: Exception
    ) -> str | None:
        """What the template needs and does not get here, if that is why it fails."""
        name = re.fullmatch(r"'(\w+)' is undefined", str(error))
        if name:
            return f"it needs {name[1]!r}, which is not given here"
        if isinstance(error, TypeError) and "NoneType" in str(error):
            try:
                self._text(messages, {**variables, "tools": []}, budget)
            except Exception:
                return None
            return "it is for answers with tools, which are not given here"
        return None

    @cached_property
    def without_thinking(self) -> dict[str, Any]:
        """The variables that tell the model not to think; none if the template has no such variable."""
        named = {name: values for name, values in _SWITCHES.items() if re.search(rf"\b{name}\b", self._source)}
        # The other names may as well be those of a message's keys.
        return {
            name: off
            for name, (on, off) in named.items()
            if name == "enable_thinking" or self._probed({name: on}) != self._probed({name: off})
        }

    def _probed(self, variables: Mapping[str, Any]) -> str | None:
        return self._probe([{"role": "user", "content": "Why?"}], variables)

    def _probe(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str | None:
        """A rendered conversation, None if the template refuses it. KvrunError if it takes more than all probes may."""
        values = {**self._tokens, "add_generation_prompt": True, **variables}
        try:
            return self._text(messages, values, self._probing)
        except LimitError as error:
            raise KvrunError(_report("cannot be used", error)) from None
        except Exception:
            return None

    @cached_property
    def _probing(self) -> Budget:
        return Budget([])

    @cached_property
    def _kinds(self) -> ContentKinds:
        return ContentKinds(lambda messages: self._probe(messages, {}))

    def escape(self, text: str) -> str:
        """Text as it appears in a rendered conversation if the template does not change it."""
        return self._special.escape(text) if self._special else text

    def _separated(self, message: Message) -> Message:
        """An answer with its thinking apart if special tokens mark it: as text the marks would be ordinary text, which
        no template looks for."""
        content = message.get("content")
        if message.get("role") != "assistant" or not isinstance(content, str) or self._special is None:
            return message
        parts = separated(content, special_marks(self._special))
        if parts is None:
            return message
        thinking, answer = parts
        given = any(message.get(key) is not None for key in REASONING)
        return {**message, "content": answer} | ({} if given or not thinking else {"reasoning_content": thinking})

    def _message(self, message: Message) -> dict[str, Any]:
        # Templates test whether a key is there; None would be written as text.
        return {
            key: self._value(value, edges=key not in ("role", "type"))
            for key, value in message.items()
            if value is not None
        }

    def _value(self, value: Any, edges: bool = True) -> Any:
        if isinstance(value, str):
            # Templates make special tokens of roles ('<|' + role + '|>'), so a role's edges are left alone.
            return self._special.escape(value, edges) if self._special else value
        if isinstance(value, Mapping):
            return self._message(value)
        if isinstance(value, (list, tuple)):
            return [self._value(item) for item in value]
        return value


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its thinking, if it has any, under both of the keys that templates read."""
    thinking = next((message[key] for key in REASONING if key in message), None)
    return message if thinking is None else {"thinking": thinking, **message, "reasoning_content": thinking}


def check_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """A copy of a conversation that a program passed in. Raises OptionError if it is not a conversation."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise OptionError(f"message {number} must be a dict with role and content, not {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise OptionError(f"message {number} has no role")
        calls = content is None and message.get("tool_calls")  # the only kind of message that may have no content
        if not (isinstance(content, (str, list)) or calls) or not all(isinstance(key, str) for key in message):
            raise OptionError(f"message {number} has no content that is text")
        check_content(content, f"message {number}")
    return [dict(message) for message in messages]


@cache
def _sandbox() -> Any:
    from kvrun.text.sandbox import Sandbox

    return Sandbox()


def _report(what: str, error: Exception, reason: str | None = None) -> str:
    reason = reason or (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, (RecursionError, MemoryError)):
        reason = "it is nested too deeply, or calls itself"
    line = getattr(error, "lineno", None)
    where = f" (line {line})" if line else ""
    return f"the model's chat template {what}{where}: {reason}; --raw does without it"
