"""Strategies for a model on a cluster: what the user fixed, every way to fill in the rest, and how each one does."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from zplan.errors import ConfigError
from zplan.hardware import Cluster
from zplan.memory.estimate import BucketRule, estimate_memory
from zplan.memory.least import cannot_fit
from zplan.memory.terms import MemoryEstimate
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.settings import apply_settings, hf_auto_zero, read_bool, split_setting
from zplan.speed.estimate import estimate_speed
from zplan.speed.types import SpeedEstimate
from zplan.units import parse_count
from zplan.values import dataclass
from zplan.zero_config import Choice, OffloadDevice, OffloadOptimizer, OffloadParam, ZeroConfig, batch_sizes

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
_CHOICE_SETTINGS = (
    "world_size", "train_micro_batch_size_per_gpu", "gradient_checkpointing", "sequence_parallel_size", "autotp_size",
)  # fmt: skip
"""Settings that belong to the choice, not to the zero_optimization section."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """What the user decided; None is left to the planner."""

    stage: int | None = None
    micro_batch: int | None = None
    gradient_checkpointing: bool | None = None
    offload_optimizer: str | None = None
    offload_param: str | None = None
    settings: tuple[str, ...] = ()
    """`KEY=VALUE` of --set."""
    world_size: int | None = None
    sequence_parallel_size: int = 1
    """Not tuned: 1 unless it is given."""
    autotp_size: int = 1
    """Not tuned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One configuration with what the formulas say about it."""

    choice: Choice
    memory: MemoryEstimate
    speed: SpeedEstimate
    label: str

    @property
    def tier(self) -> int:
        """0 fits, 1 tight, 2 does not fit: the worst of GPU, host and NVMe."""
        order = ("fits", "tight", "does_not_fit")
        return max(order.index(part.verdict) for part in (self.memory.gpu, self.memory.host, self.memory.nvme))

    @property
    def short_bytes(self) -> int:
        """What is missing, GPU and host together."""
        return self.memory.gpu.short_bytes + self.memory.host.short_bytes


def evaluate(
    shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster, *, bucket_rule: BucketRule = "engine"
) -> Candidate:
    """Memory and speed of one configuration."""
    return Candidate(
        choice=choice,
        memory=estimate_memory(shape, recipe, choice, cluster, bucket_rule=bucket_rule),
        speed=estimate_speed(shape, recipe, choice, cluster),
        label=strategy_label(choice, cluster),
    )


def strategy_label(choice: Choice, cluster: Cluster) -> str:
    """`ZeRO-3 + optimizer on cpu, checkpointing, 4 of 8 GPUs`."""
    zero = choice.zero
    parts = [f"ZeRO-{zero.stage}" if zero.stage else "DDP" if choice.batch.world_size > 1 else "no ZeRO"]
    if zero.offloads_optimizer:
        parts.append(f"optimizer on {zero.offload_optimizer.device}")
    if zero.offloads_param:
        parts.append(f"parameters on {zero.offload_param.device}")
    label = " + ".join(parts)
    if choice.gradient_checkpointing:
        label += ", checkpointing"
    if choice.batch.sequence_parallel_size > 1:
        label += f", sequences over {choice.batch.sequence_parallel_size}"
    if choice.batch.autotp_size > 1:
        label += f", matrices over {choice.batch.autotp_size}"
    if choice.batch.world_size < cluster.world_size:
        label += f", {choice.batch.world_size} of {cluster.world_size} GPUs"
    return label


def lift_settings(fixed: Fixed) -> Fixed:
    """Settings that name a part of the choice (`stage`, `offload_param.device`, ...) as fields of Fixed.

    Raises:
        ConfigError: a setting that cannot be read.
    """
    zero = apply_settings(ZeroConfig(), [text for text in fixed.settings if not is_choice_setting(text)])
    rest: list[str] = []
    for text in fixed.settings:
        key, value = split_setting(text)
        if key == "stage":
            fixed = replace(fixed, stage=zero.stage)
        elif key == "world_size":
            fixed = replace(fixed, world_size=parse_count(value, name=key))
        elif key == "sequence_parallel_size":
            fixed = replace(fixed, sequence_parallel_size=parse_count(value, name=key))
        elif key == "autotp_size":
            fixed = replace(fixed, autotp_size=parse_count(value, name=key))
        elif key == "train_micro_batch_size_per_gpu":
            fixed = replace(fixed, micro_batch=parse_count(value, name=key))
        elif key == "gradient_checkpointing":
            fixed = replace(fixed, gradient_checkpointing=read_bool(key, value))
        elif key == "offload_optimizer.device":
            fixed = replace(fixed, offload_optimizer=value)
        elif key == "offload_param.device":
            fixed = replace(fixed, offload_param=value)
        else:
            rest.append(text)
    return replace(fixed, settings=tuple(rest))


def splits(fixed: Fixed) -> dict[str, int]:
    """sequence_parallel_size and autotp_size of the user's decisions, whatever else they leave open."""
    given = {"sequence_parallel_size": fixed.sequence_parallel_size, "autotp_size": fixed.autotp_size}
    for key, value in map(split_setting, fixed.settings):
        if key in given:
            given[key] = parse_count(value, name=key)
    return given


