"""The thinking of reasoning models, told apart from the answer by the marks around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrun.text.special_tokens import SpecialTokens
from kvrun.text.streaming import overlap


@dataclass(frozen=True)
class Marks:
    """What a model writes before and after its thinking. `tokens`: the special tokens that the marks may be made of,
    if they are not such tokens themselves."""

    open: str
    close: str
    tokens: tuple[str, ...] = ()


_CHANNEL = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")
_BEGIN = ("<|think|>", "<|content|>", "<|begin|>", "<|end|>")
MARKS = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<thinking>", "</thinking>"),
    Marks("<thought>", "</thought>"),
    Marks("<reasoning>", "</reasoning>"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<mm:think>", "</mm:think>"),
    Marks("<longcat_think>", "</longcat_think>"),
    Marks("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<|begin_of_thought|>", "<|end_of_thought|>"),
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),
    Marks("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>", _CHANNEL),
    Marks("<|channel|>final<|message|>", "", _CHANNEL),  # the answer begins at once
    Marks("<|think|>", "<|end|><|begin|>assistant<|content|>", _BEGIN),
    Marks("<|content|>", "", _BEGIN),
    Marks("<|channel>thought\n", "<channel|>", ("<|channel>", "<channel|>")),
)
"""The marks of Qwen, DeepSeek and most others; Magistral; Seed; MiniMax; LongCat; Kimi-VL; Command A; OpenThinker;
Apertus; gpt-oss; Solar; Gemma 4."""
_OPENS = tuple(marks.open for marks in MARKS)
_CLOSES = tuple(marks.close for marks in MARKS if marks.close)


def special_marks(special: SpecialTokens) -> tuple[Marks, ...]:
    """The marks that are special tokens of a vocabulary, or made of them."""
    return tuple(marks for marks in MARKS if all(n in special.ids for n in marks.tokens or (marks.open, marks.close)))


def mark_tokens(special: SpecialTokens) -> frozenset[int]:
    """The special tokens that marks are made of: they have to be seen for the thinking to be told apart."""
    names = {name for marks in special_marks(special) for name in marks.tokens or (marks.open, marks.close)}
    return frozenset(special.ids[name] for name in names)


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered conversation ends inside thinking that the answer continues."""
    return prompt.rstrip().endswith(tuple(marks.open.rstrip() for marks in MARKS if marks.close))


class Thinking:
    """Separates the thinking at the beginning of an answer, `<think>...</think>` for one, from the answer itself.

    The marks count as thinking. `inside`: the prompt has already opened it, so any closing mark ends it. Text that may
    be part of a mark is held back.
    """

    def __init__(self, inside: bool = False) -> None:
        self._begun = inside
        self._closes: tuple[str, ...] = _CLOSES if inside else ()  # the marks of which one comes next
        self._held = ""

    def push(self, piece: str) -> list[tuple[str, bool]]:
        """The text that may be shown now, in parts: (text, whether it is thinking)."""
        text, self._held = self._held + piece, ""
        parts: list[tuple[str, bool]] = []
        if not self._begun:
            text = self._open(text, parts)
        if self._closes:
            text = self._close(text, parts)
        parts.append((text, False))
        return [part for part in parts if part[0]]

    def _open(self, text: str, parts: list[tuple[str, bool]]) -> str:
        start = text.lstrip()
        parts.append((text[: len(text) - len(start)], False))
        if any(mark.startswith(start) and mark != start for mark in _OPENS):
            self._held = start
            return ""
        self._begun = True
        for marks in MARKS:
            if start.startswith(marks.open):
                parts.append((marks.open, True))
                self._closes = (marks.close,) if marks.close else ()
                return start[len(marks.open) :]
        return start

    def _close(self, text: str, parts: list[tuple[str, bool]]) -> str:
        found = [(at, at + len(mark)) for mark in self._closes if (at := text.find(mark)) >= 0]
        if found:
            self._closes = ()
            end = min(found)[1]
            parts.append((text[:end], True))
            return text[end:]
        keep = max(overlap(text, mark) for mark in self._closes)
        self._held = text[len(text) - keep :]
        parts.append((text[: len(text) - keep], True))
        return ""

    def finish(self) -> list[tuple[str, bool]]:
        """What was held back at the end."""
        held, self._held = self._held, ""
        return [(held, bool(self._closes))] if held else []


def answer_of(text: str) -> str:
    """What the text of an answer says after its thinking; all of it if it has none."""
    ends = [at + len(mark) for mark in _CLOSES if (at := text.rfind(mark)) >= 0]
    return text[max(ends) :] if ends else text


def separated(text: str, marks: Sequence[Marks]) -> tuple[str, str] | None:
    """(thinking, answer) of the text of an answer, without the marks; None if it has none of them.

    The opening mark may be missing, since some prompts end with it; and the closing mark, where the answer was cut off.
    """
    for mark in marks:
        before, close, after = text.partition(mark.close) if mark.close else ("", "", text)
        if close:
            return before.strip().removeprefix(mark.open).strip("\n"), after.lstrip("\n")
        if text.lstrip().startswith(mark.open):
            rest = text.lstrip().removeprefix(mark.open)
            return (rest.strip("\n"), "") if mark.close else ("", rest)
    return None


def opened(prompt: str, answer: str) -> str:
    """The text of an answer to a rendered conversation: with the opening mark, if it ends inside the thinking that the
    conversation has opened."""
    for marks in MARKS if answer and opens_thinking(prompt) else ():
        mark = marks.open.rstrip()
        if marks.close and prompt.rstrip().endswith(mark):
            return answer if marks.close in answer else prompt[prompt.rindex(mark) :] + answer
    return answer
