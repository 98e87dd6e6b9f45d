"""Speed of speculative decoding, beside decoding without it, and whether both write the same.

    python benchmarks/speculation.py [MODEL] [--draft MODEL] [--prompt FILE] [--tokens 200] [--runs 5]
    python benchmarks/speculation.py [MODEL] [--draft MODEL] --check 200

Three tasks: a text and a program that are to be copied, at temperature 0, and prose, which repeats little. Runs without
drafts and with each kind of them take turns, since machines become slower and faster by themselves; what is printed is
the median of tokens a second of an answer, its prompt left out, and the median of each run's ratio to the run without
before it. Answers are compared in any case. --check compares the answers to so many other prompts, with other options,
formats of the cache and seeds, and ends with status 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kvrun
from kvrun.commands.arguments import default_model

LETTER = """\
Dear Anna,

The roof of the boathouse is repaired at last. Jonas found slates of the old kind in the quarry behind the mill, \
and we carried them down in eleven trips, because the cart has lost a wheel again. While we worked a heron stood on \
the far bank and did not move for the whole of the afternoon. I think it was waiting for us to leave.

You asked what became of the pear trees. Four of the seven are in blossom, two are too young, and the one by the \
well was struck in the storm of the ninth of March; it has a single green branch on its western side. Mother wants \
it felled. I have asked her to wait until September, since a tree that tries so hard should be given a summer.

Please bring the long ladder when you come, the grey paint, and as many of the brass hinges as Peter can spare. The \
ferry goes at ten and at four, but on Sundays only at ten. If the water is high they will land you at the upper \
jetty, and then it is half an hour on foot, past the chapel and the three lime kilns.

Your brother, Matthias"""

PROGRAM = '''\
def read_orders(path):
    """Orders of a file, one a line: customer, article, number, price of one."""
    orders = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip("\\n").split(";")
            if len(fields) != 4:
                raise ValueError(f"{path}, line {number}: {len(fields)} fields instead of 4")
            customer, article, count, price = fields
            orders.append((customer, article, int(count), float(price)))
    return orders


def total_by_customer(orders):
    """What each customer has to pay, rebates taken off."""
    totals = {}
    for customer, article, count, price in orders:
        amount = count * price
        if count >= 100:
            amount *= 0.9
        elif count >= 20:
            amount *= 0.95
        totals[customer] = totals.get(customer, 0.0) + amount
    return totals


def print_report(totals):
    """A line for each customer, the largest amount first."""
    for customer, amount in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"{customer:<30} {amount:>12.2f}")'''

PROSE = (
    "Write a long story about the keeper of a lighthouse who finds a letter in a bottle.",
    "Explain in detail how rivers shape the land that they flow through.",
    "Describe a day in a small town by the sea before there were cars.",
    "Tell me about the history of bread, from the first fields to the bakeries of today.",
)


@dataclass
class Way:
    """A way to decode, and what its runs have given."""

    name: str
    options: dict[str, Any]
    speeds: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


def ways(draft: kvrun.Model | None) -> list[Way]:
    """Without drafts first."""
    found = [Way("no drafts", {}), Way("ngram", {"spec": "ngram"})]
    return found if draft is None else [*found, Way("draft model", {"spec": draft})]


def tasks(prompt: str | None) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Name of a task: its prompts and their options, one after the other for the runs."""
    if prompt is not None:
        return {"prompt": [(prompt, {"temperature": 0})]}
    greedy: dict[str, Any] = {"temperature": 0}
    return {
        "copy a letter": [(f"Copy this letter, word for word:\n\n{LETTER}", greedy)],
        "copy a program": [(f"Repeat this program exactly as it is:\n\n{PROGRAM}", greedy)],
        "prose": [(text, {"seed": seed}) for seed, text in enumerate(PROSE)],
    }


def answer(model: kvrun.Model, prompt: str, **options: Any) -> tuple[str, float, kvrun.session.Stats]:
    """(text, tokens a second after the first piece, statistics)"""
    session = model.session(kv=options.pop("kv", None))
    stream = session.stream(prompt, **options)
    pieces = [next(stream, "")]
    first, begun = session.stats.answer_tokens, time.perf_counter()
    pieces += stream
    seconds = time.perf_counter() - begun
    return "".join(pieces), (session.stats.answer_tokens - first) / seconds, session.stats


