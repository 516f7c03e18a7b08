"""What one change would save or cost, and the smallest change that makes an impossible run possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from math import ceil

from zplan.candidates import Candidate, evaluate, runnable
from zplan.errors import ConfigError
from zplan.hardware import DESCRIBED_NVME, DESCRIBED_RAM_PER_GPU, Cluster
from zplan.memory.estimate import BucketRule
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.settings import hf_auto_bucket_sizes
from zplan.units import GIB, TIB
from zplan.values import dataclass
from zplan.zero_config import Choice, OffloadOptimizer, OffloadParam, ZeroConfig

MOST_GPUS = 1024
"""The search for "more GPUs" ends here."""
SHORTEST_LENGTH = 256
"""The search for "shorter sequences" ends here, tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """One change and what it does. Negative bytes are saved."""

    change: str
    gpu_bytes: int
    """Change of the expected GPU bytes of a rank, as nvidia-smi shows them."""
    host_bytes: int
    """Change of a node's resident host bytes."""
    tokens_per_second: float | None
    """Ratio to the speed before; None where either is not known."""
    fits: bool
    """The run fits with this change alone."""


def quantify_fixes(
    shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster, *, bucket_rule: BucketRule = "engine"
) -> tuple[Fix, ...]:
    """Every single change that acts on this configuration, the one that saves most GPU bytes first."""
    before = evaluate(shape, recipe, choice, cluster, bucket_rule=bucket_rule)
    fixes = [
        measure_fix(before, change, evaluate(shape, recipe, changed, cluster, bucket_rule=bucket_rule))
        for change, changed in _runnable_changes(shape, recipe, choice, cluster)
        if changed != choice
    ]
    acting = [fix for fix in fixes if fix.gpu_bytes or fix.host_bytes or abs((fix.tokens_per_second or 1) - 1) >= 0.005]
    return tuple(sorted(acting, key=lambda fix: fix.gpu_bytes))


def measure_fix(before: Candidate, change: str, after: Candidate) -> Fix:
    """The difference between two configurations."""
    old, new = before.speed.tokens_per_second, after.speed.tokens_per_second
    return Fix(
        change=change,
        gpu_bytes=after.memory.gpu.used.expected - before.memory.gpu.used.expected,
        host_bytes=after.memory.host.resident_bytes - before.memory.host.resident_bytes,
        tokens_per_second=new / old if old and new else None,
        fits=after.tier == 0,
    )


def _runnable_changes(
    shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster
) -> Iterator[tuple[str, Choice]]:
    """With parameters on NVMe a change comes with the buffers that it takes; one that none are enough for is none."""
    for change, changed in _changes(shape, recipe, choice, cluster):
        try:
            runs = runnable(shape, recipe, changed, cluster)
        except ConfigError:
            continue
        settings = buffer_settings(runs.zero.offload_param, changed.zero.offload_param)
        yield " ".join((change, *settings)), runs


def buffer_settings(param: OffloadParam, base: OffloadParam) -> Iterator[str]:
    """What to type for other buffers than those of `base`."""
    for key in ("buffer_count", "buffer_size"):
        if getattr(param, key) != getattr(base, key):
            yield f"--set offload_param.{key}={getattr(param, key)}"


def _changes(shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster) -> Iterator[tuple[str, Choice]]:
    if choice.gradient_checkpointing:
        yield "--no-gradient-checkpointing", replace(choice, gradient_checkpointing=False)
    else:
        yield "--gradient-checkpointing", replace(choice, gradient_checkpointing=True)
    yield from _batch_changes(recipe, choice)
    for change, zero in _zero_changes(shape, choice.zero, cluster):
        yield change, replace(choice, zero=zero)


