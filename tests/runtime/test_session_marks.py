"""Special tokens in an answer: stop strings that name them, and thinking that they mark."""

import pytest

from kvrun.text.thinking import Thinking
from support.fakes import CHATML, FakeModel

USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# Later turns are rendered without the thinking, as Qwen3's template does.
READS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content is string and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SPLITS_CONTENT = READS_REASONING.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
KEEPS = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}{{ m['content'] }}",
)
THINK, BRACKETS = ["<think>", "</think>"], ["[THINK]", "[/THINK]"]
CHANNELS = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>"]
BEGINS = ["<|think|>", "<|content|>", "<|begin|>", "<|end|>"]


def text(stream):
    return "".join(stream)


def tokens(model, answer):
    """The ids of an answer in which special tokens are meant as such."""
    return model.tokenizer.encode(answer, add_special=False)


def dimmed(session, stream):
    """(thinking, answer) as a terminal tells them apart"""
    thinking = Thinking(session.answer_begins_thinking)
    parts = [part for piece in stream for part in thinking.push(piece)] + thinking.finish()
    return tuple("".join(text for text, dim in parts if dim is wanted) for wanted in (True, False))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    "stop, shown",
    [
        ("<|im_start|>", "yes\n"),
        (["never", "<|im_start|>"], "yes\n"),
        ("\n<|im_start|>", "yes"),
        ("<|im_start|>us", "yes\n"),
        ("_start|>u", "yes\n"),
        ("s\n<|im_start|>user\n", "ye"),
        (["ser\n", "<|im_start|>user"], "yes\n"),
        ("<|endoftext|>", "yes\nuser\nWhy?"),
    ],
)
def test_a_stop_string_may_be_the_text_of_special_tokens(raw, stop, shown):
    model = FakeModel()
    model.says(tokens(model, "yes\n<|im_start|>user\nWhy?"))
    session = model.session()
    assert text(session.stream("Is it?", stop=stop, raw=raw)) == shown
    if not raw:
        assert session.messages[-1] == {"role": "assistant", "content": shown}


def test_a_stop_string_that_is_the_stop_token_ends_the_answer_where_that_is_ignored():
    model = FakeModel()
    model.says(tokens(model, "yes<|im_end|>no"))
    session = model.session()
    assert text(session.stream("a", stop="<|im_end|>", ignore_eos=True)) == "yes"
    # The token is in the text, as the next turn has it: only it and what follows are fed.
    model.says("two")
    model.engine.script.pop(0)  # what was left of the first answer
    text(session.stream("b"))
    assert model.fed.startswith(USER.format("a") + "yes<|im_end|>\n" + USER.format("b"))
    assert session.stats.prompt_tokens == len(tokens(model, "<|im_end|>\n" + USER.format("b")))


@pytest.mark.parametrize(
    "special, answer",
    [
        (THINK, ("<think>hm</think>", "\n\nyes")),
        (BRACKETS, ("[THINK]hm[/THINK]", "yes")),
        (["\u25c1think\u25b7", "\u25c1/think\u25b7"], ("\u25c1think\u25b7hm\u25c1/think\u25b7", "yes")),
        (["<seed:think>", "</seed:think>"], ("<seed:think>hm</seed:think>", "yes")),
        (["<|START_THINKING|>", "<|END_THINKING|>"], ("<|START_THINKING|>hm<|END_THINKING|>", "yes")),
        (
            CHANNELS,
            ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>", "yes"),
        ),
        (CHANNELS, ("<|channel|>final<|message|>", "yes")),
        (BEGINS, ("<|think|>hm<|end|><|begin|>assistant<|content|>", "yes")),
        (BEGINS, ("<|content|>", "yes")),
        (["<|channel>", "<channel|>"], ("<|channel>thought\nhm\n<channel|>", "yes")),
    ],
)
def test_thinking_that_special_tokens_mark(special, answer):
    model = FakeModel(READS_REASONING, special=special)
    model.says(tokens(model, "".join(answer)), "no")
    session = model.session()
    assert dimmed(session, session.stream("a")) == answer
    text(session.stream("b"))
    first, second = USER.format("a"), USER.format("b")
    assert model.fed == f"{first}yes<|im_end|>\n{second}no"


@pytest.mark.parametrize("source", [READS_REASONING, SPLITS_CONTENT, CHATML])
@pytest.mark.parametrize("special", [THINK, []])
def test_thinking_is_left_out_of_later_turns(source, special):
    """As text it is left to the template, which may know marks in a text only."""
    model = FakeModel(source, special=special)
    model.says(tokens(model, "<think>hm</think>yes"), "no")
    session = model.session()
    text(session.stream("a"))
    text(session.stream("b"))
    if special or source == SPLITS_CONTENT:
        assert "hm" not in model.fed
    assert "yes<|im_end|>" in model.fed


def test_a_template_may_keep_the_thinking():
    """It has the special tokens again, so that nothing is fed twice."""
    model = FakeModel(KEEPS, special=BRACKETS)
    model.says(tokens(model, "[THINK]hm[/THINK]yes"), "no")
    session = model.session()
    text(session.stream("a"))
    text(session.stream("b"))
    think, end = (model.tokenizer.special.ids[name] for name in BRACKETS)
    assert model.engine.fed.count(think) == model.engine.fed.count(end) == 1
    assert session.stats.prompt_tokens == len(tokens(model, "<|im_end|>\n" + USER.format("b")))


def test_a_conversation_of_the_programs_own_may_have_marks_in_its_text():
    model = FakeModel(SPLITS_CONTENT, special=THINK)
    model.says("no")
    session = model.session()
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>hm</think>\n\nyes"},
        {"role": "user", "content": "What is <think>x</think>?"},
    ]
    text(session.stream(talk))
    assert "hm" not in model.fed and "yes<|im_end|>" in model.fed
    # What a user types stays text, marks as well.
    assert model.tokenizer.special.ids["<think>"] not in model.engine.fed and "<think>x</think>" in model.fed


@pytest.mark.parametrize("special", [THINK, []])
def test_a_prompt_that_opens_the_thinking(special):
    model = FakeModel(
        SPLITS_CONTENT.replace("assistant\n{% if enable", "assistant\n<think>\n{% if enable"), special=special
    )
    model.says(tokens(model, "hm</think>yes"), tokens(model, "hm"), "no")
    session = model.session()
    stream = session.stream("a")
    assert session.answer_begins_thinking
    assert dimmed(session, stream) == ("hm</think>", "yes")
    assert dimmed(session, session.stream("b")) == ("hm", "")
    assert session.messages[-1]["content"] == "<think>\nhm"
    text(session.stream("c"))
    if special:
        assert "hm" not in model.fed


def test_no_thinking_with_special_marks():
    model = FakeModel(READS_REASONING, special=THINK)
    model.says("yes")
    session = model.session()
    stream = session.stream("a", think=False)
    assert not session.answer_begins_thinking
    assert dimmed(session, stream) == ("", "yes")
    assert model.fed.endswith("assistant\n<think>\n\n</think>\n\nyes")


def test_other_special_tokens_are_not_shown():
    model = FakeModel(special=["<|start|>", "<|end|>", "<think>", "</think>"])
    model.says(tokens(model, "a<|start|>b<|end|>c<|endoftext|>d"))
    assert text(model.session().stream("q")) == "abcd"
