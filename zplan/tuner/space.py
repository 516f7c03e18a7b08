"""The search space: every knob as data (its range, when it acts) and the one spelling of each configuration.

Two configurations that differ only in knobs that do not act are one: `canonical` puts dead knobs back to DeepSpeed's
defaults, `key` names what is left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from math import isqrt
from typing import Any, TypeAlias

from zplan import files
from zplan.candidates import runnable
from zplan.errors import ConfigError
from zplan.hardware import Cluster
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.tuner.ranges import Elements, Options, Range, Share, Suggester, Value, ask, clamped, is_inside
from zplan.values import dataclass
from zplan.zero_config import Choice, OffloadOptimizer, OffloadParam, ZeroConfig, batch_sizes

Draft: TypeAlias = Mapping[str, Value]
"""Knob -> value for the knobs decided so far; a knob's `acts` looks only at earlier knobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One thing that tuning may change."""

    name: str
    """DeepSpeed's JSON key; with its section in front where the key alone is ambiguous."""
    range: Range
    acts: Callable[[Draft], bool] = lambda draft: True
    because: str = ""
    """Why it acts only there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What the ranges depend on."""

    shape: ModelShape
    recipe: Recipe
    cluster: Cluster


_MOST_KEYS = 1 << 16

Narrowing: TypeAlias = Mapping[str, Range]
"""Knob -> the range to use instead: fixed (one value), narrowed or widened by the user."""


class Space:
    """All knobs of one problem, in the order in which they are decided."""

    def __init__(self, problem: Problem, narrowing: Narrowing | None = None, base: ZeroConfig | None = None) -> None:
        """Args:
        narrowing: knob -> range of the user's.
        base: values of the user's for DeepSpeed keys that are no knobs.
        """
        self.problem = problem
        narrowing = narrowing or {}
        knobs = make_knobs(problem)
        unknown = sorted(set(narrowing) - {knob.name for knob in knobs})
        if unknown:
            raise ConfigError(
                f"{', '.join(unknown)}: not a knob that can be tuned",
                because=f"the knobs are {', '.join(knob.name for knob in knobs)}",
                fix="zplan tune --help",
            )
        self.knobs = tuple(replace(knob, range=narrowing.get(knob.name, knob.range)) for knob in knobs)
        self._must_act = [name for name, allowed in narrowing.items() if _only_offloads(name, allowed)]
        self._untuned = {
            name: value
            for name, value in _zero_draft(base if base is not None else ZeroConfig()).items()
            if name not in {knob.name for knob in knobs}
        }
        self._keys: dict[Choice, str] = {}

    def suggest(self, trial: Suggester) -> Choice:
        """Ask the sampler for every knob that acts, given those before it."""
        draft: dict[str, Value] = {}
        for knob in self.knobs:
            if knob.acts(draft):
                draft[knob.name] = ask(trial, knob.name, knob.range)
        return self.choice(draft)

    def choice(self, draft: Draft) -> Choice:
        """The configuration of a draft; knobs that are not in it, or do not act in it, have DeepSpeed's defaults."""
        values: dict[str, Value | None] = {**_DEFAULTS, **self._untuned}
        live: dict[str, Value] = {}
        for knob in self.knobs:
            if knob.name in draft and knob.acts(live):
                live[knob.name] = draft[knob.name]
        values |= live
        return _to_choice(values, self.problem)

    def draft(self, choice: Choice) -> dict[str, Value]:
        """Knob -> value of a configuration, for the knobs that act in it: what the sampler is told."""
        values = self._values(choice)
        live: dict[str, Value] = {}
        for knob in self.knobs:
            value = values[knob.name]
            if knob.acts(live) and value is not None:
                live[knob.name] = value
        return live

    @staticmethod
    def _values(choice: Choice) -> dict[str, Value | None]:
        """Knob -> value, whether it acts or not."""
        return _zero_draft(choice.zero) | {
            "overlap_comm": choice.zero.overlaps_comm,
            "world_size": choice.batch.world_size,
            "train_micro_batch_size_per_gpu": choice.batch.train_micro_batch_size_per_gpu,
            "gradient_checkpointing": choice.gradient_checkpointing,
        }

    def canonical(self, choice: Choice) -> Choice:
        """The same configuration with every dead knob at its default."""
        return self.choice(self.draft(choice))

    def nearest(self, choice: Choice) -> Choice:
        """The configuration with every acting knob moved into its range, where the user has narrowed that."""
        values = self._values(choice)
        live: dict[str, Value] = {}
        for knob in self.knobs:
            if knob.acts(live):
                live[knob.name] = clamped(knob.range, values[knob.name])
        return self.choice(live)

    def contains(self, choice: Choice) -> bool:
        """Whether every acting knob lies within its range, and offloading that the user asks for happens."""
        draft = self.draft(choice)
        return all(name in draft for name in self._must_act) and all(
            is_inside(knob.range, draft[knob.name]) for knob in self.knobs if knob.name in draft
        )

    def runnable(self, choice: Choice) -> Choice:
        """The configuration with as many buffers of offload_param on NVMe as DeepSpeed takes.

        Raises:
            ConfigError: the ranges allow no number that is enough.
        """
        problem = self.problem
        found = runnable(problem.shape, problem.recipe, choice, problem.cluster)
        buffers = found.zero.offload_param
        if buffers != choice.zero.offload_param and not self.contains(found):
            raise ConfigError(f"it takes {buffers.buffer_count} buffers of {buffers.buffer_size} elements")
        return found

    def key(self, choice: Choice) -> str:
        """Equal for two configurations exactly if they run alike."""
        if choice not in self._keys:
            if len(self._keys) >= _MOST_KEYS:
                self._keys.clear()
            text = json.dumps(files.to_data(self.canonical(choice)), sort_keys=True)
            self._keys[choice] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._keys[choice]


