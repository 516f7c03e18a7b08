"""Simulated against real DeepSpeed on CPU ranks; writes reports/simulated_vs_real.md.

    python benchmarks/simulated_vs_real.py

Both sides run the same trainer code and the same tracker; one on fake tensors and a fake process group, the other on
real tensors and gloo. Both answer DeepSpeed's questions about asynchrony as CUDA does. No case is left out: one that
fails on either side is a row that says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

from zplan.hardware import Cluster, Gpu, Host
from zplan.recipe import Recipe
from zplan.simulate.reference import run_on_real_ranks, simulate_in_fork
from zplan.simulate.report import SimulationReport
from zplan.simulate.request import SimulationRequest
from zplan.simulate.run import installed_versions
from zplan.simulate.worker import import_libraries
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, OffloadParam, ZeroConfig

REPORT = Path(__file__).parents[1] / "reports" / "simulated_vs_real.md"
GIB = 1 << 30
SIZES = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False, **SIZES},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **SIZES},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None, **SIZES},
}
SMALL: dict[str, Any] = {
    "reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 20_000, "stage3_param_persistence_threshold": 100,
}  # fmt: skip
"""Sizes that matter to a model of 0.2 M parameters as the defaults matter to one of 7 B."""
CPU_OPTIMIZER, CPU_PARAM = OffloadOptimizer(device="cpu"), OffloadParam(device="cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row."""

    name: str
    family: str = "llama"
    method: str = "full"
    zero: ZeroConfig
    world_size: int = 2
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: bool = True
    loss: str = "nll"
    optimizer: str = "adamw"
    sequence_parallel_size: int = 1
    autotp_size: int = 1
    grad_accum_dtype: str | None = None


def cases() -> Iterator[Case]:
    """Stages x methods x families, then one knob at a time."""
    for family in FAMILIES:
        for method in ("full", "lora"):
            for stage in (0, 1, 2, 3):
                yield Case(name="base", family=family, method=method, zero=ZeroConfig(stage=stage, **SMALL))
    for stage in (1, 2, 3):
        zero = {"stage": stage, **SMALL}
        yield Case(name="one rank", world_size=1, zero=ZeroConfig(**zero))
        yield Case(name="accumulation 3", accumulation=3, zero=ZeroConfig(**zero))
        yield Case(name="no checkpointing", family="qwen2", checkpointing=False, zero=ZeroConfig(**zero))
        yield Case(name="overlap_comm", zero=ZeroConfig(**zero, overlap_comm=True))
        yield Case(name="offload_optimizer", zero=ZeroConfig(**zero, offload_optimizer=CPU_OPTIMIZER))
        yield Case(
            name="offload_optimizer, accumulation 2", family="mistral", accumulation=2,
            zero=ZeroConfig(**zero, offload_optimizer=CPU_OPTIMIZER),
        )  # fmt: skip
        yield Case(name="not contiguous", family="mistral", zero=ZeroConfig(**zero, contiguous_gradients=False))
        yield Case(name="default buckets", zero=ZeroConfig(stage=stage))
        yield Case(name="micro-batch 4", family="mistral", micro_batch=4, zero=ZeroConfig(**zero))
    for stage in (0, 1, 2, 3):
        yield Case(name="Muon", optimizer="muon", zero=ZeroConfig(stage=stage, **SMALL))
    yield from gradient_type_cases()
    yield Case(name="full logits", loss="full", zero=ZeroConfig(stage=2, **SMALL))
    yield Case(name="round_robin_gradients", zero=ZeroConfig(stage=2, round_robin_gradients=True, **SMALL))
    yield Case(name="no reduce_scatter", zero=ZeroConfig(stage=2, reduce_scatter=False, **SMALL))
    yield Case(name="bucket 2000", zero=ZeroConfig(stage=2, reduce_bucket_size=2000))
    yield from stage3_cases()
    yield from sequence_parallel_cases()
    yield from tensor_parallel_cases()


def gradient_type_cases() -> Iterator[Case]:
    """Gradients accumulated in fp32 below stage 3, on the device and offloaded."""
    for stage in (1, 2):
        base: dict[str, Any] = {"stage": stage, **SMALL}
        of_fp32: dict[str, Any] = {"grad_accum_dtype": "fp32"}
        yield Case(name="fp32 accumulation 2", accumulation=2, zero=ZeroConfig(**base), **of_fp32)
        offloaded = ZeroConfig(**base, offload_optimizer=CPU_OPTIMIZER)
        yield Case(name="fp32 accumulation 2, offload_optimizer", accumulation=2, zero=offloaded, **of_fp32)
        yield Case(
            name="fp32 accumulation 2, offload_optimizer, bucket 2000", accumulation=2, **of_fp32,
            zero=ZeroConfig(stage=stage, reduce_bucket_size=2000, overlap_comm=True, offload_optimizer=CPU_OPTIMIZER),
        )  # fmt: skip
    yield Case(
        name="offload_optimizer, accumulation 2, bucket 2000", accumulation=2,
        zero=ZeroConfig(stage=2, reduce_bucket_size=2000, offload_optimizer=CPU_OPTIMIZER),
    )  # fmt: skip


