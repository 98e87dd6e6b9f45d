"""An engine that remembers what it has computed, and can be stopped, or made to fail, at a step."""

import threading


class Recorder:
    """Stands in for the engine of a model. `before`, if set, is called with the items of each step before it is done,
    and may raise. `logits`: the bytes of all that steps have returned."""

    def __init__(self, engine):
        self.engine, self.before, self.logits, self.items = engine, None, set(), []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def step(self, items):
        if self.before is not None:
            self.before(items)
        self.items += [(len(item.tokens), item.decoding) for item in items]
        results = self.engine.step(items)
        self.logits.update(rows.tobytes() for rows in results if rows is not None)
        return results

    def forward(self, tokens, kv, logits="last", decoding=None):
        rows = self.engine.forward(tokens, kv, logits, decoding)
        if rows is not None:
            self.logits.add(rows.tobytes())
        return rows


class Gate:
    """A `before` that lets steps through up to the first that `stops` chooses, which waits until `open` is called."""

    def __init__(self, stops):
        self.stops, self.reached, self._opened = stops, threading.Event(), threading.Event()

    def __call__(self, items):
        if not self.reached.is_set() and self.stops(items):
            self.reached.set()
            self._opened.wait(60)

    def open(self):
        self._opened.set()
