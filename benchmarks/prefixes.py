"""Chats with one system prompt, answered by a scheduler: what it costs that they have it in common, and what it saves.

    python benchmarks/prefixes.py MODEL.bin --chats 16 --shared 2000 --tail 100

Prints the time to the first token of the first chat and of the second; the bytes that forks of a session with the
prompt hold, beside those of the prompt once and of each chat's own part; and the tokens a second of all chats at once,
with and without what they have in common.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import kvrun
from kvrun.errors import KvrunError
from kvrun.prefix_store import WORTH

WORDS = (
    "river stone window letter garden music winter paper mountain candle morning silver forest bridge summer island"
).split()


def system_prompt(model: kvrun.Model, tokens: int) -> str:
    """A text of so many tokens, or a few more."""
    text, i = "", 0
    while len(model.tokenize(text)) < tokens:
        text += " ".join(WORDS[(i * i + k) % len(WORDS)] for k in range(12)) + ". "
        i += 1
    return text


def chat(system: str, number: int) -> list[dict[str, str]]:
    question = f"Name {number} things that one may find beside a {WORDS[number % len(WORDS)]}."
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def first_token(scheduler: kvrun.Scheduler, messages: Any) -> float:
    """Seconds until a chat's first piece."""
    began = time.perf_counter()
    request = scheduler.submit(messages, max_tokens=32, ignore_eos=True, seed=1)
    next(iter(request))
    seconds = time.perf_counter() - began
    request.result()
    return seconds


def to_first_tokens(model: kvrun.Model, args: argparse.Namespace, cache: dict[str, Any]) -> None:
    ratios: list[float] = []
    for run in range(args.rounds):
        system = f"This is run {run}. {system_prompt(model, args.shared)}"
        with model.scheduler(2, **cache) as scheduler:
            first, second = (first_token(scheduler, chat(system, number)) for number in (1, 2))
            stats = scheduler.stats()
        ratios.append(second / first)
        print(
            f"first token: {1000 * first:.0f} ms, of the second chat {1000 * second:.1f} ms; "
            f"{stats.cached_tokens:,} tokens were there"
        )
    print(f"second chat, of the first: {100 * statistics.median(ratios):.1f} %")


def bytes_held(model: kvrun.Model, args: argparse.Namespace, cache: dict[str, Any]) -> None:
    """Of forks, each with `tail` tokens of its own, and of what they would ideally hold."""
    prompt = model.tokenize(system_prompt(model, args.shared))
    base = model.session(**cache)
    _fed(base, prompt)
    forks, tails = [], []
    for number in range(args.chats):
        tail = [(7 * number + i) % 1000 + 100 for i in range(args.tail)]
        fork, alone = base.fork(), model.session(**cache)
        _fed(fork, tail)
        _fed(alone, tail)
        forks.append(fork.prefix().cache)
        tails.append(alone.prefix().cache)
    held = model.engine.bytes_held
    ideal = held([base.prefix().cache]) + sum(held([tail]) for tail in tails)
    have = held(forks)
    print(
        f"{args.chats} forks of {len(prompt):,} tokens, {args.tail} more in each: {have / 1e6:.1f} MB, "
        f"the prompt and {args.chats} tails {ideal / 1e6:.1f} MB: {have / ideal:.2f}"
    )


def _fed(session: kvrun.Session, ids: list[int]) -> None:
    for _ in session.stream(ids, max_tokens=0):
        pass


def together(model: kvrun.Model, args: argparse.Namespace, cache: dict[str, Any]) -> None:
    system = system_prompt(model, args.shared)
    seconds: dict[str, list[float]] = {"shared": [], "each": []}
    for _ in range(args.rounds):
        for how, most in (("shared", None), ("each", 0)):
            with model.scheduler(args.chats, prefix_bytes=most, **cache) as scheduler:
                began = time.perf_counter()
                requests = [
                    scheduler.submit(chat(system, number), max_tokens=args.tail, ignore_eos=True, seed=number)
                    for number in range(args.chats)
                ]
                for request in requests:
                    request.result()
                seconds[how].append(time.perf_counter() - began)
                if how == "shared":
                    stats = scheduler.stats()
    tokens = args.chats * args.tail
    speeds = {how: tokens / statistics.median(taken) for how, taken in seconds.items()}
    print(
        f"{args.chats} chats at once, answers of {args.tail} tokens, prompts included: {speeds['shared']:.1f} tok/s; "
        f"each reading all of its prompt {speeds['each']:.1f}: {speeds['shared'] / speeds['each']:.1f} times"
    )
    print(f"fed {stats.prompt_tokens:,} tokens of prompts, {stats.cached_tokens:,} were there", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model file of kvrun with a chat template")
    parser.add_argument("--chats", type=int, default=16)
    parser.add_argument("--shared", type=int, default=2000, help="tokens of the system prompt")
    parser.add_argument("--tail", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--kv", default="q8", help="cache format (q8)")
    parser.add_argument("--ctx", type=int, help="tokens of a cache (what the chats need)")
    parser.add_argument("--threads", type=int, help="of the model (the CPUs that this process may use)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    cache = {"kv": args.kv, "ctx": args.ctx or args.shared + args.tail + 1000}
    try:
        model = kvrun.load(args.model, threads=args.threads)
        if args.shared < WORTH or args.chats < 2:
            raise KvrunError("there is nothing in common")
        model.generate("a", max_tokens=4)
        for measure in (to_first_tokens, bytes_held, together):
            measure(model, args, cache)
    except (KvrunError, OSError) as error:
        print(f"prefixes: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
