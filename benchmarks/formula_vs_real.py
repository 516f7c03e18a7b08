"""The formula against real DeepSpeed on CPU ranks; writes reports/formula_vs_real.md.

    python -m benchmarks.formula_vs_real

Every configuration of `simulated_vs_real` and more, run by the real engine on real tensors and gloo ranks; the formula
answers the same question. Rank 0 on both sides. No case is left out: one that fails is a row that says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.simulated_vs_real import FAMILIES, SMALL, Case, cases, request_of
from zplan.memory.estimate import estimate_memory
from zplan.model_probe import probe_config
from zplan.simulate.reference import run_on_real_ranks
from zplan.simulate.run import installed_versions
from zplan.simulate.worker import import_libraries
from zplan.zero_config import ZeroConfig

REPORT = Path(__file__).parents[1] / "reports" / "formula_vs_real.md"
PHASES = ("init", "forward", "backward", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case: peak and phases on both sides."""

    case: Case
    formula: dict[str, int]
    real: dict[str, int]
    error: str = ""

    @property
    def peak_error(self) -> float:
        return max(self.formula[phase] for phase in PHASES) / max(self.real[phase] for phase in PHASES) - 1


def all_cases() -> Iterator[Case]:
    """The simulator's grid, and more ranks."""
    yield from cases()
    for world_size in (3, 4):
        for stage in (1, 2, 3):
            yield Case(name=f"{world_size} ranks", world_size=world_size, zero=ZeroConfig(stage=stage, **SMALL))  # type: ignore[arg-type]


def compare(case: Case) -> Row:
    request = replace(request_of(case), cuda_answers=True)
    shape = probe_config(FAMILIES[case.family], name=case.family)
    estimate = estimate_memory(shape, request.recipe, request.choice, request.cluster, rank=0)
    formula = {phase: estimate.gpu.phases[phase] for phase in PHASES}  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder:
        try:
            real = run_on_real_ranks(request, Path(folder))
        except RuntimeError as error:
            return Row(case=case, formula=formula, real={}, error=str(error))
    return Row(case=case, formula=formula, real={phase: real.allocated_phases.get(phase, 0) for phase in PHASES})


def render(rows: list[Row]) -> str:
    """Summary first, then every row."""
    done = [row for row in rows if not row.error]
    errors = sorted(abs(row.peak_error) for row in done)
    lines = [
        "# The formula against real DeepSpeed on CPU ranks",
        "",
        f"`python -m benchmarks.formula_vs_real`, {time.strftime('%Y-%m-%d')}, "
        + ", ".join(f"{name} {version}" for name, version in installed_versions().items())
        + ". Two optimizer steps, 64 tokens, models of 0.2 M parameters, bf16; rank 0, live tensor bytes.",
        "",
        f"{len(rows)} of the grid's {len(list(all_cases()))} configurations were tried,"
        f" {len(done)} ran. |error| of the peak over all phases: median"
        f" {statistics.median(errors):.2%}, 90th percentile {errors[int(0.9 * (len(errors) - 1))]:.2%}, largest"
        f" {errors[-1]:.2%}; within 3 %: {sum(error <= 0.03 for error in errors)}."
        " The goal is a median of 0.5 % and a largest of 3 %.",
        "",
        "| stage | method | model | ranks | case | formula | real | peak | init | forward | backward | step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(table_line(row) for row in rows),
        "",
    ]
    return "\n".join(lines)


def table_line(row: Row) -> str:
    case = row.case
    head = f"| {case.zero.stage} | {case.method} | {case.family} | {case.world_size} | {case.name} |"
    if row.error:
        return f"{head} {row.error.replace('|', '/')[:160]} | | | | | | |"
    phases = " | ".join(f"{row.formula[phase] / max(row.real[phase], 1) - 1:+.2%}" for phase in PHASES)
    peaks = f"{max(row.formula.values())} | {max(row.real.values())} | {row.peak_error:+.2%}"
    return f"{head} {peaks} | {phases} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--stage", type=int, default=None)
    arguments = parser.parse_args()
    import_libraries()
    rows = []
    for case in all_cases():
        if arguments.only in case.name and arguments.stage in (None, case.zero.stage):
            rows.append(compare(case))
            print(table_line(rows[-1]), file=sys.stderr, flush=True)
            arguments.out.parent.mkdir(exist_ok=True)
            arguments.out.write_text(render(rows))


if __name__ == "__main__":
    main()