def is_choice_setting(text: str) -> bool:
    """A `KEY=VALUE` that is not of the zero_optimization section."""
    return split_setting(text)[0] in _CHOICE_SETTINGS


def base_zero(stage: Stage, hidden_size: int, nvme_path: str | None, optimizer: str, param: str) -> ZeroConfig:
    """A ZeRO section to start from: transformers' "auto" sizes, saving 16-bit weights, the given offload."""
    on_nvme = {"nvme": nvme_path}
    parts: dict[str, Any] = {"stage3_gather_16bit_weights_on_model_save": stage == 3}
    if stage >= 1 and optimizer != "none":
        device = _device(optimizer)
        parts["offload_optimizer"] = OffloadOptimizer(device=device, nvme_path=on_nvme.get(device))
    if stage == 3 and param != "none":
        device = _device(param)
        parts["offload_param"] = OffloadParam(device=device, nvme_path=on_nvme.get(device))
    return replace(hf_auto_zero(stage, hidden_size), **parts)


def _device(name: str) -> OffloadDevice:
    if name not in ("none", "cpu", "nvme"):
        raise ConfigError(f"offload device is {name!r}, not none, cpu or nvme", fix="--offload-optimizer cpu")
    return name  # type: ignore[return-value]


def zero_sections(shape: ModelShape, cluster: Cluster, fixed: Fixed, world_size: int) -> tuple[ZeroConfig, ...]:
    """Every ZeRO section that the user's decisions leave open, settings put in.

    NVMe is tried at stage 3 and where the cluster has one: below, the engine keeps the states on the CPU.
    """
    host, gpus = cluster.host, world_size if cluster.gpu.kind == "cuda" else 0
    return _sections(shape.hidden_size, host.nvme_path, bool(host.nvme_free_bytes), gpus, fixed)


@lru_cache(64)
def _sections(
    hidden_size: int, nvme_path: str | None, has_nvme: bool, gpus: int, fixed: Fixed
) -> tuple[ZeroConfig, ...]:
    """A search for changes asks for the same ones again and again.

    Stages 1 and 2 overlap what they reduce or copy to the host, as the examples of transformers' documentation do: by
    DeepSpeed's default they would stand behind stage 3, which does.
    """
    found = []
    for stage in STAGES if fixed.stage is None else (check_stage(fixed.stage),):
        for optimizer in _devices(fixed.offload_optimizer, allowed=stage >= 1, nvme=has_nvme and stage == 3):
            # Parameters go to the drive only after the states, which are six times as large.
            for param in _devices(fixed.offload_param, allowed=stage == 3, nvme=optimizer == "nvme"):
                zero = base_zero(stage, hidden_size, nvme_path, optimizer, param)
                if stage in (1, 2) and (gpus > 1 or (gpus and optimizer != "none")):
                    zero = replace(zero, overlap_comm=True)
                found.append(apply_settings(zero, fixed.settings))
    return tuple(found)


