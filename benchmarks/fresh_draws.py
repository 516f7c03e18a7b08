"""The formula against the simulation on configurations that nobody has looked at; prints, and writes no report.

    python -m benchmarks.fresh_draws 100 --seed 1 [--kind one-rank|wide] [--worst 20]

Every family of `formula_vs_simulation` and every stage in turn; the other knobs are drawn. With another seed they are
others. Rows that could not be simulated say why; none is left out.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from typing import Any

from benchmarks.formula_case import Case
from benchmarks.formula_cases import MODELS, draw
from benchmarks.formula_vs_simulation import PHASES, Row, compare, table_line
from benchmarks.measured import Measured, summary
from zplan.errors import ZplanError
from zplan.simulate.client import WorkerClient
from zplan.zero_config import OffloadOptimizer, OffloadParam

SMALL_MODELS = ("smollm2-135m", "qwen2.5-0.5b", "gpt2", "pythia-410m", "llama-3.2-1b", "gemma-3-1b", "bloom-560m")
WITHOUT_SDPA = ("bloom",)


def any_case(seed: int, number: int) -> Case:
    """All families and stages, one after the other; what the report's grid never turns is turned now and then."""
    chance = random.Random(f"fresh {seed} {number}")
    stage, model = number % 4, MODELS[number % len(MODELS)]
    case = _with_eager_where_needed(draw(chance, model, stage))
    recipe: dict[str, Any] = {}
    if chance.random() < 0.15 and stage != 3:
        recipe["optimizer"] = "muon"
    if case.method == "lora" and chance.random() < 0.25:
        recipe["lora_dropout"] = 0.05
    states = case.zero.offload_optimizer
    if states.device == "cpu" and stage == 3:
        pins, supers = chance.random() < 0.5, chance.random() < 0.3
        states = replace(states, ratio=chance.choice((0.5, 1.0)), super_offload=supers, pin_memory=pins)
    return replace(case, adapter=recipe, zero=replace(case.zero, offload_optimizer=states))


def one_rank_case(seed: int, number: int) -> Case:
    """ZeRO-3 on one rank with offloaded parameters."""
    chance = random.Random(f"one rank {seed} {number}")
    pick = chance.choice
    case = _with_eager_where_needed(draw(chance, pick(SMALL_MODELS), 3))
    zero = replace(
        case.zero, offload_param=_param(chance), offload_optimizer=_states(chance),
        sub_group_size=pick((1_000_000, 10_000_000, 1_000_000_000)),
    )  # fmt: skip
    return replace(case, zero=zero, world_size=1, method=pick(("full", "lora")))


def _param(chance: random.Random) -> OffloadParam:
    if chance.random() < 0.5:
        return OffloadParam(device="cpu")
    count, room = chance.choice((5, 40)), chance.choice((0, 10_000_000, 1_000_000_000))
    return OffloadParam(
        device="nvme", nvme_path="/nvme", buffer_size=300_000_000, buffer_count=count, max_in_cpu=room
    )  # fmt: skip


def _states(chance: random.Random) -> OffloadOptimizer:
    device = chance.choice(("none", "cpu", "nvme"))
    return OffloadOptimizer(device=device, nvme_path="/nvme")


def _with_eager_where_needed(case: Case) -> Case:
    return replace(case, attention="eager") if case.model.startswith(WITHOUT_SDPA) else case


def wide_case(seed: int, number: int) -> Case:
    """Sizes that nobody would choose, uneven worlds, other optimizers, dtypes and adapters."""
    chance = random.Random(f"wide {seed} {number}")
    pick = chance.choice
    case = _with_eager_where_needed(draw(chance, pick(MODELS), pick((0, 1, 2, 3, 3, 3))))
    zero, stage = case.zero, case.zero.stage
    recipe: dict[str, Any] = {"dtype": pick(("bf16", "bf16", "fp16", "fp32")), "max_grad_norm": pick((0.0, 1.0))}
    if not zero.offloads_optimizer:
        recipe["optimizer"] = pick(("adamw", "adamw", "sgd"))
    if stage:
        zero = replace(zero, reduce_bucket_size=pick((1, 1000, 123_457, 16_777_216, 3_000_000_000)))
    if stage == 3:
        zero = replace(
            zero, sub_group_size=pick((1_000_000, 123_456_789)),
            stage3_param_persistence_threshold=pick((0, 10_000, 10**10)),
            stage3_model_persistence_threshold=pick((0, 1_000_000, 50_000_000)),
            stage3_max_live_parameters=pick((1, 3_333_333, 10**12)), stage3_allgather_sequential=pick((True, False)),
        )  # fmt: skip
        if chance.random() < 0.2:
            zero = replace(zero, offload_optimizer=_states(chance))
            recipe["optimizer"] = "adamw"
    if case.method == "lora":
        recipe |= {"lora_r": pick((1, 64, 256)), "modules_to_save": pick(((), (), ("lm_head",), ("norm",)))}
    long, most = pick((1, 7, 333, 4097, 8192)), 40_000
    return replace(
        case, zero=zero, adapter=recipe, world_size=pick((1, 2, 3, 5, 6, 7, 48, 1024)), accumulation=pick((1, 3, 8)),
        max_length=long, micro_batch=min(pick((1, 3, 16)), most // long), layers=pick((1, 2, 3)),
    )  # fmt: skip


KINDS = {"any": any_case, "one-rank": one_rank_case, "wide": wide_case}


def report(rows: list[Row], worst: int) -> str:
    """The rows that are furthest off, then the distribution of the errors."""
    done = [row for row in rows if not row.error]
    phases = {phase: [row.phase_error(phase) for row in done] for phase in PHASES}
    ordered = sorted(done, key=lambda row: -max(abs(row.phase_error(phase)) for phase in PHASES))
    lines = [table_line(row) for row in ordered[:worst]]
    lines += [table_line(row) for row in rows if row.error]
    peaks = [row.peak_error for row in done]
    lines += [
        f"{len(rows)} configurations, {len(done)} simulated.",
        f"Peak |error|: {summary(peaks)}; lowest {min(peaks):+.2%}, highest {max(peaks):+.2%}.",
        *(f"{phase} |error|: {summary(errors)}." for phase, errors in phases.items()),
        f"Rows with a phase further off than 2 %: {sum(_is_off(row) for row in done)}.",
        f"Host |error|: {summary([row.host_error for row in done if row.host_error is not None])}.",
        f"Called `fits` where the allocator fails: {sum(row.unsafe for row in done)}.",
    ]
    return "\n".join(lines)


def _is_off(row: Row) -> bool:
    return any(abs(row.phase_error(phase)) > 0.02 for phase in PHASES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kind", choices=sorted(KINDS), default="any")
    parser.add_argument("--worst", type=int, default=20, help="print so many rows whose phases are furthest off")
    arguments = parser.parse_args()
    with WorkerClient() as client:
        measured = Measured("fresh_draws", client.ask, errors=(ZplanError,))
        cases = (KINDS[arguments.kind](arguments.seed, number) for number in range(arguments.count))
        print(report([compare(case, measured) for case in cases], arguments.worst))


if __name__ == "__main__":
    main()
