"""Stop strings: never shown, wherever the pieces are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrun.errors import OptionError
from kvrun.text.streaming import StopStrings
from kvrun.text.thinking import Thinking, opens_thinking


def run(stops, pieces):
    """(text shown, stopped)"""
    filter_ = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += filter_.push(piece)
        if filter_.stopped:
            return shown, True
    return shown + filter_.finish(), False


def expected(stops, text):
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    text=st.text("abc", max_size=12),
    data=st.data(),
)
def test_the_same_wherever_the_pieces_are_cut(stops, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    assert run(stops, pieces) == expected(stops, text)


@pytest.mark.parametrize(
    "stops, pieces, shown",
    [
        ("stop", ["a st", "op b"], "a "),
        ("aab", ["aa", "ab"], "a"),
        (["\n\n"], ["x\n", "y\n", "\n"], "x\ny"),
        (["abc", "b"], ["abc"], "a"),
        ("é", ["caf", "é"], "caf"),
    ],
)
def test_examples(stops, pieces, shown):
    assert run(stops, pieces) == (shown, True)


def test_text_is_not_held_back_longer_than_needed():
    filter_ = StopStrings("END")
    assert [filter_.push(p) for p in ("a", "E", "N", "x", "EE")] == ["a", "", "", "ENx", "E"]
    assert filter_.finish() == "E"


def run_tokens(stops, tokens):
    """(text shown, stopped) for tokens, of which those in angle brackets are special ones, not shown."""
    filter_ = StopStrings(stops)
    shown = ""
    for token in tokens:
        shown += filter_.push(token, shown=not token.startswith("<"))
        if filter_.stopped:
            return shown, True
    return shown + filter_.finish(), False


@pytest.mark.parametrize(
    "stops, tokens, shown",
    [
        ("<end>", ["a", "b", "<end>", "c"], "ab"),
        ("\n<end>", ["a", "\n", "<end>"], "a"),
        ("<end>\n", ["a", "<end>", "\n"], "a"),
        ("a<end>\nb", ["x", "a", "<end>", "\n", "b"], "x"),
        ("<e", ["a", "<end>"], "a"),
        ("nd>", ["a", "<end>"], "a"),
        ("b<e", ["ab", "<end>"], "a"),
        ("d>x", ["ab", "<end>", "x"], "ab"),
        ("<a><b>", ["x", "<a>", "<b>"], "x"),
        ("ab", ["xa", "<end>", "b"], "x"),
        (["never", "<end>", "b"], ["a", "<end>", "b"], "a"),
        (["b", "a<end>b"], ["x", "a", "<end>", "b"], "x"),
    ],
)
def test_stop_strings_of_special_tokens(stops, tokens, shown):
    assert run_tokens(stops, tokens) == (shown, True)


@pytest.mark.parametrize(
    "stops, tokens, shown",
    [
        ("a<end>b", ["a", "<end>", "c"], "ac"),
        ("<end>b", ["a", "<end>", "c", "<end>"], "ac"),
        (["a<end>bc", "cd"], ["a", "<end>", "b", "x"], "abx"),
        ("<end>", ["<", "e", "nd"], ""),
    ],
)
def test_what_only_begins_like_a_stop_string_is_shown(stops, tokens, shown):
    if shown:
        assert run_tokens(stops, tokens) == (shown, False)
    else:
        filter_ = StopStrings(stops)
        assert [filter_.push(token) for token in tokens] == ["", "", ""] and filter_.finish() == "<end"


def first_stop(stops, tokens):
    """What `run_tokens` should give: character by character, in all the text and in what is shown of it."""
    everything, shown = "", ""
    for token in tokens:
        for character in token:
            everything += character
            shown += "" if token.startswith("<") else character
            ends = [len(everything) - len(s) for s in stops if everything.endswith(s)]
            shown_ends = [len(shown) - len(s) for s in stops if not token.startswith("<") and shown.endswith(s)]
            if ends or shown_ends:
                hidden = "".join("0" if t.startswith("<") else "1" for t in tokens for _ in t)
                return shown[: min([hidden[:end].count("1") for end in ends] + shown_ends)], True
    return shown, False


@given(
    stops=st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3),
    tokens=st.lists(st.sampled_from(["a", "b", "ab", "ba", "c", "<a>", "<b>", "<>"]), max_size=8),
)
def test_stop_strings_wherever_special_tokens_stand(stops, tokens):
    assert run_tokens(stops, tokens) == first_stop(stops, tokens)


@pytest.mark.parametrize("stops", ["", [""], ["a", ""], [None], [3]])
def test_stop_strings_that_are_none(stops):
    with pytest.raises(OptionError):
        StopStrings(stops)


# --- thinking -------------------------------------------------------------------------------------


def split(pieces, inside=False):
    """(thinking, answer)"""
    thinking = Thinking(inside)
    parts = [part for piece in pieces for part in thinking.push(piece)] + thinking.finish()
    assert "".join(text for text, _ in parts) == "".join(pieces)
    dims = [dim for text, dim in parts if text.strip()]
    assert dims == sorted(dims, reverse=True), "thinking comes before the answer"
    return tuple("".join(text for text, dim in parts if dim == kind) for kind in (True, False))


THOUGHTS = [
    ("<think>a</think>b", False, ("<think>a</think>", "b")),
    ("\n <think>a < b\n</think>\n\nb <think>c</think>", False, ("<think>a < b\n</think>", "\n \n\nb <think>c</think>")),
    ("a <think>b</think>", False, ("", "a <think>b</think>")),
    ("a</think>b", True, ("a</think>", "b")),
    ("<think>never ends </thin", False, ("<think>never ends </thin", "")),
    ("<thin", False, ("", "<thin")),
    ("<thinker>", False, ("", "<thinker>")),
    ("</th</think>x", True, ("</th</think>", "x")),
    ("[THINK]a[/THINK]b", False, ("[THINK]a[/THINK]", "b")),
    ("<think>a [/THINK] b</think>c", False, ("<think>a [/THINK] b</think>", "c")),
    ("a[/THINK]b", True, ("a[/THINK]", "b")),
    ("\u25c1think\u25b7a\u25c1/think\u25b7b", False, ("\u25c1think\u25b7a\u25c1/think\u25b7", "b")),
    ("<seed:think>a</seed:think>b", False, ("<seed:think>a</seed:think>", "b")),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
        False,
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>", "b"),
    ),
    ("<|channel|>final<|message|>b</think>", False, ("<|channel|>final<|message|>", "b</think>")),
    ("[THIN", False, ("", "[THIN")),
    ("", False, ("", "")),
]


@pytest.mark.parametrize("text, inside, expected", THOUGHTS)
def test_thinking_is_told_apart_wherever_the_pieces_are_cut(text, inside, expected):
    assert split([text], inside) == split(list(text), inside) == expected
    for cut in range(len(text)):
        assert split([text[:cut], text[cut:]], inside) == expected


def test_white_space_is_not_held_back():
    thinking = Thinking()
    assert [thinking.push(p) for p in ("\n", " <", "b", "<think>")] == [
        [("\n", False)],
        [(" ", False)],
        [("<b", False)],
        [("<think>", False)],
    ]


def test_thinking_is_shown_as_it_comes():
    thinking = Thinking()
    assert [thinking.push(p) for p in ("<th", "ink>", "a", "b<", "c", "</think", ">", "d")] == [
        [],
        [("<think>", True)],
        [("a", True)],
        [("b", True)],
        [("<c", True)],
        [],
        [("</think>", True)],
        [("d", False)],
    ]


def test_a_prompt_may_have_opened_the_thinking():
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert opens_thinking("[/INST][THINK]")
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
