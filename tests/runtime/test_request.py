"""Waiting for requests: callbacks, and asyncio tasks, several of them, that are cancelled or come late."""

import asyncio
import gc
import threading
import weakref

import pytest

import kvrun
from kvrun.errors import OptionError
from kvrun.request import Request

WAIT = 60
CACHE = {"kv": "q4", "ctx": 160, "window": 32}


@pytest.fixture(scope="module")
def model(converted):
    return kvrun.load(str(converted("wide")), threads=2)


def options(number, tokens=25):
    return {"max_tokens": tokens, "ignore_eos": True, "seed": number, "raw": True}


def alone(model, prompt, number, tokens=25):
    return "".join(model.session(**CACHE).stream(prompt, **options(number, tokens)))


def run(main):
    """A coroutine, to its end; it fails if that takes too long."""
    return asyncio.run(asyncio.wait_for(main, WAIT))


def unasked():
    """A request that no scheduler has: a test shows and ends it."""
    return Request("a", {}, None)


# --- callbacks --------------------------------------------------------------------------------------


def test_a_callback_is_called_once_when_it_has_ended(model):
    called, there = [], threading.Event()

    def ended(request):
        called.append((request.done, request.result(0).text, threading.current_thread().name))
        there.set()

    with model.scheduler(1, **CACHE) as several:
        request = several.submit("a", **options(1))
        request.add_done_callback(ended)
        assert there.wait(WAIT)
        request.add_done_callback(ended)
    text, here = alone(model, "a", 1), threading.current_thread().name
    assert [(done, found) for done, found, _ in called] == 2 * [(True, text)]
    assert called[1][2] == here and called[0][2] in ("kvrun scheduler", here)


@pytest.mark.parametrize("how", ["error", "cancelled", "cancelled while waiting", "time limit"])
def test_however_it_ends(model, how):
    there = threading.Event()
    with model.scheduler(1, **CACHE) as several:
        first = several.submit("a", ignore_eos=True, raw=True)
        options = {"temperature": -1} if how == "error" else {"ignore_eos": True}
        request = several.submit("b", 0.05 if how == "time limit" else None, raw=True, **options)
        request.add_done_callback(lambda _: there.set())
        if how in ("error", "cancelled"):
            first.cancel()
        if how == "cancelled":
            next(iter(request))
        if how.startswith("cancelled"):
            request.cancel()
        assert there.wait(WAIT)
        first.cancel()


def test_a_callback_that_fails_harms_nobody(model, monkeypatch):
    reported, others = [], []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(args.exc_type))

    def fail(request):
        raise ZeroDivisionError

    with model.scheduler(1, **CACHE) as several:
        request = several.submit("a", **options(1))
        request.add_done_callback(fail)
        request.add_done_callback(others.append)
        assert request.result(WAIT).text == alone(model, "a", 1)
        request.add_done_callback(fail)
        assert several.submit("b", **options(2)).result(WAIT).text == alone(model, "b", 2)
    assert reported == 2 * [ZeroDivisionError] and others == [request]


def test_a_callback_may_submit_the_next_request(model):
    requests, there = [], threading.Event()
    with model.scheduler(1, max_waiting=1, **CACHE) as several:

        def ask(_):
            requests.append(several.submit("a", **options(len(requests), 3)))
            if len(requests) < 20:
                requests[-1].add_done_callback(ask)
            else:
                there.set()

        ask(None)
        assert there.wait(WAIT)
        assert [one.result(WAIT).text for one in requests] == [alone(model, "a", i, 3) for i in range(20)]


# --- asyncio ----------------------------------------------------------------------------------------


def test_pieces_and_result(model):
    async def main():
        with model.scheduler(2, **CACHE) as several:
            first, second = (several.submit(prompt, **options(i)) for i, prompt in enumerate("ab"))
            pieces = [piece async for piece in first]
            assert first.done and [piece async for piece in first] == []
            return "".join(pieces), (await first).text, (await second).text, "".join(second)

    texts = [alone(model, prompt, i) for i, prompt in enumerate("ab")]
    assert run(main()) == (texts[0], texts[0], texts[1], texts[1])