def measure(model: kvrun.Model, draft: kvrun.Model | None, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each task and way."""
    prompt = None if args.prompt is None else Path(args.prompt).read_text(encoding="utf-8")
    rows = []
    for task, prompts in tasks(prompt).items():
        tried, same = ways(draft), True
        for run in range(args.runs):
            text, given = prompts[run % len(prompts)]
            expected = None
            for way in tried:
                found, speed, stats = answer(
                    model, text, kv=args.kv, max_tokens=args.tokens, ignore_eos=True, **given, **way.options
                )
                expected = found if expected is None else expected
                same = same and found == expected
                way.speeds.append(speed)
                way.drafted += stats.drafted_tokens
                way.accepted += stats.accepted_tokens
        for way in tried:
            rows.append(
                {
                    "task": task,
                    "spec": way.name,
                    "tokens_per_second": statistics.median(way.speeds),
                    "ratio": statistics.median(a / b for a, b in zip(way.speeds, tried[0].speeds, strict=True)),
                    "drafted_tokens": way.drafted,
                    "accepted_tokens": way.accepted,
                    "same_text": same,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| task | drafts | tokens a second | ratio | drafted | accepted |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["task"], row["spec"], f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}"]
        cells += [f"{row['drafted_tokens']:,}", f"{row['accepted_tokens']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the same text -----------------------------------------------------------------------------------


def seeded(number: int) -> tuple[str, dict[str, Any]]:
    """A prompt and its options, both by this number."""
    rng = random.Random(number)
    words = [word for word in f"{LETTER} {PROGRAM}".split() if word.isalpha()]
    part = " ".join(rng.sample(words, rng.randint(5, 60)))
    prompt = rng.choice(["Repeat: {0}", "Continue: {0} {0}", "{0}", "List every word of this: {0}"]).format(part)
    options: dict[str, Any] = {
        "seed": number,
        "temperature": rng.choice([0, 0, 0.3, 0.8, 1.2]),
        "repeat_penalty": rng.choice([1, 1, 1.1, 1.3]),
        "top_k": rng.choice([0, 40]),
        "kv": rng.choice(["f32", "f16", "q8", "q4", "q2"]),
        "raw": rng.random() < 0.3,
        "ignore_eos": rng.random() < 0.5,
        "stop": rng.choice([[], [], ["the", "ing"], ["\n\n"]]),
    }
    return prompt, options


def check(model: kvrun.Model, draft: kvrun.Model | None, args: argparse.Namespace) -> bool:
    """Whether answers to so many prompts are the same in all ways; says which are not."""
    others, different, drafted, accepted = ways(draft)[1:], 0, 0, 0
    for number in range(args.first, args.first + args.check):
        prompt, options = seeded(number)
        expected, _, plain = answer(model, prompt, max_tokens=args.tokens, **options)
        for way in others:
            text, _, stats = answer(model, prompt, max_tokens=args.tokens, **options, **way.options)
            drafted, accepted = drafted + stats.drafted_tokens, accepted + stats.accepted_tokens
            if text != expected or stats.answer_tokens != plain.answer_tokens:
                different += 1
                print(f"prompt {number}, {way.name}: another text")
    print(
        f"{args.check} prompts: {args.check * len(others) - different} of {args.check * len(others)} answers are the "
        f"same; {accepted:,} of {drafted:,} drafted tokens accepted"
    )
    return not different


# --- the command -------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="a model file of kvrun (the small default model)")
    add("--draft", metavar="MODEL", help="a model file that drafts, too")
    add("--prompt", metavar="FILE", help="measure with the prompt in this file alone, at temperature 0")
    add("--tokens", type=int, default=200, help="of each answer (200)")
    add("--runs", type=int, default=5, help="of each way (5)")
    add("--kv", default="q8", help="format of the cache (q8)")
    add("--threads", type=int, help="(the CPUs that this process may use)")
    add("--check", type=int, metavar="N", help="compare the answers to N prompts instead")
    add("--first", type=int, default=0, metavar="N", help="number of the first of them (0)")
    add("--json", metavar="FILE", help="write the figures there")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        model = kvrun.load(args.model or default_model(), threads=args.threads)
        draft = None if args.draft is None else model.draft_model(args.draft)
        if args.check is not None:
            return 0 if check(model, draft, args) else 1
        rows = measure(model, draft, args)
        print(table(rows))
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
        if all(row["same_text"] for row in rows):
            return 0
        print("speculation: answers with drafts are not those without", file=sys.stderr)
    except (kvrun.KvrunError, OSError, UnicodeError) as error:
        print(f"speculation: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
