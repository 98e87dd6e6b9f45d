"""Whatever a program passes in, a public call works or raises one of kvrun's errors, which says what is wrong."""

import decimal
import fractions
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvrun
from kvrun import KvrunError, OptionError
from kvrun.convert import convert
from kvrun.options import CacheKeywords, GenerateKeywords, LoadKeywords, StreamKeywords, declared


class Awkward:
    """Cannot even be shown."""

    def __repr__(self):
        raise RuntimeError("no")


class Endless:
    """As long as anybody asks."""

    def __repr__(self):
        return "x" * 100_000


NO_TEXT = [5, 2.5, True, b"q4", [], {}, object(), Awkward(), Endless(), math.nan]
WRONG = {
    int: ["7", "x", b"7", True, False, np.True_, 1.5, math.nan, math.inf, 1 + 2j, [1], (), {}, object(), Awkward()]
    + [np.float32(1.5), np.array([1]), np.array(["a"]), 2**64, -(2**63) - 1, -(10**6000), "9" * 6000, Endless()],
    float: ["0.5", b"0.5", bytearray(b"1"), memoryview(b"1"), True, np.False_, math.nan, math.inf, -math.inf, -0.1]
    + [1j, [0.5], {}, object(), Awkward(), np.array([0.5]), np.complex64(1), np.str_("1"), -(10**400), Endless()],
    bool: ["yes", "", 0, 1, 2.0, [], {}, object(), np.array([True]), Awkward()],
    str: NO_TEXT,
    Any: [value for value in NO_TEXT if not isinstance(value, bytes)],  # a path may be bytes
}
NO_STOPS = [1, 2.5, True, b"a", {"a": 1}, object(), Awkward(), "", [""], ["a", 1], [None], [["a"]], [b"a"]]
NO_STOPS += [np.zeros(1), np.array(1), np.str_("")]
GROUPS = {"load": LoadKeywords, "session": CacheKeywords, "stream": StreamKeywords, "generate": GenerateKeywords}


def wrong(option):
    if option.several:
        return NO_STOPS
    # A number without an upper limit may be as large as anybody likes.
    return [value for value in WRONG[option.kind] if option.high is not None or type(value) is not int or value < 0]


CASES = [(call, name) for call, group in GROUPS.items() for name in declared(group)]


@pytest.fixture(scope="module")
def path(converted):
    return converted("grouped-tied")


@pytest.fixture(scope="module")
def model(path):
    return kvrun.load(path)


@pytest.fixture(scope="module")
def calls(path, model):
    return {
        "load": lambda **options: kvrun.load(path, **options),
        "session": model.session,
        "stream": lambda **options: model.session().stream("a", **options),
        "generate": lambda **options: model.generate("a", **options),
    }


@pytest.mark.parametrize("call, name", CASES, ids=[f"{call}-{name}" for call, name in CASES])
def test_options_of_another_kind(calls, call, name):
    """The error names the option, and shows the value in few words."""
    for value in wrong(declared(GROUPS[call])[name]):
        with pytest.raises(OptionError, match=rf"^{name}: .*") as caught:
            calls[call](**{name: value})
        message = str(caught.value)
        assert len(message) < 250 and "\n" not in message
        if type(value) in (str, float):
            assert repr(value)[:50] in message


@pytest.mark.parametrize(
    "name, value, limits",
    [
        ("top_k", 2**31, "must be at least 0 and at most 2147483647, not 2147483648"),
        ("top_p", 1.5, "must be at least 0 and at most 1, not 1.5"),
        ("temperature", -1, "must be at least 0, not -1"),
        ("repeat_penalty", 0, "must be more than 0, not 0"),
        ("max_tokens", -2, "must be at least -1, not -2"),
        ("seed", 2**64, "at most 18446744073709551615, not 18446744073709551616"),
        ("ctx", 2**31, "at most 2147483647, not 2147483648"),
        ("kv", "q3", "there is no cache format 'q3'; there is "),
        ("stop", 1, "must be text or a list of texts, not 1"),
        ("stop", ["a", ""], "a stop string must be text of at least one character, not ''"),
        ("raw", "no", "must be True or False, not 'no'"),
    ],
)
def test_what_the_errors_say(model, name, value, limits):
    with pytest.raises(OptionError) as caught:
        model.generate("a", **{name: value})
    assert str(caught.value).startswith(f"{name}: ") and limits in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": np.int64(3), "temperature": np.float32(0.5), "seed": np.uint64(2**64 - 1), "raw": np.True_},
        {"top_k": 3.0, "max_tokens": np.float64(2), "top_p": fractions.Fraction(1, 2), "min_p": decimal.Decimal("0.1")},
        {"top_k": np.array(3), "temperature": np.array(0.5), "top_p": 1},
        {"stop": (), "max_tokens": 1}, {"stop": ("a", "b")}, {"stop": iter(["a"])}, {"stop": np.array(["a", "b"])},
        {"max_tokens": 2**70, "stop": ["e", "a", "i", "o", "u", "n", " "]}, {"seed": -(2**63)},
        dict.fromkeys(set(declared(GenerateKeywords)) - {"max_tokens"}),  # None: not given
    ],
    ids=str,
)  # fmt: skip
def test_values_that_are_fine(model, options):
    model.generate("a", **{"max_tokens": 2, **options})


def test_none_is_not_given(model, monkeypatch):
    """Also where a function has a default of its own."""
    asked = []
    monkeypatch.setattr(kvrun.Session, "stream", lambda self, prompt, **options: asked.append(options) or [])
    model.generate("a", max_tokens=None, seed=None)
    assert asked == [{"max_tokens": 512}]


