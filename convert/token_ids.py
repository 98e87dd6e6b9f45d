"""Token ids as configs and GGUF metadata write them; the tokens that end a turn whatever their type."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from kvrun.convert.fields import Fields, shown

_ABSENT = (None, (1 << 32) - 1, (1 << 64) - 1)  # -1 as an unsigned integer is as good as -1

# What llama.cpp takes as the end of a turn or of a text, of whatever type the token is.
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<EOT>",
    "_<EOT>",
    "\u2581<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "</s>",
)
# What chat templates write before a message or around its role. A user who could write it would write other turns.
STARTS = (
    *("<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<|turn>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|start|>", "<|message|>", "<|channel|>", "[INST]", "[/INST]"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
)
# As ENDS, but only of tokens that the checkpoint itself calls special.
_ENDS_IF_SPECIAL = ("<|eos|>", "<|end_of_sentence|>", "<|end_of_turn|>", "<|end_of_role|>")
# If a vocabulary has all tokens of one of these sets, <|end|> ends one of several messages of a turn.
_OF_SEVERAL_MESSAGES = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})


def token_id(source: Fields, name: str) -> int | None:
    """The token id in a field; None if it says that there is none: null, or -1, signed or not. ConvertError for
    anything that is not an integer."""
    return _id(source, name, source.get(name))


def token_ids(source: Fields, name: str) -> list[int]:
    """The token ids in a field that has one or a list of them, without those that say that there is none."""
    value = source.get(name)
    ids = (_id(source, name, one) for one in (value if isinstance(value, list) else [value]))
    return [token for token in ids if token is not None]


def _id(source: Fields, name: str, value: object) -> int | None:
    if value in _ABSENT:
        return None
    if type(value) is not int:
        return source.fail(name, f"{shown(value)} is not a token id")
    return value if value >= 0 else None


def undeclared_ends(vocabulary: Collection[str], special: Collection[str]) -> list[str]:
    """The tokens that end a turn though they are not among the `special` ones; the converters make them special.
    `vocabulary` has all tokens."""
    ends = [text for text in ENDS if text in vocabulary and text not in special]
    # </s> is also a tag of HTML, which some vocabularies have as text beside their own end; <s> is then text too.
    others = "<s>" not in special and any(text in vocabulary or text in special for text in ENDS if text != "</s>")
    return [text for text in ends if _ends_turn(text, vocabulary) and not (text == "</s>" and others)]


def note_of_ends(texts: Collection[str]) -> str:
    """What is said of `undeclared_ends` when they are made special."""
    return _note("end", texts)


def note_of_starts(texts: Collection[str]) -> str:
    """The same of tokens among `STARTS`."""
    return _note("begin", texts)


def _note(what: str, texts: Collection[str]) -> str:
    return f"special although the checkpoint does not say so, since they {what} a turn: {', '.join(sorted(texts))}"


def ends_of_turn(special: Mapping[str, int]) -> list[int]:
    """The ids of those special tokens that end a turn or a text, even if no config says so."""
    return [special[text] for text in (*ENDS, *_ENDS_IF_SPECIAL) if text in special and _ends_turn(text, special)]


def _ends_turn(text: str, vocabulary: Collection[str]) -> bool:
    if text == "<|end|>":
        return not any(all(other in vocabulary for other in others) for others in _OF_SEVERAL_MESSAGES)
    return not (text == "</s>" and "<|tool_response>" in vocabulary)
