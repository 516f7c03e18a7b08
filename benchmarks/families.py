"""Every family that people fine-tune: does zplan answer, and how far is the formula from the simulation?

    python -m benchmarks.families [--only Llama] [--every]

Writes reports/families.md. Real widths, few layers (family_configs.py). Parameters are counted on transformers' own
model on the meta device, adapters on PEFT's.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.family_configs import FAMILIES
from benchmarks.measured import Measured, summary
from zplan.errors import ZplanError
from zplan.hardware import Cluster, Gpu, Host
from zplan.memory.estimate import estimate_memory
from zplan.memory.families import default_attention
from zplan.memory.trainable import layout
from zplan.model_probe import shape_of_config
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.simulate.client import WorkerClient
from zplan.simulate.request import SimulationRequest
from zplan.units import GIB
from zplan.zero_config import BatchSizes, Choice, ZeroConfig

REPORT = Path(__file__).parents[1] / "reports" / "families.md"
PHASES = ("init", "forward", "backward", "step")
RANKS = 8
SCANS = ("Falcon H1", "Falcon Mamba", "Granite 4", "Jamba", "Mamba", "Mamba 2", "Nemotron H")
"""Families whose scan goes through a sequence position by position in Python: their simulation takes minutes."""
Question = tuple[int, str, bool]
"""Stage, method, checkpointing."""
QUESTIONS: tuple[Question, ...] = ((2, "full", False), (3, "lora", False))
"""Nothing is recomputed, so that what the layers keep is seen."""
EVERY: tuple[Question, ...] = tuple((s, m, c) for s in (2, 3) for m in ("full", "lora") for c in (True, False))


@dataclass(slots=True)
class Row:
    """One family."""

    family: str
    model_type: str
    answers: str = "modelled"
    """`modelled`, or what is not, or why there is no answer."""
    parameters: str = ""
    adapters: str = ""
    errors: dict[Question, dict[str, float] | str] = field(default_factory=dict)
    """Of each question, by phase and `peak`: formula / simulation - 1; or why it could not be simulated."""


def request_of(shape: ModelShape, question: Question, attention: str) -> SimulationRequest:
    stage, method, checkpointing = question
    batch = BatchSizes(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1, world_size=RANKS)
    return SimulationRequest(
        config=shape.config,
        recipe=Recipe(
            model=shape.name, method=method, max_length=1024, train_batch_size=2 * RANKS,  # type: ignore[arg-type]
            attention=attention,  # type: ignore[arg-type]
        ),
        choice=Choice(
            zero=ZeroConfig(stage=stage, reduce_bucket_size=50_000_000), batch=batch,  # type: ignore[arg-type]
            gradient_checkpointing=checkpointing,
        ),
        cluster=Cluster(
            gpu=Gpu(name="card", total_bytes=1410 * GIB, free_bytes=1400 * GIB),
            host=Host(total_bytes=8192 * GIB, available_bytes=8192 * GIB), gpus_per_node=RANKS,
        ),
    )  # fmt: skip


def compare(shape: ModelShape, request: SimulationRequest, measured: Measured) -> dict[str, float] | str:
    found = estimate_memory(shape, request.recipe, request.choice, request.cluster, rank=0).gpu.phases
    answer = measured.answer(request)
    if "error" in answer:
        return str(answer["error"])
    formula = {phase: found[phase] for phase in PHASES}  # type: ignore[index]
    simulated = {phase: answer["allocated_phases"].get(phase, 0) for phase in PHASES}
    errors = {phase: formula[phase] / simulated[phase] - 1 for phase in PHASES}
    return errors | {"peak": max(formula.values()) / max(simulated.values()) - 1}


def counts(shape: ModelShape) -> tuple[str, str]:
    """Whether parameters and adapters are as many as transformers' and PEFT's."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from zplan.simulate.trainer import lora_config, model_config

    recipe = Recipe(model=shape.name, method="lora")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(dict(shape.config)))
        every = model.num_parameters()
        adapted = get_peft_model(model, lora_config(recipe), autocast_adapter_dtype=False)
    trains = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    return _count(shape.num_parameters, every), _count(layout(shape, recipe).trainable_numel, trains)


def _count(formula: int, real: int) -> str:
    return "equal" if formula == real else f"{formula:,} of {real:,}"