def test_a_default_of_the_model_file_that_cannot_be(model):
    """It says whose value that is; one that is given takes its place."""
    session = model.session()
    saved = dict(model.file.sampling)
    model.file.sampling["top_p"] = 1.5
    try:
        with pytest.raises(OptionError, match=r"^top_p: .* at most 1, not 1.5; this is the model file's own default"):
            session.stream("a")
        assert "".join(session.stream("a", top_p=0.5, max_tokens=2, ignore_eos=True))
    finally:
        model.file.sampling.clear()
        model.file.sampling.update(saved)


# --- everything, with everything --------------------------------------------------------------------

MESSAGES = [
    [{}],
    [{"role": "user"}],
    [{"role": 1, "content": "a"}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": b"a"}],
    [{"role": "user", "content": [1]}],
    [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}],
    [{"role": "user", "content": "a"}, 5],
    [{"role": "user", "content": "a"}, None],
    [{1: 2}],
    [{"role": "user", "content": "a", 5: 6}],
    [{"role": "user", "content": "\ud800"}],
    [{"role": "\ud800", "content": "a"}],
    [{"role": "user", "content": None, "tool_calls": 5}],
    [{"role": "user", "content": "a", "extra": Awkward()}],
    [5, {"role": "user", "content": "a"}],
    ({"role": "assistant", "content": "a"},),
]
ODD = [
    *(None, True, 0, -1, 1, 7, 2**31, 2**63, 2**64, -(10**400), 0.5, -0.0, math.nan, math.inf, 1j),
    *("", " ", "a", "\ud800", "a\0b", "\ufdd0", "x" * 3000, "q4", "/", "no/such/file"),
    *(b"", b"a", b"\xff", bytearray(b"a"), range(3), iter([1])),
    *([], (), {}, {1, 2}, [1], [0, 1], (1, 2.5), [2**40], [-1], [True], ["a"], [None], [b"a"], [[1]]),
    *(np.int64(3), np.float32(0.5), np.bool_(True), np.array(3), np.array([1, 2]), np.array([[1, 2]]), np.array([0.5])),
    *(np.array(["a"]), np.array([], np.int32), np.array([1], object), np.array([{"role": "user", "content": "a"}])),
    *(object(), Awkward(), Endless(), Path("no/such/file"), Path("/"), lambda: 1, type, *MESSAGES),
]


def consumed(stream):
    return "".join(piece for _, piece in zip(range(4), stream))


@pytest.fixture
def everything(path, model, source):
    """{what: (function of one odd value, names of the options it takes)}"""

    def nowhere(value):
        """Paths lead to no folder, so that nothing is written."""
        return f"no/such/{value}" if isinstance(value, (str, bytes, Path)) else value

    session = model.session(ctx=140)
    limited = dict(max_tokens=3, temperature=0)
    return {
        "load": (lambda value, **more: kvrun.load(value, **more), LoadKeywords),
        "session": (lambda value, **more: model.session(**{"ctx": 200, **more}), CacheKeywords),
        "restore": (lambda value: model.restore(value), None),
        "generate": (lambda value, **more: model.generate(value, **{**limited, "ctx": 200, **more}), GenerateKeywords),
        "stream": (lambda value, **more: consumed(session.stream(value, **{**limited, **more})), StreamKeywords),
        "convert": (lambda value: convert(value, "out.bin"), None),
        "convert to": (lambda value: convert(source("wide"), nowhere(value)), None),
        "convert as": (lambda value: convert(source("wide"), "no/such/folder/out.bin", value), None),
        "truncate": (lambda value: session.truncate(value), None),
        "tokenize": (lambda value: model.tokenize(value), None),
        "detokenize": (lambda value: session.detokenize(value), None),
        "others": (lambda value: (session.fork().stats, session.n_tokens, session.kv_bytes, session.evaluate()), None),
        "reset": (lambda value: session.reset(), None),
    }  # fmt: skip


def test_odd_values_everywhere(everything, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    names = list(everything)
    for value in ODD:
        for name in names[:-1]:
            attempt(*everything[name], name, value, {})
    for _ in range(600):
        name = rng.choice(names)
        call, group = everything[name]
        options = declared(group) if group else {}
        few = rng.sample(list(options), min(len(options), rng.randrange(4)))
        few = [option for option in few if option not in ("device", "ctx", "sinks", "window", "max_tokens")]
        attempt(call, group, name, rng.choice(ODD), {option: rng.choice(ODD) for option in few})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["ctx", "sinks", "window"])
@pytest.mark.parametrize("value", [2**31, 2**63, 10**30])
def test_sizes_of_a_cache_that_no_number_of_tokens_has(model, name, value):
    with pytest.raises(OptionError, match=f"^{name}: must be at least . and at most 2147483647, not {value}"):
        model.session(**{name: value})


def test_where_a_session_cannot_be_saved(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = model.session()
    consumed(session.stream("a", max_tokens=2))
    for value in ODD:
        if not isinstance(value, (str, bytes, Path)):
            with pytest.raises(OptionError, match="^path: must be the path of a file"):
                session.save(value)


def attempt(call, group, name, value, options):
    try:
        call(value, **options)
    except KvrunError as error:
        assert str(error) and len(str(error)) < 5000, name
    except Exception as error:
        raise AssertionError(f"{name}({value!r:.80}, {options!r:.200})") from error