def _only_offloads(name: str, allowed: Range) -> bool:
    return name.endswith(".device") and isinstance(allowed, Options) and "none" not in allowed.values


def _zero_ge(stage: int) -> Callable[[Draft], bool]:
    return lambda draft: int(draft["stage"]) >= stage


def _device(section: str, *devices: str) -> Callable[[Draft], bool]:
    return lambda draft: draft.get(f"{section}.device", "none") in devices


def _only_if(exists: bool, acts: Callable[[Draft], bool]) -> Callable[[Draft], bool]:
    return acts if exists else _never


def _never(draft: Draft) -> bool:
    return False


def make_knobs(problem: Problem) -> tuple[Knob, ...]:
    """Every knob; one that does nothing on this cluster never acts."""
    on_gpu = problem.cluster.gpu.kind == "cuda"
    has_nvme = problem.cluster.host.nvme_path is not None
    return (
        *_batch_knobs(problem),
        *_offload_knobs(on_gpu=on_gpu, has_nvme=has_nvme),
        *_nvme_knobs(problem.shape),
        *_gradient_knobs(problem.shape, on_gpu=on_gpu),
        *_stage3_knobs(problem.shape),
    )


def _batch_knobs(problem: Problem) -> list[Knob]:
    worlds = world_sizes(problem.recipe, problem.cluster)
    most = problem.recipe.train_batch_size // min(worlds)
    return [
        Knob(name="world_size", range=Options(worlds)),
        Knob(name="stage", range=Options((0, 1, 2, 3))),
        Knob(name="train_micro_batch_size_per_gpu", range=Elements(1, most)),
        Knob(name="gradient_checkpointing", range=Options((True, False))),
    ]


def world_sizes(recipe: Recipe, cluster: Cluster) -> tuple[int, ...]:
    """Numbers of GPUs worth a try: whole nodes, or a divisor of one node; each divides the global batch.

    Raises:
        ConfigError: the global batch cannot be cut for this cluster at all.
    """
    part = {n for n in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % n == 0}
    whole = {cluster.gpus_per_node * n for n in range(1, cluster.nodes + 1) if cluster.nodes % n == 0}
    sizes = tuple(n for n in sorted(part | whole) if recipe.train_batch_size % n == 0)
    assert sizes, "1 divides every batch"
    return sizes


