"""The formula against real DeepSpeed on CPU ranks; writes reports/formula_vs_real.md.

    python -m benchmarks.formula_vs_real [--worst 20]

Every configuration of `simulated_vs_real` and more, run by the real engine on real tensors and gloo ranks; the formula
answers the same question. Rank 0 on both sides. No case is left out: one that fails is a row that says so. Ranks are
forks of one process that has imported everything; runs are kept in .cache/benchmarks, so that a stopped grid goes on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.formula_vs_simulation import verdict
from benchmarks.measured import Measured, summary
from benchmarks.simulated_vs_real import FAMILIES, SMALL, Case, cases, request_of
from zplan.memory.estimate import estimate_memory
from zplan.model_probe import probe_config
from zplan.simulate.reference import run_on_real_ranks
from zplan.simulate.report import SimulationReport
from zplan.simulate.request import SimulationRequest
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
    """The simulator's grid but for what an estimate calls not modelled (AutoTP at stage 3), and more ranks."""
    yield from (case for case in cases() if case.autotp_size == 1 or case.zero.stage < 3)
    for world_size in (3, 4, 8):
        for stage in (1, 2, 3):
            yield Case(name=f"{world_size} ranks", world_size=world_size, zero=ZeroConfig(stage=stage, **SMALL))  # type: ignore[arg-type]


def real_ranks(request: SimulationRequest) -> SimulationReport:
    """Rank 0's report of a real run."""
    with tempfile.TemporaryDirectory() as folder:
        return run_on_real_ranks(request, Path(folder))


def real_runs() -> Measured:
    """Real runs of before and of now."""
    return Measured("formula_vs_real", real_ranks, errors=(RuntimeError,))


def compare(case: Case, measured: Measured) -> Row:
    request = replace(request_of(case), cuda_answers=True)
    shape = probe_config(FAMILIES[case.family], name=case.family)
    estimate = estimate_memory(shape, request.recipe, request.choice, request.cluster, rank=0)
    formula = {phase: estimate.gpu.phases[phase] for phase in PHASES}  # type: ignore[index]
    real = measured.answer(request)
    if "error" in real:
        return Row(case=case, formula=formula, real={}, error=real["error"])
    return Row(case=case, formula=formula, real={phase: real["allocated_phases"].get(phase, 0) for phase in PHASES})


def render(rows: list[Row]) -> str:
    """Summary first, then every row."""
    done = [row for row in rows if not row.error]
    errors = [row.peak_error for row in done]
    phases = [row.formula[phase] / max(row.real[phase], 1) - 1 for row in done for phase in PHASES]
    lines = [
        "# The formula against real DeepSpeed on CPU ranks",
        "",
        "How far is `zplan estimate` from what a rank of a real DeepSpeed run holds in tensors?",
        "",
        f"`python -m benchmarks.formula_vs_real`, {time.strftime('%Y-%m-%d')}, "
        + ", ".join(f"{name} {version}" for name, version in installed_versions().items())
        + ". Two optimizer steps, 64 tokens, models of 0.2 M parameters, bf16, 1 to 8 gloo ranks; rank 0, live tensor"
        " bytes in 512-byte blocks, which the formula does not round.",
        "",
        f"- {len(rows)} of the grid's {len(list(all_cases()))} configurations, {len(done)} ran.",
        f"- Peak |error|: {summary(errors)}; within 3 %: {sum(abs(error) <= 0.03 for error in errors)}."
        f" Goal: median 0.5 %, largest 3 %: {verdict(errors, 0.005, 0.03)}.",
        f"- All phases |error|: {summary(phases)}.",
        "",
        "Errors are formula / real - 1. Not in the grid: AutoTP at stage 3, which an estimate says is not modelled and"
        " never calls `fits`.",
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
    parser.add_argument("--only", default="", help="cases whose name contains this; writes no report")
    parser.add_argument("--worst", type=int, default=0, help="print so many rows of the largest peak error")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long; run again to go on")
    arguments = parser.parse_args()
    import_libraries()
    started, measured = time.monotonic(), real_runs()
    rows: list[Row] = []
    for case in all_cases():
        if arguments.only in case.name:
            rows.append(compare(case, measured))
        if time.monotonic() - started > arguments.seconds:
            break
    for row in sorted((row for row in rows if not row.error), key=lambda row: -abs(row.peak_error))[: arguments.worst]:
        print(table_line(row))
    print("\n".join(render(rows).splitlines()[6:9]), file=sys.stderr)
    if not arguments.only:
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(render(rows))


if __name__ == "__main__":
    main()
