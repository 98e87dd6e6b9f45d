"""The number of threads of decoding steps, with steps that take as long as a formula says."""

import random

import pytest

from kvrun._core import pace


class Machine:
    """Runs steps: `seconds(threads)` is how long one takes, `waiting(threads)` what part of it the caller waits."""

    def __init__(self, monkeypatch, most):
        self.clock, self.most = 0.0, most
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.clock)
        self.pace, self._random = pace.Pace(), random.Random(0)

    def run(self, duration, seconds, waiting):
        """How many steps ran with each number of threads."""
        end, counts = self.clock + duration, {}
        while self.clock < end:
            threads = self.pace.threads(self.most)
            took = seconds(threads) * self._random.uniform(1, 1.1)
            self.clock += took
            self.pace.took(threads, self.most, took, waiting(threads))
            counts[threads] = counts.get(threads, 0) + 1
        return counts


def no_waiting(threads):
    return 0.05


@pytest.mark.parametrize("most", [2, 8, 64])
def test_threads_that_all_bring_something_are_kept(monkeypatch, most):
    counts = Machine(monkeypatch, most).run(20, lambda threads: 0.02 / threads, no_waiting)
    assert counts[most] > 0.99 * sum(counts.values())


def test_a_thread_that_brings_nothing_is_laid_off(monkeypatch):
    counts = Machine(monkeypatch, 2).run(5, lambda threads: 0.004, lambda threads: 0.4 if threads > 1 else 0)
    assert counts[1] > 0.8 * sum(counts.values())


def test_threads_that_cost_more_than_they_bring_are_laid_off_and_called_back(monkeypatch):
    machine = Machine(monkeypatch, 64)

    def small(threads):  # best with 7
        return 0.002 * (1 / threads + 0.02 * threads)

    machine.run(2, small, lambda threads: 1 - 1 / (1 + 0.02 * threads * threads))
    counts = machine.run(2, small, no_waiting)
    assert all(small(threads) < 1.2 * small(7) for threads, n in counts.items() if n > 100)
    machine.run(2, lambda threads: 0.02 / threads, no_waiting)
    counts = machine.run(2, lambda threads: 0.02 / threads, no_waiting)
    assert max(counts, key=counts.get) >= 60


def test_within_a_second(monkeypatch):
    machine = Machine(monkeypatch, 2)
    machine.run(3, lambda threads: 0.004, lambda threads: 0.4 if threads > 1 else 0)
    assert machine.pace.threads(2) == 1
    counts = machine.run(1, lambda threads: 0.008 / threads, no_waiting)
    assert machine.pace.threads(2) == 2 and counts[2] > counts[1]


def test_beside_a_busy_process(monkeypatch):
    """With two threads on a CPU and a half steps vary, but are shorter than with one thread on a CPU of its own."""
    machine, noise = Machine(monkeypatch, 2), random.Random(1)

    def seconds(threads):
        return noise.choice([0.004, 0.005, 0.0065, 0.008]) if threads == 2 else 0.0075

    counts = machine.run(60, seconds, no_waiting)
    assert counts[2] > 0.95 * sum(counts.values())


def test_fewer_cpus_than_a_moment_ago(monkeypatch):
    machine = Machine(monkeypatch, 8)
    machine.run(3, lambda threads: 0.02 / threads, no_waiting)
    machine.most = 3
    assert set(machine.run(1, lambda threads: 0.02 / threads, no_waiting)) <= {2, 3}
    machine.most = 8
    assert machine.pace.threads(8) == 8


def test_steps_with_fewer_threads_than_asked_for_do_not_count(monkeypatch):
    machine = Machine(monkeypatch, 4)
    for _ in range(1000):
        machine.clock += 0.01
        machine.pace.took(2, 4, 0.01, 0.9)
    assert machine.pace.threads(4) == 4
