"""How many trials a search needs until it is within 3 % of the best: zplan against random, grid, TPE and DeepSpeed's autotuner.

    python -m benchmarks.tuner_search [--seeds 3] [--budget 40] [--seconds 450]      writes reports/tuner_search.md

The world: the formulas of zplan.memory and zplan.speed, bent. Every kind of configuration (stage, offload, recomputation,
micro-batch, overlap, bucket size, number of GPUs) gets its own hidden factor on speed and on memory, and every trial
scatters by 2 %. zplan sees the unbent formula; the others see only their trials. All ask the same world with the same
seeds. The best is the best, without noise, of 2000 random configurations, a grid of the first-order knobs, and a climb
of 500 steps from there. Answers and finished rows are kept in .cache/benchmarks: a run that was stopped goes on.

Limits: the hidden factors multiply, as zplan's model of a machine assumes too; where errors interact in other ways, more
trials are needed. A trial costs one whatever it takes, so what pruning saves is not counted.
"""  # noqa: E501

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.tuner_rivals import deepspeed_autotuner, grid_search, random_search, tpe_search
from benchmarks.tuner_world import FOLDER, PROBLEMS, World, make_worlds, reference, source_digest
from zplan.files import save_text
from zplan.planner import rank_candidates
from zplan.tuner.ledger import Record
from zplan.tuner.propose import Proposer
from zplan.tuner.screen import Screen
from zplan.zero_config import Choice

WITHIN = 0.97
Method = Callable[[World, int, random.Random], Iterator[Choice]]
"""Yields configurations to try; gets the answer through `World.trial` itself."""


def zplan_search(world: World, seed: int, noise: random.Random) -> Iterator[Choice]:
    """The tuner's own proposer, as run_study drives it."""
    template = world.spec(world.space.choice({"world_size": 1, "stage": 0}))
    screen = Screen(world.space, world, template)
    ranking = [item.choice for item in rank_candidates(world.shape, world.recipe, world.cluster)]
    proposer = Proposer(screen, world.shape, ranking, seed=seed)
    records: list[Record] = []
    while (proposal := proposer.next(records, ())) is not None:
        result = world.trial(proposal.choice, noise)
        key = world.space.key(proposal.choice)
        records.append(Record(key=key, origin=proposal.origin, choice=proposal.choice, result=result))
        yield proposal.choice


METHODS: dict[str, Method] = {
    "zplan": zplan_search,
    "random": random_search,
    "grid": grid_search,
    "TPE": tpe_search,
    "DeepSpeed autotuner": deepspeed_autotuner,
}
WORLD_SOURCE = (
    "zplan/memory",
    "zplan/speed",
    "zplan/catalog",
    "zplan/backends/formula.py",
    "zplan/tuner/space.py",
    "zplan/tuner/ranges.py",
    "zplan/tuner/pool.py",
    "benchmarks/tuner_world.py",
)
SOURCES = {
    "zplan": (
        "zplan/tuner/propose.py",
        "zplan/tuner/surrogate.py",
        "zplan/tuner/screen.py",
        "zplan/planner.py",
        "zplan/candidates.py",
    ),
    **dict.fromkeys(("random", "grid", "TPE", "DeepSpeed autotuner"), ("benchmarks/tuner_rivals.py",)),
}
"""What decides a method's row, besides the world."""


class Rows:
    """Finished rows, by world, method and the code that decides them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if path.exists():
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.known = {entry["key"]: entry["answer"] for entry in entries}

    def get(self, key: str, work: Callable[[], Any]) -> Any:
        """The row of a key; worked out and kept if there is none."""
        if key not in self.known:
            self.known[key] = work()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"key": key, "answer": self.known[key]}) + "\n")
        return self.known[key]


def run_world(world: World, rows: Rows, *, budget: int, methods: list[str]) -> dict[str, int | None]:
    """Trials until within 3 % of the best, per method; None is not within the budget."""
    truth = source_digest(*WORLD_SOURCE)
    place = f"{world.name} {world.seed} {truth}"
    goal = WITHIN * rows.get(f"reference {place}", lambda: world.speed(reference(world)))

    def count(name: str) -> int | None:
        choices = itertools.islice(METHODS[name](world, world.seed, random.Random(f"{world.seed}/{name}")), budget)
        return next((i + 1 for i, choice in enumerate(choices) if world.speed(choice) >= goal), None)

    return {
        name: rows.get(f"{name} {budget} {source_digest(*SOURCES[name])} {place}", lambda name=name: count(name))
        for name in methods
    }


def render(found: dict[str, list[dict[str, int | None]]], *, budget: int, seeds: int) -> str:
    """The report."""
    everything = {name: [_number(row[name], budget) for rows in found.values() for row in rows] for name in METHODS}
    whole = sum(len(rows) for rows in found.values()) == len(PROBLEMS) * seeds
    lines = [
        "# Trials until within 3 % of the best", "",
        f"`python -m benchmarks.tuner_search`: {len(found)} of {len(PROBLEMS)} problems x {seeds} seeds, {budget}"
        f" trials each{'' if whole else '; not finished'}. A cell is the median over the seeds (and the worst); a dash:"
        " not within the budget.", "",
        f"- zplan: median {_count(median(everything['zplan']), budget)} over all runs (goal 12),"
        f" {_within(everything['zplan'], budget)} within the budget.", "",
        "| problem | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|",
    ]  # fmt: skip
    for problem, rows in found.items():
        cells = []
        for name in METHODS:
            counts = [_number(row[name], budget) for row in rows]
            cells.append(f"{_count(median(counts), budget)} ({_count(max(counts), budget)})")
        lines.append(f"| {problem} | " + " | ".join(cells) + " |")
    lines += [
        "| **median of all runs** | " + " | ".join(_count(median(c), budget) for c in everything.values()) + " |",
        "| within the budget | " + " | ".join(_within(c, budget) for c in everything.values()) + " |",
        "| within 12 trials | " + " | ".join(_within(c, 12) for c in everything.values()) + " |",
    ]
    return "\n".join([*lines, "", "The world: " + (__doc__ or "").partition("The world: ")[2].strip(), ""])


def _number(count: int | None, budget: int) -> int:
    return budget + 1 if count is None else count


def _within(counts: list[int], budget: int) -> str:
    return f"{sum(n <= budget for n in counts)} of {len(counts)}"


def _count(number: float, budget: int) -> str:
    return "-" if number > budget else f"{number:g}"


def main() -> None:
    """Run everything that is not known yet and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long; run again to go on")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="only these; writes no report")
    parser.add_argument("--out", type=Path, default=Path("reports/tuner_search.md"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="optuna")
    for sources in (WORLD_SOURCE, *SOURCES.values()):
        source_digest(*sources)  # of the code that runs, whatever is edited meanwhile
    started, kept = time.monotonic(), Rows(FOLDER / "tuner_search.jsonl")
    found: dict[str, list[dict[str, int | None]]] = {}
    for world in (world for problem in PROBLEMS for world in make_worlds(problem, range(options.seeds))):
        if time.monotonic() - started > options.seconds:
            break
        row = run_world(world, kept, budget=options.budget, methods=options.methods)
        found.setdefault(world.name, []).append(row)
        print(world.name, world.seed, row, f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    if options.methods == list(METHODS):
        save_text(render(found, budget=options.budget, seeds=options.seeds), options.out)


if __name__ == "__main__":
    main()
