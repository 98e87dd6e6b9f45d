"""Several requests at once: the same answers as alone, fairness, cancelling, limits, errors of one."""

import threading
import time

import pytest

import kvrun
from kvrun import scheduler
from kvrun._core import memory
from kvrun.errors import KvrunError, OptionError, SchedulerFullError

WAIT = 60
CACHE = {"kv": "q4", "ctx": 160, "window": 32}
PROMPTS = ["Once upon a time", "fox " * 70, "a", "The little fox said " * 20, "b c d e", "Why?"]


@pytest.fixture(scope="module", params=["f32", "q4_0"])
def model(converted, request):
    return kvrun.load(str(converted("wide", request.param)), threads=2)


def options(number, tokens=25):
    return {"max_tokens": tokens, "ignore_eos": True, "seed": number, "raw": True}


def alone(model, prompt, number, tokens=25):
    return "".join(model.session(**CACHE).stream(prompt, **options(number, tokens)))


@pytest.mark.parametrize("parallel", [1, 3, 8])
def test_answers_are_those_of_sessions_alone(model, parallel):
    with model.scheduler(parallel, **CACHE) as several:
        requests = [several.submit(prompt, **options(i)) for i, prompt in enumerate(2 * PROMPTS)]
        texts = [request.result(WAIT).text for request in requests]
    assert texts == [alone(model, prompt, i) for i, prompt in enumerate(2 * PROMPTS)]


def test_generate_many(model):
    results = model.generate_many(PROMPTS, parallel=4, **CACHE, **options(7))
    assert [result.text for result in results] == [alone(model, prompt, 7) for prompt in PROMPTS]
    assert {result.finish_reason for result in results} == {"length"}
    assert [result.stats.answer_tokens for result in results] == [25] * len(PROMPTS)
    assert model.generate_many([]) == []


def test_requests_from_several_threads(model):
    found = {}
    with model.scheduler(3, **CACHE) as several:

        def ask(number):
            found[number] = "".join(several.submit(PROMPTS[number], **options(number)))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    assert found == {i: alone(model, prompt, i) for i, prompt in enumerate(PROMPTS)}


def test_a_long_prompt_holds_up_nobody(model):
    """While it is read, others get a token with every piece of it."""
    with model.scheduler(2, kv="q4", ctx=2048) as several:
        first = several.submit("a", **options(1, 300))
        pieces = iter(first)
        next(pieces)
        long = several.submit("fox " * 600, **options(2, 1))
        before = first.stats.answer_tokens
        long.result(WAIT)
        assert first.stats.answer_tokens - before >= 5 or first.done
        first.cancel()


@pytest.mark.parametrize("piece", [8, 40, 5000])
def test_pieces_of_a_prompt_of_any_length(model, monkeypatch, piece):
    monkeypatch.setattr(scheduler._Piece, "tokens", piece)
    with model.scheduler(2, kv="q4", ctx=2048) as several:
        first = several.submit("a", ignore_eos=True, seed=1, raw=True)
        next(iter(first))
        found = several.submit("fox " * 300, **options(2)).result(WAIT)
        first.cancel()
    assert found.text == "".join(model.session(kv="q4", ctx=2048).stream("fox " * 300, **options(2)))


def test_cancelled_requests_end_and_leave_the_others_alone(model):
    with model.scheduler(2, **CACHE) as several:
        endless = several.submit("a", ignore_eos=True, seed=1, raw=True)
        other = several.submit("Why?", **options(3))
        waiting = several.submit("b", **options(4))
        waiting.cancel()
        first = next(iter(endless))
        endless.cancel()
        result = endless.result(WAIT)
        assert result.finish_reason == "cancelled" and result.text.startswith(first)
        assert other.result(WAIT).text == alone(model, "Why?", 3)
        assert waiting.result(WAIT).text == ""
        assert several.submit("b", **options(4)).result(WAIT).text == alone(model, "b", 4)


def test_time_limit(model):
    with model.scheduler(1, **CACHE) as several:
        endless = several.submit("a", time_limit=0.2, ignore_eos=True, raw=True)
        with pytest.raises(KvrunError, match="time limit"):
            endless.result(WAIT)
        assert several.submit("b", **options(4)).result(WAIT).text == alone(model, "b", 4)


def test_a_limit_on_waiting(model):
    with model.scheduler(1, max_waiting=1, **CACHE) as several:
        running = several.submit("a", ignore_eos=True, raw=True)
        next(iter(running))
        waiting = several.submit("b", **options(4))
        with pytest.raises(SchedulerFullError):
            several.submit("c", **options(5))
        running.cancel()
        assert waiting.result(WAIT).text == alone(model, "b", 4)


def test_a_request_that_fails_leaves_the_others_alone(model):
    with model.scheduler(3, **CACHE) as several:
        good = several.submit("Why?", **options(3))
        bad = [several.submit("", raw=True), several.submit("a", temperature=-1), several.submit([10**9])]
        for request in bad:
            with pytest.raises(OptionError):
                request.result(WAIT)
            with pytest.raises(OptionError):
                list(request)
        assert good.result(WAIT).text == alone(model, "Why?", 3)


def test_a_step_that_fails_for_one(model, monkeypatch):
    """Memory that is not there for one request's step is that request's error."""
    engine, step = model.engine, type(model.engine).step

    class Failing:
        def __getattr__(self, name):
            return getattr(engine, name)

        def step(self, items):
            if any(len(item.tokens) > 30 for item in items):
                raise MemoryError
            return step(engine, items)

    with model.scheduler(3, **CACHE) as several:
        monkeypatch.setattr(model, "engine", Failing())
        requests = [several.submit(prompt, **options(i)) for i, prompt in enumerate(("a", "fox " * 70, "Why?"))]
        with pytest.raises(KvrunError, match="memory"):
            requests[1].result(WAIT)
        texts = [requests[i].result(WAIT).text for i in (0, 2)]
    monkeypatch.undo()
    assert texts == [alone(model, "a", 0), alone(model, "Why?", 2)]


def test_leaving_with_an_exception_cancels(model):
    with pytest.raises(ZeroDivisionError), model.scheduler(1, **CACHE) as several:
        request = several.submit("a", ignore_eos=True, raw=True)
        time.sleep(0.05)
        raise ZeroDivisionError
    assert request.done
    with pytest.raises(OptionError, match="closed"):
        several.submit("a")


def test_closing_cancels_whatever_state_a_request_is_in(model):
    for _ in range(30):
        several = model.scheduler(2, **CACHE)
        requests = [several.submit("a", ignore_eos=True, raw=True) for _ in range(4)]
        several.close(cancel=True)
        assert all(request.done for request in requests)


def test_caches_that_could_outgrow_the_memory_are_refused(model, monkeypatch):
    """Before anything is begun; what is kept besides by default is no more than is left."""
    each = model.session(**CACHE).kv_bytes
    monkeypatch.setattr(memory, "most", lambda: 4 * each)
    for bad in ({"parallel": 5}, {"parallel": 4, "prefix_bytes": 1}):
        with pytest.raises(OptionError, match=f"parallel: {bad['parallel']} caches"):
            model.scheduler(**bad, **CACHE)
    with model.scheduler(4, **CACHE) as several:
        several.submit(PROMPTS[0], **options(1, 4)).result()
        assert several.stats().prefix_bytes == 0


def test_options(model):
    for bad in ({"parallel": 0}, {"parallel": 1000}, {"max_waiting": -1}, {"ctx": 1}):
        with pytest.raises(OptionError):
            model.scheduler(**bad)