def _offload_knobs(*, on_gpu: bool, has_nvme: bool) -> list[Knob]:
    devices: tuple[Value, ...] = ("none", "cpu", "nvme") if has_nvme else ("none", "cpu")
    flag = Options((True, False))
    no_op = "page-locking is a no-op on CPU ranks (CPU_Accelerator.pin_memory)"
    return [
        Knob(name="offload_optimizer.device", range=Options(devices), acts=_zero_ge(1)),
        Knob(
            name="offload_param.device", range=Options(devices), acts=_zero_ge(3),
            because="accepted and ignored below stage 3",
        ),
        Knob(
            name="offload_optimizer.ratio", range=Share(0.1, 1.0),
            acts=_only_if(on_gpu, lambda draft: draft["stage"] == 3 and draft["offload_optimizer.device"] == "cpu"),
            because="partial offloading is a stage 3 feature (offload_config.py) and needs DeepSpeedCPUAdam",
        ),
        Knob(
            name="offload_optimizer.pin_memory", range=flag, because=no_op,
            acts=_only_if(on_gpu, _device("offload_optimizer", "cpu", "nvme")),
        ),
        Knob(
            name="offload_param.pin_memory", range=flag, because=no_op,
            acts=_only_if(on_gpu, _device("offload_param", "cpu", "nvme")),
        ),
    ]  # fmt: skip


def _nvme_knobs(shape: ModelShape) -> list[Knob]:
    def swaps_states(draft: Draft) -> bool:
        return draft["stage"] == 3 and draft["offload_optimizer.device"] == "nvme"

    swaps_parameters = _device("offload_param", "nvme")
    largest, everything = _largest_numel(shape), shape.num_parameters
    return [
        Knob(name="offload_optimizer.pipeline_read", range=Options((False, True)), acts=swaps_states),
        Knob(name="offload_optimizer.pipeline_write", range=Options((False, True)), acts=swaps_states),
        Knob(name="offload_param.buffer_count", range=Elements(4, 64), acts=swaps_parameters),
        Knob(
            name="offload_param.buffer_size", range=Elements(largest, max(4 * largest, 100_000_000)),
            acts=swaps_parameters, because="one buffer holds the largest parameter",
        ),
        Knob(
            name="offload_param.max_in_cpu", range=Elements(1_000_000, max(everything, 1_000_000_000)),
            acts=swaps_parameters,
        ),
    ]  # fmt: skip


def _largest_numel(shape: ModelShape) -> int:
    return max((parameter.numel for block in shape.blocks for parameter in block.parameters), default=1)


def _gradient_knobs(shape: ModelShape, *, on_gpu: bool) -> list[Knob]:
    def reduces(draft: Draft) -> bool:
        return int(draft["stage"]) >= 1 and int(draft["world_size"]) > 1

    def moves(draft: Draft) -> bool:
        """Gradients leave the GPU, on the stream that overlap_comm gives them (stage_1_and_2.py:2240)."""
        return reduces(draft) or (int(draft["stage"]) >= 1 and draft["offload_optimizer.device"] != "none")

    def may_be_scattered(draft: Draft) -> bool:
        stage = int(draft["stage"])
        return stage == 3 or (stage in (1, 2) and draft["offload_optimizer.device"] == "none")

    smallest_bucket = min(100_000, shape.hidden_size**2)
    """transformers' "auto" is hidden_size squared."""
    return [
        Knob(
            name="overlap_comm", range=Options((True, False)), acts=_only_if(on_gpu, moves),
            because="CPU ranks have no streams to overlap (is_synchronized_device)",
        ),
        Knob(
            name="contiguous_gradients", range=Options((True, False)), acts=may_be_scattered,
            because="forced on by offload at stages 1 and 2 (stage_1_and_2.py:300)",
        ),
        Knob(
            name="round_robin_gradients", range=Options((False, True)),
            acts=lambda draft: reduces(draft) and int(draft["stage"]) <= 2,
            because="read by stage_1_and_2.py only; with one rank there is nothing to deal out",
        ),
        Knob(name="reduce_bucket_size", range=Elements(smallest_bucket, 1_000_000_000), acts=_zero_ge(1)),
        Knob(
            name="allgather_bucket_size", range=Elements(1_000_000, 1_000_000_000), acts=_never,
            because="read only where torch has no all_gather_into_tensor (runtime/utils.py:1016)",
        ),
    ]  # fmt: skip