def row_of(family: str, questions: tuple[Question, ...], measured: Measured, *, asks_all: bool = False) -> Row:
    """The answers about one family.

    Args:
        asks_all: what the formula does not know is simulated too.
    """
    row = Row(family=family, model_type=str(FAMILIES[family]["model_type"]))
    try:
        shape = shape_of_config(FAMILIES[family], name=family)
    except ZplanError as error:
        row.answers = f"refused: {error.what.partition(': ')[2]}"
        return row
    row.model_type = shape.model_type
    try:
        row.parameters, row.adapters = counts(shape)
    except Exception as error:  # whatever a library raises is what the row says
        row.adapters = _short(f"{type(error).__name__}: {error}")
    for question in questions:
        request = request_of(shape, question, default_attention(shape.model_type))
        notes = estimate_memory(shape, request.recipe, request.choice, request.cluster).notes
        row.answers = _answer(row.answers, notes)
        if family not in SCANS and (asks_all or row.answers == "modelled"):
            row.errors[question] = compare(shape, request, measured)
    return row


def _answer(before: str, notes: tuple[str, ...]) -> str:
    """`modelled`, or the first thing that is not."""
    missing = [note for note in notes if note.startswith("not modelled: ")]
    return before if before != "modelled" or not missing else _short(missing[0])


def _short(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:110]


def render(rows: list[Row], questions: tuple[Question, ...], seconds: float) -> str:
    """Summary first, then every family."""
    modelled = [row for row in rows if row.answers == "modelled"]
    found = [errors for row in modelled for errors in row.errors.values() if isinstance(errors, dict)]
    peaks = [errors["peak"] for errors in found]
    named = [f"ZeRO-{stage} {method}{', checkpointing' if again else ''}" for stage, method, again in questions]
    lines = [
        "# Families",
        "",
        "Which families that people fine-tune does zplan know, and how far is the formula from the simulation there?",
        "",
        f"`python -m benchmarks.families`, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s of CPU: a model of each family"
        " at real widths with 2 to 8 layers, 8 ranks, micro-batch 2, 1024 tokens, sdpa where the family has it.",
        "",
        f"- {len(rows)} families; {len(modelled)} are modelled; the others are named and never called `fits`.",
        f"- Parameters as many as transformers has on the meta device: {sum(row.parameters == 'equal' for row in rows)}"
        f" of {sum(bool(row.parameters) for row in rows)}; adapters as many as PEFT makes:"
        f" {sum(row.adapters == 'equal' for row in rows)} of {sum(bool(row.adapters) for row in rows)}.",
        f"- Peak |error| of the modelled ones: {summary(peaks)}; lowest {min(peaks):+.2%}, highest {max(peaks):+.2%}."
        " Goal: median 1 %, largest 4 %.",
        *(f"- {phase} |error|: {summary([errors[phase] for errors in found])}. Goal: 5 %." for phase in PHASES),
        "",
        "Errors are formula / simulation - 1 of the peak, and of the phase that is furthest off. The formula was"
        " written against these very rows. Where a library raises in the simulation, it raises in training too, or its"
        " routing depends on values that fake tensors do not have.",
        "",
        f"| family | model_type | answer | parameters | adapters | {' | '.join(named)} |",
        "|" + "---|" * (5 + len(named)),
        *(
            f"| {row.family} | {row.model_type} | {row.answers} | {row.parameters} | {row.adapters} |"
            f" {' | '.join(_cell(row.errors.get(question)) for question in questions)} |"
            for row in rows
        ),
        "",
    ]
    return "\n".join(lines)


def _cell(errors: dict[str, float] | str | None) -> str:
    if errors is None:
        return ""
    if isinstance(errors, str):
        return _short(errors)
    phase = max(PHASES, key=lambda name: abs(errors[name]))
    return f"{errors['peak']:+.2%} ({phase} {errors[phase]:+.2%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--only", default="", help="families whose name contains this; writes no report")
    parser.add_argument(
        "--every", action="store_true", help="both methods at both stages, with and without recomputation"
    )
    arguments = parser.parse_args()
    questions = EVERY if arguments.every else QUESTIONS
    asked = [family for family in FAMILIES if arguments.only.lower() in family.lower()]
    with WorkerClient() as client:
        measured = Measured("families", client.ask, errors=(ZplanError,))
        rows = [
            row_of(family, questions, measured, asks_all=bool(arguments.only or arguments.every)) for family in asked
        ]
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    text = render(rows, questions, sum(one.ru_utime + one.ru_stime for one in used))
    print(text)
    if not arguments.only and not arguments.every:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
