"""Each family's kind of template, rendered as transformers renders it (fixtures/make_chats.py)."""

import json
from functools import cache
from pathlib import Path

import pytest

from kvrun.errors import KvrunError
from kvrun.text.contents import first_lost
from kvrun.text.special_tokens import SpecialTokens
from kvrun.text.templates import ChatTemplate

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHATS = json.loads((FIXTURES / "chats.json").read_text("utf-8"))
NAMES = sorted(CHATS["rendered"])


@cache
def template(name, special=None):
    source = (FIXTURES / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    return ChatTemplate(source, CHATS["tokens"], special)


def cases(name):
    for run in CHATS["rendered"][name]:
        for messages, expected in zip(CHATS["conversations"], run["texts"], strict=True):
            yield messages, run["options"], expected


def test_every_family_is_there():
    families = "gemma2 gemma3 granite llama2 llama3 mistral mixtral olmo2 phi3 qwen2 qwen3 smollm2 smollm3"
    assert families.split() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_rendered_as_transformers_does(name):
    texts = 0
    for messages, options, expected in cases(name):
        refused = isinstance(expected, dict)
        if refused or first_lost(messages, expected) is not None:
            with pytest.raises(KvrunError, match="fails on this" if refused else "leaves out") as error:
                template(name).render(messages, **options)
            assert "\n" not in str(error.value)
        else:
            assert template(name).render(messages, **options) == expected, messages
            texts += 1
    assert texts >= 12


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_in_messages_change_nothing_else(name):
    """Escaped for the tokenizer, the same text comes out, with no special token from a message."""
    special = SpecialTokens({"<|im_start|>": 1, "<|im_end|>": 2, "<s>": 3, "</s>": 4, "</think>x": 5})
    for messages, options, expected in cases(name):
        if isinstance(expected, str) and first_lost(messages, expected) is None:
            text = template(name, special).render(messages, **options)
            parts = special.split(text)
            back = {i: t for t, i in special.ids.items()}
            assert "".join(back[p] if isinstance(p, int) else p for p in parts) == expected


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_text_are_rendered_as_the_text(name):
    """Only Gemma 3's template takes them itself."""
    for messages, options, expected in cases(name):
        if isinstance(expected, str) and first_lost(messages, expected) is None:
            parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
            plain = [{**m, "content": m["content"].strip()} for m in messages]
            text = template(name).render(parts, **options)
            assert text == expected or (name == "gemma3" and text == template(name).render(plain, **options))


def test_which_templates_can_leave_thinking_out():
    assert [name for name in NAMES if template(name).without_thinking] == ["qwen3", "smollm3"]