def test_others_go_on_meanwhile(model):
    """A task that waits does not hold up its loop."""

    async def main():
        request, turns = unasked(), 0
        task = asyncio.ensure_future(request_text(request))
        while turns < 100:
            await asyncio.sleep(0)
            turns += 1
        assert not task.done()
        threading.Thread(target=lambda: (request.show("a"), request.show("b"), request.end())).start()
        return await task

    async def request_text(request):
        return "".join([piece async for piece in request]), (await request).text

    assert run(main()) == ("ab", "ab")


def test_several_wait_for_one(model):
    """All get the result; each piece is somebody's."""

    async def pieces(request):
        return [piece async for piece in request]

    async def main():
        with model.scheduler(1, **CACHE) as several:
            request = several.submit("a", **options(3, 60))
            return await asyncio.gather(*(pieces(request) for _ in range(4)), *(waited(request) for _ in range(3)))

    async def waited(request):
        return (await request).text

    *divided, one, two, three = run(main())
    text = alone(model, "a", 3, 60)
    assert one == two == three == text
    assert sorted(piece for part in divided for piece in part) == sorted(
        model.session(**CACHE).stream("a", **options(3, 60))
    )


def test_tasks_of_several_loops_and_threads(model):
    request, found = unasked(), []

    def wait(asynchronous):
        async def main():
            return (await request).text, [piece async for piece in request]

        found.append(run(main()) if asynchronous else (request.result(WAIT).text, list(request)))

    threads = [threading.Thread(target=wait, args=(i % 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for piece in "abcdefgh":
        request.show(piece)
    request.end()
    for thread in threads:
        thread.join(WAIT)
    assert [text for text, _ in found] == 8 * ["abcdefgh"]
    assert sorted(piece for _, pieces in found for piece in pieces) == list("abcdefgh")


def test_errors_are_raised(model):
    async def main():
        with model.scheduler(1, **CACHE) as several:
            request = several.submit("a", temperature=-1, raw=True)
            with pytest.raises(OptionError, match="temperature"):
                await request
            with pytest.raises(OptionError, match="temperature"):
                async for _ in request:
                    raise AssertionError
            request = several.submit("a", ignore_eos=True, raw=True)
            async for _ in request:
                request.cancel()
            assert (await request).finish_reason == "cancelled"

    run(main())


@pytest.mark.parametrize("iterate", [False, True])
def test_a_task_that_is_cancelled_leaves_no_trace(iterate):
    async def wait(request):
        if not iterate:
            return (await request).text
        return "".join([piece async for piece in request])

    async def main():
        request = unasked()
        tasks = [asyncio.ensure_future(wait(request)) for _ in range(3)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(wait(request), 0.01)
        gone = weakref.ref(tasks.pop(0))
        gc.collect()
        assert gone() is None and not request.done
        request.show("a")
        request.end()
        assert "".join(await asyncio.gather(*tasks)) == ("a" if iterate else "aa")

    run(main())


def test_a_loop_that_has_gone():
    """Somebody who waited in it does not keep the request from ending."""
    request, waiting = unasked(), []

    async def main():
        waiting.append(aiter(request).__anext__().__await__())
        next(waiting[0])

    run(main())
    request.show("a")
    request.end()
    assert request.result(0).text == "a" and list(request) == ["a"]
    waiting[0].close()


def test_leaving_in_the_middle(model):
    async def main():
        with model.scheduler(1, **CACHE) as several:
            request = several.submit("a", **options(5))
            async for piece in request:
                first = piece
                break
            rest = "".join([piece async for piece in request])
        return first + rest

    assert run(main()) == alone(model, "a", 5)