def _stage3_knobs(shape: ModelShape) -> list[Knob]:
    """Limits beyond the number of parameters all act alike, so the ranges end there."""
    stage3 = _zero_ge(3)
    everything = shape.num_parameters
    largest = _largest_numel(shape)
    step = max(isqrt(everything), 1)
    return [
        Knob(name="sub_group_size", range=Elements(step, max(everything, 1_000_000_000)), acts=stage3),
        Knob(name="stage3_max_live_parameters", range=Elements(step, max(everything, 1_000_000_000)), acts=stage3),
        Knob(name="stage3_max_reuse_distance", range=Elements(step, max(everything, 1_000_000_000)), acts=stage3),
        Knob(name="stage3_prefetch_bucket_size", range=Elements(step, max(everything, 50_000_000)), acts=stage3),
        Knob(name="stage3_param_persistence_threshold", range=Elements(1, max(largest, 100_000)), acts=stage3),
    ]


_TOP = tuple(item.name for item in fields(ZeroConfig) if item.name not in ("offload_optimizer", "offload_param"))


def _zero_draft(zero: ZeroConfig) -> dict[str, Value | None]:
    draft: dict[str, Value | None] = {name: getattr(zero, name) for name in _TOP}
    for section in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, section)
        draft |= {f"{section}.{item.name}": getattr(offload, item.name) for item in fields(offload)}
    return draft


_DEFAULTS: dict[str, Value | None] = {
    **{name: value for name, value in _zero_draft(ZeroConfig()).items() if not name.endswith("nvme_path")},
    "world_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_checkpointing": True,
}


def _to_choice(values: Mapping[str, Any], problem: Problem) -> Choice:
    values = _as_the_engine_reads(values, problem)
    zero = ZeroConfig(
        **{name: values[name] for name in _TOP},
        offload_optimizer=OffloadOptimizer(**_section(values, "offload_optimizer")),
        offload_param=OffloadParam(**_section(values, "offload_param")),
    )
    world_size = values["world_size"]
    batch = batch_sizes(
        problem.recipe,
        micro_batch=nearest_micro_batch(problem.recipe, world_size, values["train_micro_batch_size_per_gpu"]),
        world_size=world_size,
    )
    return Choice(zero=zero, batch=batch, gradient_checkpointing=values["gradient_checkpointing"])


def _as_the_engine_reads(values: Mapping[str, Any], problem: Problem) -> dict[str, Any]:
    """NVMe offload of the optimizer is plain CPU offload below stage 3: no file ever appears."""
    read = dict(values)
    if read["stage"] < 3 and read["offload_optimizer.device"] == "nvme":
        read["offload_optimizer.device"] = "cpu"
    # Without it the trained model is saved as shards of optimizer state, which nothing but DeepSpeed opens.
    read["stage3_gather_16bit_weights_on_model_save"] |= read["stage"] == 3
    for section in ("offload_optimizer", "offload_param"):
        on_nvme = read[f"{section}.device"] == "nvme"
        read[f"{section}.nvme_path"] = problem.cluster.host.nvme_path if on_nvme else None
    return read


def _section(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    prefix = f"{section}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


KNOB_NAMES = (
    "world_size", "stage", "train_micro_batch_size_per_gpu", "gradient_checkpointing", "offload_optimizer.device",
    "offload_param.device", "offload_optimizer.ratio", "offload_optimizer.pin_memory", "offload_param.pin_memory",
    "offload_optimizer.pipeline_read", "offload_optimizer.pipeline_write", "offload_param.buffer_count",
    "offload_param.buffer_size", "offload_param.max_in_cpu", "overlap_comm", "contiguous_gradients",
    "round_robin_gradients", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)  # fmt: skip
"""Of `make_knobs`, in its order."""


def nearest_micro_batch(recipe: Recipe, world_size: int, wanted: int) -> int:
    """The largest micro-batch up to `wanted` that cuts one rank's share of the global batch evenly."""
    share = recipe.train_batch_size // world_size
    return max(size for size in range(1, max(1, min(wanted, share)) + 1) if share % size == 0)