def _batch_changes(recipe: Recipe, choice: Choice) -> Iterator[tuple[str, Choice]]:
    batch = choice.batch
    share = recipe.train_batch_size // batch.data_parallel_size
    for size in (batch.train_micro_batch_size_per_gpu // 2, batch.train_micro_batch_size_per_gpu * 2):
        if size >= 1 and share % size == 0:
            cut = replace(batch, train_micro_batch_size_per_gpu=size, gradient_accumulation_steps=share // size)
            yield f"--micro-batch {size}", replace(choice, batch=cut)


def _zero_changes(shape: ModelShape, zero: ZeroConfig, cluster: Cluster) -> Iterator[tuple[str, ZeroConfig]]:
    for stage in (0, 1, 2, 3):
        if stage != zero.stage and not (stage == 0 and zero.offloads_optimizer):
            yield f"--stage {stage}", replace(zero, stage=stage)
    yield from _offload_changes(zero, cluster)
    if zero.stage >= 1:
        auto = hf_auto_bucket_sizes(shape.hidden_size)["reduce_bucket_size"]
        if zero.reduce_bucket_size > auto:
            yield f"--set reduce_bucket_size={auto}", replace(zero, reduce_bucket_size=auto)
        other = not zero.overlaps_comm
        yield f"--set overlap_comm={str(other).lower()}", replace(zero, overlap_comm=other)
    if zero.stage == 3:
        yield "--set stage3_max_live_parameters=1e8", replace(zero, stage3_max_live_parameters=10**8)
        yield "--set sub_group_size=1e8", replace(zero, sub_group_size=10**8)


def _offload_changes(zero: ZeroConfig, cluster: Cluster) -> Iterator[tuple[str, ZeroConfig]]:
    if zero.stage >= 1:
        states = zero.offload_optimizer
        device = "none" if zero.offloads_optimizer else "cpu"
        yield f"--offload-optimizer {device}", replace(zero, offload_optimizer=OffloadOptimizer(device=device))  # type: ignore[arg-type]
        if states.device != "none" and states.pin_memory:
            unpinned = replace(states, pin_memory=False)
            yield "--set offload_optimizer.pin_memory=false", replace(zero, offload_optimizer=unpinned)
    if zero.stage == 3:
        device = "none" if zero.offloads_param else "cpu"
        yield f"--offload-param {device}", replace(zero, offload_param=OffloadParam(device=device))  # type: ignore[arg-type]
        path = cluster.host.nvme_path
        if zero.offload_optimizer.device == "cpu" and path:
            yield (
                "--offload-optimizer nvme",
                replace(zero, offload_optimizer=OffloadOptimizer(device="nvme", nvme_path=path)),
            )


Change = tuple[str, Recipe, Cluster]
"""What to type, and the question it makes."""
Search = Callable[[ModelShape, Recipe, Cluster], Candidate | None]
"""The best candidate that fits, None if there is none; `planner` passes its own ranking."""


def smallest_changes(
    closest: Callable[[], Candidate], shape: ModelShape, recipe: Recipe, cluster: Cluster, search: Search
) -> tuple[Fix, ...]:
    """Of each kind of change the smallest one with which something fits; empty if nothing here helps.

    Kinds, in this order: an optimizer with smaller states, shorter sequences, LoRA or QLoRA, more host memory, a drive
    where there is none, more GPUs.

    Args:
        closest: the candidate that comes closest without a change; asked if something helps.
    """
    before = cache(closest)

    def fit(change: Change) -> Fix | None:
        flags, changed, larger = change
        after = _try(shape, changed, larger, search)
        return measure_fix(before(), flags, after) if after is not None else None

    found = [
        next((fix for change in ladder if (fix := fit(change)) is not None), None)
        for ladder in (
            _optimizers(recipe, cluster),
            _lengths(recipe, cluster),
            _methods(recipe, cluster),
            _if_the_last_helps(fit, _more_host_memory(recipe, cluster)),
            _if_the_last_helps(fit, () if cluster.host.nvme_free_bytes else _a_drive(recipe, cluster)),
            _more_gpus(recipe, cluster),
        )
    ]
    return tuple(fix for fix in found if fix is not None)


def _if_the_last_helps(fit: Callable[[Change], Fix | None], ladder: Iterable[Change]) -> Iterable[Change]:
    """The ladder, if its largest step helps: more memory is never worse, and asking is what costs time."""
    steps = tuple(ladder)
    return steps if steps and fit(steps[-1]) is not None else ()


def _try(shape: ModelShape, recipe: Recipe, cluster: Cluster, search: Search) -> Candidate | None:
    """A change that is itself malformed (LoRA targets that the model lacks) is no fix."""
    try:
        return search(shape, recipe, cluster)
    except ConfigError:
        return None


def _optimizers(recipe: Recipe, cluster: Cluster) -> Iterator[Change]:
    if recipe.optimizer == "adamw" and recipe.method == "full":
        yield "--optimizer adamw_8bit", replace(recipe, optimizer="adamw_8bit"), cluster


def _lengths(recipe: Recipe, cluster: Cluster) -> Iterator[Change]:
    length = recipe.max_length // 2
    while length >= SHORTEST_LENGTH:
        yield f"--max-length {length}", replace(recipe, max_length=length), cluster
        length //= 2


def _methods(recipe: Recipe, cluster: Cluster) -> Iterator[Change]:
    if recipe.method == "full":
        yield "--method lora", replace(recipe, method="lora"), cluster
    if recipe.method != "qlora":
        yield "--method qlora", replace(recipe, method="qlora"), cluster


def _more_host_memory(recipe: Recipe, cluster: Cluster) -> Iterator[Change]:
    """A quarter more to eight times as much, in the 16 GiB that memory is sold in. CPU ranks would grow with it."""
    if cluster.gpu.kind == "cpu":
        return
    host = cluster.host
    for share in (1.25, 1.5, 2, 3, 4, 6, 8):
        size = ceil(host.total_bytes * share / (16 * GIB)) * 16 * GIB
        roomy = replace(host, total_bytes=size, available_bytes=size, cgroup_limit_bytes=None)
        yield f"--host-ram {size // GIB}GiB", recipe, replace(cluster, host=roomy)


def _a_drive(recipe: Recipe, cluster: Cluster) -> Iterator[Change]:
    if cluster.gpu.kind == "cpu":
        return
    for terabytes in (1, 2, 4, 8):
        host = replace(cluster.host, nvme_free_bytes=terabytes * TIB, nvme_path=DESCRIBED_NVME)
        yield f"--nvme {terabytes}TiB", recipe, replace(cluster, host=host)


def _more_gpus(recipe: Recipe, cluster: Cluster) -> Iterator[Change]:
    """Twice, four times ... the GPUs: within a node up to eight, then whole nodes. CPU ranks share one host.

    A described node grows with its GPUs if its memory is the one that goes with them.
    """
    grows = cluster.described and cluster.host.total_bytes == DESCRIBED_RAM_PER_GPU * cluster.gpus_per_node
    if cluster.gpu.kind == "cpu":
        return
    larger = cluster
    while larger.world_size < MOST_GPUS:
        if larger.gpus_per_node < 8:
            larger = replace(larger, gpus_per_node=2 * larger.gpus_per_node)
            if grows:
                ram = DESCRIBED_RAM_PER_GPU * larger.gpus_per_node
                larger = replace(larger, host=replace(larger.host, total_bytes=ram, available_bytes=ram))
        else:
            larger = replace(larger, nodes=2 * larger.nodes)
        rest = recipe.train_batch_size % larger.world_size
        batch = recipe.train_batch_size + (larger.world_size - rest if rest else 0)
        flags = f"--gpus-per-node {larger.gpus_per_node}"
        flags += f" --nodes {larger.nodes}" if larger.nodes > 1 else ""
        flags += f" --train-batch-size {batch}" if rest else ""
        yield flags, replace(recipe, train_batch_size=batch), larger
