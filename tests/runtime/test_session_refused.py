"""A call that is refused, and a prompt that cannot be fed, leave a session as it was; and one user at a time."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kvrun
from kvrun import _core
from kvrun.errors import KvrunError, OptionError, SessionBusyError, TokenizerError
from support.fakes import FakeModel
from support.sessions import GO_ON, talked, text


@pytest.fixture
def fake():
    return FakeModel()


@pytest.fixture(scope="module")
def model(converted):
    """Tiny, with a chat template; its answers are nonsense."""
    return kvrun.load(converted("grouped-tied", "q8_0"), threads=2)


@pytest.fixture(scope="module")
def learned(converted_family):
    """Has learned positions, so that a text can be too long."""
    return kvrun.load(converted_family("gpt2"), threads=1)


@pytest.fixture(scope="module")
def converted_family(fixtures, tmp_path_factory):
    from kvrun.convert import convert

    def path(name):
        made = tmp_path_factory.mktemp("family") / "model.bin"
        convert(fixtures / "families" / name, made, "f32")
        return made

    return path


def what_it_is(session):
    return session.n_tokens, list(session.messages), session.kv_bytes


def goes_on_like(session, other, prompt="And then?"):
    assert text(session.stream(prompt, **GO_ON)) == text(other.stream(prompt, **GO_ON))
    assert np.array_equal(session.evaluate(), other.evaluate()) and session.messages == other.messages


class Failing:
    """An engine whose call number `at` fails."""

    def __init__(self, engine, error, at=0):
        self.engine, self.error, self.left = engine, error, at
        self.max_chunk = 50

    def forward(self, *args, **options):
        self.left -= 1
        if self.left == -1:
            raise self.error
        return self.engine.forward(*args, **options)


LONG = "What is a cat, and what is it for? " * 6


@pytest.mark.crossed
@pytest.mark.parametrize("error", [MemoryError(), ValueError("no more positions"), RuntimeError("?")], ids=repr)
@pytest.mark.parametrize("kv", ["f16", "q4"])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("prompt", [LONG, [{"role": "user", "content": "Hello you, " + LONG}], list(range(5, 200))])
def test_a_prompt_that_cannot_be_fed_changes_nothing(model, error, kv, at, prompt, monkeypatch):
    """Whether it goes on with the text or takes its place, and however much of it was fed."""
    session, other = talked(model, kv=kv), talked(model, kv=kv)
    before = what_it_is(session)
    with monkeypatch.context() as patch:
        patch.setattr(model, "engine", Failing(model.engine, error, at))
        with pytest.raises(RuntimeError if isinstance(error, RuntimeError) else KvrunError) as caught:
            text(session.stream(prompt, **GO_ON))
    assert "\n" not in str(caught.value) and what_it_is(session) == before
    again = session.fork()
    assert np.array_equal(session.evaluate(), other.evaluate())
    goes_on_like(session, other)
    goes_on_like(again, talked(model, kv=kv))


def test_a_prompt_that_cannot_be_fed_to_a_text_that_outgrew_its_cache(model, monkeypatch):
    """A prompt that would go on is not there; one that began anew has taken the place of what is lost."""
    for kv in ("f16", "q4"):
        session, other = (talked(model, kv=kv, ctx=132) for _ in range(2))
        for each in (session, other):
            text(each.stream("a", max_tokens=300, seed=1, ignore_eos=True))
        before = what_it_is(session)
        with monkeypatch.context() as patch:
            patch.setattr(model, "engine", Failing(model.engine, MemoryError()))
            with pytest.raises(KvrunError, match="not enough memory"):
                text(session.stream("Go on", **GO_ON))
        assert what_it_is(session) == before
        goes_on_like(session, other)
        with monkeypatch.context() as patch:
            patch.setattr(model, "engine", Failing(model.engine, MemoryError()))
            with pytest.raises(KvrunError, match="not enough memory"):
                text(session.stream([{"role": "user", "content": "Hello"}], **GO_ON))
        assert (session.n_tokens, session.messages) == (0, [])
        goes_on_like(session, model.session(kv=kv, ctx=132))


def test_tokens_that_the_model_does_not_have(fake):
    """From the caller or from a tokenizer that knows more than the model has rows for."""
    fake.says("one", "two")
    session = fake.session()
    text(session.stream("a"))
    before, fed = what_it_is(session), list(fake.engine.fed)
    of_all, fake.vocab_size = fake.vocab_size, fake.tokenize("z")[0]
    with pytest.raises(OptionError, match="token id"):
        session.stream([fake.vocab_size])
    for prompt, options in (("z", {}), ("z", {"raw": True}), ([{"role": "user", "content": "z"}], {})):
        with pytest.raises(TokenizerError, match=rf"the token \d+, and the model has {fake.vocab_size}"):
            session.stream(prompt, **options)
        assert what_it_is(session) == before and fake.engine.fed == fed
    fake.vocab_size = of_all
    assert text(session.stream("b")) == "two"


def test_more_tokens_than_positions(learned):
    session = learned.session(ctx=200)
    positions = learned.description.context_length
    text(session.stream([5] * (positions - 10), max_tokens=0))
    before, logits = what_it_is(session), session.logits.copy()
    with pytest.raises(OptionError, match=f"learned {positions} positions.*it would have {positions + 1} tokens"):
        session.stream([5] * 11)
    assert what_it_is(session) == before and np.array_equal(session.logits, logits)
    with pytest.raises(KvrunError, match="learned"):
        text(session.stream([6], ignore_eos=True))
    session.truncate(positions - 10)
    assert np.array_equal(session.evaluate(), logits)


REFUSED = [
    lambda s: s.truncate(-1),
    lambda s: s.truncate(s.n_tokens + 1),
    lambda s: s.truncate("x"),
    lambda s: s.stream(3),
    lambda s: s.stream([]) if not s.n_tokens else s.stream([-1]),
    lambda s: s.stream([{"role": "user"}]),
    lambda s: s.stream("a", temperature=-1),
    lambda s: s.stream("a", stop=[3]),
    lambda s: s.stream("\ud800"),
    lambda s: s.stream("  "),
    lambda s: s.save("/nowhere/at/all"),
    lambda s: s.tokenize("\ud800"),
    lambda s: s.detokenize([10**6]),
]


@pytest.mark.parametrize("call", REFUSED)
@pytest.mark.parametrize("empty", [True, False])
def test_what_is_refused_changes_nothing(model, call, empty):
    session, other = ((model.session() if empty else talked(model)) for _ in range(2))
    before = what_it_is(session)
    with pytest.raises(KvrunError) as caught:
        call(session)
    assert "\n" not in str(caught.value) and what_it_is(session) == before
    goes_on_like(session, other)


def test_no_memory_for_a_fork_or_to_save(model, tmp_path, monkeypatch):
    session, other = talked(model), talked(model)

    def none(*_):
        raise MemoryError

    class Poor:
        def __init__(self, kv):
            self.kv = kv

        def __getattr__(self, name):
            return none if name in ("copy", "state") else getattr(self.kv, name)

    kv = session._kv
    session._kv = Poor(kv)
    with pytest.raises(OptionError, match="not enough memory"):
        session.fork()
    with pytest.raises(KvrunError, match="not enough memory"):
        session.save(tmp_path / "s.kv")
    session._kv = kv
    assert not list(tmp_path.iterdir())
    goes_on_like(session, other)


def test_an_error_of_the_callers_own_ends_a_stream_like_closing_it(fake):
    fake.says("abcdef", "xyz")
    session = fake.session()
    stream = session.stream("q")
    assert "".join(itertools.islice(stream, 2)) == "ab"
    with pytest.raises(ZeroDivisionError):
        stream.throw(ZeroDivisionError())
    assert session.messages[-1] == {"role": "assistant", "content": "ab"} and list(stream) == []
    fake.engine.script = []
    fake.says("xyz")
    assert text(session.stream("r")) == "xyz" and [m["content"] for m in session.messages] == ["q", "ab", "r", "xyz"]


# --- one user at a time ---------------------------------------------------------------------------

CALLS = {
    "stream": lambda s: s.stream("r"),
    "truncate": lambda s: s.truncate(1),
    "fork": lambda s: s.fork(),
    "save": lambda s: s.save("/nowhere/at/all"),
    "reset": lambda s: s.reset(),
    "evaluate": lambda s: s.evaluate(),
}


@pytest.mark.parametrize("name", [*CALLS, "next", "close", "throw"])
def test_a_second_thread_is_told_at_once(fake, name):
    """While a step is under way, whatever it asks for; then the answer goes on as if nothing had been."""
    fake.says("abc")
    session = fake.session()
    inside, go_on = threading.Event(), threading.Event()
    forward, stream = fake.engine.forward, session.stream("q")

    def slow(*args, **options):
        inside.set()
        assert go_on.wait(60)
        return forward(*args, **options)

    fake.engine.forward = slow
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(text, stream)
        assert inside.wait(60)
        calls = {**CALLS, "next": lambda _: next(stream), "close": lambda _: stream.close()}
        calls["throw"] = lambda _: stream.throw(ValueError())
        try:
            with pytest.raises(SessionBusyError, match="in use by another thread"):
                calls[name](session)
            assert session.n_tokens >= 0 and session.kv_bytes and session.messages  # reading is allowed
        finally:
            go_on.set()
        assert answer.result(60) == "abc"
    assert [m["content"] for m in session.messages] == ["q", "abc"]


def test_a_call_within_a_call_is_refused_too(fake):
    """As from a signal handler: the session is in the middle of a step."""
    fake.says("abc")
    session, forward, refused = fake.session(), fake.engine.forward, []

    def interrupted(*args, **options):
        with pytest.raises(SessionBusyError) as caught:
            session.save("/nowhere")
        refused.append(caught.value)
        return forward(*args, **options)

    fake.engine.forward = interrupted
    assert text(session.stream("q")) == "abc" and len(refused) == 4


def test_a_stream_can_go_from_thread_to_thread(model):
    """One piece here, the next there; and what another thread asks in between ends it."""
    session, other = model.session(), model.session()
    expected = text(other.stream("Hello", **GO_ON))
    with ThreadPoolExecutor(3) as pool:
        stream, pieces = session.stream("Hello", **GO_ON), []
        while (piece := pool.submit(next, stream, None).result()) is not None:
            pieces.append(piece)
        assert "".join(pieces) == expected
        stream = session.stream("More", **GO_ON)
        next(stream)
        fork = pool.submit(session.fork).result()
        assert list(stream) == [] and fork.messages == session.messages and len(fork.messages) == 4


def test_many_threads_on_one_session(model):
    """Every call gets what it asked for, or SessionBusyError, and nothing else; the session stays whole."""
    session, told = model.session(kv="q4"), [{"role": "user", "content": "Hello"}]
    expected = text(model.session(kv="q4").stream(told, **GO_ON))
    got, lock = [], threading.Lock()

    def use(n):
        for _ in range(10):
            try:
                if n % 3 == 0:
                    stream = session.stream(told, **GO_ON)
                    with lock:
                        got.append((text(stream), None))
                elif n % 3 == 1:
                    session.evaluate()
                else:
                    session.fork().evaluate()
            except SessionBusyError:
                pass
            except KvrunError as error:
                assert "no logits" in str(error)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(6)))
    assert all(expected.startswith(answer) for answer, _ in got)
    assert text(session.stream(told, **GO_ON)) == expected


def test_threads_begin_with_a_model_together(converted, tmp_path):
    """Its tokenizer, template and rotary tables are made once, for all."""
    for n in range(4):
        model = kvrun.load(converted("grouped-tied"), threads=1)
        start = threading.Barrier(8)

        def run(_, model=model, start=start, n=n):
            start.wait(60)
            return model.generate("Hello", ctx=200 + n, **GO_ON), tuple(model.tokenize("Hello there"))

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(run, range(8)))) == 1


def test_caches_are_used_by_one_at_a_time(model):
    """The core's own: a second user of a cache is told, and does not wait."""
    in_use = _core.Exclusive(SessionBusyError, "busy")
    assert in_use.run(lambda a, b=1: (a, b), 3, b=4) == (3, 4)
    with pytest.raises(SessionBusyError, match="busy"):
        in_use.run(in_use.run, len, "x")
    with pytest.raises(ZeroDivisionError):
        in_use.run(lambda: 1 / 0)
    assert in_use.run(len, "abc") == 3