def stage3_cases() -> Iterator[Case]:
    """The knobs that only ZeRO-3 has."""
    base: dict[str, Any] = {"stage": 3, **SMALL}
    yield Case(name="offload_param", zero=ZeroConfig(**base, offload_param=CPU_PARAM))
    yield Case(
        name="offload both", family="qwen2",
        zero=ZeroConfig(**base, offload_param=CPU_PARAM, offload_optimizer=CPU_OPTIMIZER),
    )  # fmt: skip
    hpz = ZeroConfig(**base, zero_hpz_partition_size=2)
    yield Case(name="hpZ over pairs", world_size=4, zero=hpz)
    yield Case(name="hpZ over pairs, offload_param", world_size=4, zero=replace(hpz, offload_param=CPU_PARAM))
    yield Case(name="max_live 0", zero=ZeroConfig(**base, stage3_max_live_parameters=0))
    yield Case(name="max_live 50 000", family="qwen2", zero=ZeroConfig(**base, stage3_max_live_parameters=50_000))
    yield Case(name="max_reuse 0", zero=ZeroConfig(**base, stage3_max_reuse_distance=0))
    yield Case(name="prefetch 0", zero=ZeroConfig(**{**base, "stage3_prefetch_bucket_size": 0}))
    yield Case(name="persist all", zero=ZeroConfig(**{**base, "stage3_param_persistence_threshold": 10**6}))
    yield Case(name="sub_group 10 000", family="mistral", zero=ZeroConfig(**base, sub_group_size=10_000))
    yield Case(name="lora, no checkpointing", method="lora", checkpointing=False, zero=ZeroConfig(**base))
    yield Case(name="lora, offload_optimizer", method="lora", zero=ZeroConfig(**base, offload_optimizer=CPU_OPTIMIZER))
    yield Case(name="all-reduce fetch", zero=ZeroConfig(**base, stage3_use_all_reduce_for_fetch_params=True))


def sequence_parallel_cases() -> Iterator[Case]:
    """Ulysses over all ranks, also with fewer heads of keys and values than ranks.

    gloo cannot do several groups: torch 2.13.0, distributed/nn/functional.py (_AlltoAll) takes a rank of the group for
    one of the world, in the backward of the loss.
    """
    both: dict[str, Any] = {"sequence_parallel_size": 2}
    for stage in (0, 1, 2, 3):
        yield Case(name="Ulysses", zero=ZeroConfig(stage=stage, **SMALL), **both)
    stage2, stage3 = ZeroConfig(stage=2, **SMALL), ZeroConfig(stage=3, **SMALL)
    yield Case(name="Ulysses, heads repeated", world_size=4, sequence_parallel_size=4, checkpointing=False, zero=stage3)
    yield Case(name="Ulysses", method="lora", family="qwen2", accumulation=2, zero=stage3, **both)
    yield Case(name="Ulysses, full logits, micro-batch 2", loss="full", micro_batch=2, zero=stage2, **both)
    yield Case(
        name="Ulysses, offload_optimizer", zero=ZeroConfig(stage=3, **SMALL, offload_optimizer=CPU_OPTIMIZER), **both
    )


def tensor_parallel_cases() -> Iterator[Case]:
    """AutoTP over all ranks and over two pairs of them; with untied heads under full logits, as TRL's loss needs it."""
    for stage in (0, 1, 2, 3):
        yield Case(name="AutoTP", loss="full", autotp_size=2, zero=ZeroConfig(stage=stage, **SMALL))
    yield Case(name="AutoTP, tied", family="qwen2", accumulation=2, autotp_size=2, zero=ZeroConfig(stage=2, **SMALL))
    for stage in (1, 2, 3):
        yield Case(
            name="AutoTP, two pairs", family="qwen2", world_size=4, autotp_size=2, checkpointing=False,
            zero=ZeroConfig(stage=stage, **SMALL),
        )  # fmt: skip


