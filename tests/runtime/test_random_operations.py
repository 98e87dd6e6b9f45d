"""Sessions that are forked, cut, saved, restored and given up at random, beside a scheduler whose requests begin alike:
every text is what it is for a session that shares nothing, and no memory stays behind."""

import gc
import itertools

import numpy as np
import pytest

import kvrun
from support.cases import run_all

CACHE = {"kv": "q4", "ctx": 300, "window": 16}
STEMS = ["The fox said " * 9, "The fox said " * 9 + "once upon a time " * 5, "a letter and a stone " * 12]


@pytest.fixture(scope="module")
def model(converted):
    return kvrun.load(str(converted("wide", "q8_0")), threads=2)


def options(seed, tokens):
    return {"max_tokens": tokens, "ignore_eos": True, "seed": seed, "raw": True}


class Twins:
    """A session whose tiles others have, too, and one that was made from a file, and shares none."""

    def __init__(self, shared, alone):
        self.shared, self.alone = shared, alone

    def both(self, act):
        one, other = act(self.shared), act(self.alone)
        assert one == other
        return one


class World:
    MOST = 5

    def __init__(self, model, scheduler, folder, seed):
        self.model, self.scheduler, self.rng = model, scheduler, np.random.default_rng(seed)
        self.path, self.twins, self.requests = folder / "session.kvs", [], []
        self.alone = {}

    def one(self):
        if not self.twins:
            self.new()
        return self.twins[self.rng.integers(len(self.twins))]

    def new(self):
        if len(self.twins) < self.MOST:
            self.twins.append(Twins(self.model.session(**CACHE), self.model.session(**CACHE)))

    def close(self):
        self.twins.remove(self.one())

    def stream(self):
        prompt = str(self.rng.choice([*STEMS, "b", "fox ", "and then the stone "]))
        seed, tokens = int(self.rng.integers(99)), int(self.rng.choice([0, 1, 20, 70]))
        self.one().both(lambda session: "".join(session.stream(prompt, **options(seed, tokens))))

    def give_up(self):
        """An answer that is left in the middle."""
        seed, pieces = int(self.rng.integers(99)), int(self.rng.integers(4))
        self.one().both(lambda session: [*itertools.islice(session.stream("and ", **options(seed, 30)), pieces)])

    def fork(self):
        if len(self.twins) < self.MOST:
            twins = self.one()
            twins.alone.save(self.path)
            self.twins.append(Twins(twins.shared.fork(), self.model.restore(self.path)))

    def truncate(self):
        twins = self.one()
        n = int(self.rng.integers(twins.shared.n_tokens + 1))

        def cut(session):
            try:
                session.truncate(n)
            except kvrun.OptionError as error:
                return str(error)
            return session.n_tokens

        twins.both(cut)

    def save(self):
        """What one has said goes on from a file in the place of both."""
        twins = self.one()
        twins.shared.save(self.path)
        twins.alone = self.model.restore(self.path)

    def submit(self):
        prompt = str(self.rng.choice(STEMS)) + str(self.rng.choice(["a", "b c", "stone"]))
        arguments = prompt, int(self.rng.integers(3)), int(self.rng.choice([1, 25]))
        self.requests.append((arguments, self.scheduler.submit(prompt, **options(*arguments[1:]))))

    def cancel(self):
        """And ask the others for their answers."""
        if self.requests:
            _, request = self.requests.pop(self.rng.integers(len(self.requests)))
            request.cancel()
        for arguments, request in self.requests:
            if arguments not in self.alone:
                text = self.model.session(**CACHE).stream(arguments[0], **options(*arguments[1:]))
                self.alone[arguments] = "".join(text)
            assert request.result(60).text == self.alone[arguments]
        self.requests = []

    def run(self, n):
        weights = {"stream": 6, "fork": 3, "close": 2, "truncate": 2, "save": 1, "give_up": 1, "submit": 6, "cancel": 1}
        shares = np.array([*weights.values()])
        for name in self.rng.choice(list(weights), n, p=shares / shares.sum()):
            getattr(self, name)()
        self.cancel()


def test_random_operations(model, tmp_path):
    with model.scheduler(3, prefix_bytes=2_000_000, **CACHE) as scheduler:
        world = World(model, scheduler, tmp_path, 1)
        world.run(10_000 if run_all() else 100)
        for twins in world.twins:
            twins.both(lambda session: (session.n_tokens, session.kv_bytes))
    pools = [one.shared._kv.pool for one in world.twins]
    del twins
    world.twins.clear()
    gc.collect()
    assert {(pool.n_caches, pool.bytes_in_use, pool.nbytes) for pool in pools} == {(0, 0, 0)}