def check_stage(stage: int) -> Stage:
    if stage not in STAGES:
        raise ConfigError(f"stage is {stage}", because="ZeRO has the stages 0, 1, 2 and 3", fix="--stage 2")
    return stage


def _devices(fixed: str | None, *, allowed: bool, nvme: bool) -> tuple[str, ...]:
    if fixed is not None:
        return (fixed,) if allowed or fixed == "none" else ()
    if not allowed:
        return ("none",)
    return ("none", "cpu", "nvme") if nvme else ("none", "cpu")


def world_sizes(cluster: Cluster, fixed: Fixed) -> tuple[int, ...]:
    """Numbers of GPUs worth a try, most first: all, whole nodes, divisors of one node."""
    if fixed.world_size is not None:
        return (fixed.world_size,)
    part = {n for n in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % n == 0}
    whole = {cluster.gpus_per_node * n for n in range(1, cluster.nodes + 1) if cluster.nodes % n == 0}
    shared = fixed.sequence_parallel_size * fixed.autotp_size
    return tuple(sorted((n for n in part | whole if n % shared == 0), reverse=True)) or (cluster.world_size,)


def micro_batches(recipe: Recipe, world_size: int, fixed: Fixed) -> tuple[int, ...]:
    """Micro-batches that cut one rank's share of the global batch evenly, smallest first.

    Raises:
        ConfigError: the given micro-batch or the number of ranks does not divide the global batch.
    """
    batch_sizes(recipe, micro_batch=fixed.micro_batch or 1, world_size=world_size, **splits(fixed))
    if fixed.micro_batch is not None:
        return (fixed.micro_batch,)
    share = recipe.train_batch_size * fixed.sequence_parallel_size * fixed.autotp_size // world_size
    small = [n for n in range(1, int(share**0.5) + 1) if share % n == 0]
    return tuple(sorted({*small, *(share // n for n in small)}))


def runnable(
    shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster, *,
    given: Collection[str] = ("stage3_prefetch_bucket_size",),
) -> Choice:  # fmt: skip
    """The choice with as many buffers of offload_param on NVMe as DeepSpeed takes.

    Args:
        given: keys that are not to be changed; nothing but the buffers is unless it says so.

    Raises:
        ConfigError: not without one of these.
    """
    if not choice.zero.offloads_param or choice.zero.offload_param.device != "nvme":
        return choice
    from zplan.memory.swap_in import with_enough_buffers

    return with_enough_buffers(shape, recipe, choice, on_cpu=cluster.gpu.kind == "cpu", given=given)


Ask = Callable[[Choice], Candidate]


def asker(shape: ModelShape, recipe: Recipe, cluster: Cluster, fixed: Fixed, bucket_rule: BucketRule) -> Ask:
    """`evaluate` of what runs, with what the user decided; it raises ConfigError where that cannot run."""
    given = {split_setting(text)[0] for text in fixed.settings}

    def ask(choice: Choice) -> Candidate:
        runs = runnable(shape, recipe, choice, cluster, given=given)
        return evaluate(shape, recipe, runs, cluster, bucket_rule=bucket_rule)

    return ask


def best_micro_batch(
    shape: ModelShape, recipe: Recipe, cluster: Cluster, choices: tuple[Choice, ...], ask: Ask
) -> Candidate:
    """The largest micro-batch that fits, or the smallest one when none does.

    A larger micro-batch never needs less memory, and is never slower here: both ends first, then bisection.

    Args:
        choices: one strategy, from the smallest micro-batch to the largest.
    """
    low, high = 0, len(choices) - 1
    if cannot_fit(shape, recipe, choices[low], cluster):
        return ask(choices[low])
    best = ask(choices[high])
    if best.tier == 0 or high == 0:
        return best
    best = ask(choices[low])
    if best.tier > 0:
        return best
    while high - low > 1:
        middle = (low + high) // 2
        tried = ask(choices[middle])
        if tried.tier == 0:
            best, low = tried, middle
        else:
            high = middle
    return best