def request_of(case: Case) -> SimulationRequest:
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=case.micro_batch,
        gradient_accumulation_steps=case.accumulation,
        world_size=case.world_size,
        sequence_parallel_size=case.sequence_parallel_size,
        autotp_size=case.autotp_size,
    )
    return SimulationRequest(
        config=FAMILIES[case.family],
        recipe=Recipe(
            model=case.family, method=case.method, max_length=64, loss=case.loss,  # type: ignore[arg-type]
            train_batch_size=batch.train_batch_size, optimizer=case.optimizer,  # type: ignore[arg-type]
            grad_accum_dtype=case.grad_accum_dtype,  # type: ignore[arg-type]
        ),
        choice=Choice(zero=case.zero, batch=batch, gradient_checkpointing=case.checkpointing),
        cluster=Cluster(
            gpu=Gpu(name="CPU rank", kind="cpu", total_bytes=8 * GIB, free_bytes=8 * GIB),
            host=Host(total_bytes=16 * GIB, available_bytes=16 * GIB),
            gpus_per_node=case.world_size,
        ),
        cuda_answers=True,
        initialise=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case, compared; `error` says which side failed and why."""

    case: Case
    simulated_bytes: int = 0
    real_bytes: int = 0
    worst_phase: str = ""
    worst_phase_error: float = 0.0
    collectives_equal: bool = False
    error: str = ""

    @property
    def peak_error(self) -> float:
        return self.simulated_bytes / self.real_bytes - 1 if self.real_bytes else float("nan")


def compare(case: Case) -> Row:
    request = request_of(case)
    with tempfile.TemporaryDirectory() as folder:
        try:
            simulated = simulate_in_fork(request, Path(folder))
        except RuntimeError as error:
            return Row(case=case, error=f"simulated: {error}")
        try:
            real = run_on_real_ranks(request, Path(folder))
        except RuntimeError as error:
            return Row(case=case, error=f"real: {error}")
    errors = phase_errors(simulated, real)
    worst = max(errors, key=lambda phase: abs(errors[phase]))
    return Row(
        case=case,
        simulated_bytes=simulated.gpu_allocated_bytes,
        real_bytes=real.gpu_allocated_bytes,
        worst_phase=worst,
        worst_phase_error=errors[worst],
        collectives_equal=simulated.collectives == real.collectives,
    )


def phase_errors(simulated: SimulationReport, real: SimulationReport) -> dict[str, float]:
    return {
        phase: simulated.allocated_phases[phase] / max(peak, 1) - 1 for phase, peak in real.allocated_phases.items()
    }


def render(rows: list[Row]) -> str:
    """The table, with its own summary first."""
    done = [row for row in rows if not row.error]
    exact = sum(row.simulated_bytes == row.real_bytes for row in done)
    lines = [
        "# Simulated against real: DeepSpeed on CPU ranks",
        "",
        f"`python benchmarks/simulated_vs_real.py`, {time.strftime('%Y-%m-%d')}, "
        + ", ".join(f"{name} {version}" for name, version in installed_versions().items())
        + ". Two optimizer steps, sequences of 64 tokens, models of 0.2 M parameters, bf16; rank 0, bytes of live"
        " tensors in 512-byte blocks. Both sides run the same trainer and tracker; the real side on gloo ranks.",
        "",
        f"{len(rows)} configurations: {len(done)} ran on both sides, {len(rows) - len(done)} did not. Of those that"
        f" ran, the whole-run peak is equal to the byte in {exact}; the largest difference of a peak is"
        f" {max((abs(row.peak_error) for row in done), default=0):.3%}, of a phase"
        f" {max((abs(row.worst_phase_error) for row in done), default=0):.3%};"
        f" collectives (name, count and bytes) are equal in {sum(row.collectives_equal for row in done)}.",
        "",
        "| stage | method | model | ranks | case | simulated bytes | real bytes | peak | worst phase | collectives |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(table_line(row) for row in rows),
        "",
        "What this does not show: the kernels that only CUDA has (flash attention, TRL's Triton loss) and the bytes"
        " that they save, which CPU ranks do not run.",
        "",
    ]
    return "\n".join(lines)


def table_line(row: Row) -> str:
    case = row.case
    head = f"| {case.zero.stage} | {case.method} | {case.family} | {case.world_size} | {case.name} |"
    if row.error:
        return f"{head} {row.error.replace('|', '/')[:200]} | | | | |"
    phase = f"{row.worst_phase_error:+.3%}" + (f" {row.worst_phase}" if row.worst_phase_error else "")
    equal = "equal" if row.collectives_equal else "differ"
    return f"{head} {row.simulated_bytes} | {row.real_bytes} | {row.peak_error:+.3%} | {phase} | {equal} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    import_libraries()
    rows = []
    for case in cases():
        if arguments.only in case.name:
            rows.append(compare(case))
            print(table_line(rows[-1]), file=sys.stderr, flush=True)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(render(rows))


if __name__ == "__main__":
    main()
