"""Several sessions of one model in as many threads of Python, beside the same sessions one after the other.

    python benchmarks/sessions.py MODEL.bin --sessions 4 --tokens 100

Both are measured in turn; what is printed is the tokens a second of all sessions together, and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time

import kvrun
from kvrun.errors import KvrunError


def answer(session: kvrun.Session, number: int, tokens: int) -> None:
    for _ in session.stream(f"Tell me story {number}.", max_tokens=tokens, ignore_eos=True, seed=number):
        pass


def run(model: kvrun.Model, sessions: int, tokens: int, together: bool) -> float:
    """Tokens a second of all sessions, prompts included in the time."""
    made = [model.session(kv="q8", ctx=1024) for _ in range(sessions)]
    threads = [threading.Thread(target=answer, args=(session, i, tokens)) for i, session in enumerate(made)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
        if not together:
            thread.join()
    for thread in threads:
        thread.join()
    return sessions * tokens / (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model file of kvrun")
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=100, help="that each session writes")
    parser.add_argument("--threads", type=int, help="of the model (the CPUs that this process may use)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    try:
        model = kvrun.load(args.model, threads=args.threads)
        run(model, 1, args.tokens, True)
        speeds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.rounds):
            for together in speeds:
                speeds[together].append(run(model, args.sessions, args.tokens, together))
    except (KvrunError, OSError) as error:
        print(f"sessions: {error}", file=sys.stderr)
        return 1
    after, beside = (statistics.median(speeds[together]) for together in (False, True))
    print(f"{args.sessions} sessions of {args.tokens} tokens, {model.threads} threads, tokens a second:")
    print(f"one after the other {after:.1f}, at once {beside:.1f}: {beside / after:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
