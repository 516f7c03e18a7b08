"""What one option does, in two or three sentences, with its effect for this model in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from zplan.candidates import Candidate, Stage, evaluate
from zplan.errors import ConfigError
from zplan.hardware import Cluster
from zplan.memory.documented import documented_bucket_bytes
from zplan.memory.terms import Phase
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.settings import STAGE3_KEYS, apply_settings, hf_auto_bucket_sizes, nearest
from zplan.units import format_bytes
from zplan.zero_config import Choice, OffloadOptimizer, OffloadParam, ZeroConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One value of the option against another, everything else equal. Negative bytes are saved."""

    change: str
    gpu_bytes: int
    """Of a rank's peak, allocated."""
    phase: Phase
    """The phase of the GPU that changes most; an option can matter in one that is not the peak."""
    phase_bytes: int
    host_bytes: int
    """Of a node, resident."""
    tokens_per_second: float | None
    """Ratio; None where the speed is not known."""

    def __str__(self) -> str:
        parts = [f"GPU peak {_signed(self.gpu_bytes)}"]
        if self.phase_bytes != self.gpu_bytes:
            parts.append(f"{self.phase} {_signed(self.phase_bytes)}")
        parts.append(f"host {_signed(self.host_bytes)}")
        if self.tokens_per_second is not None:
            parts.append(f"tokens/s {self.tokens_per_second - 1:+.0%}")
        return f"{self.change}: {', '.join(parts)}"


def _signed(num_bytes: int) -> str:
    return ("+" if num_bytes > 0 else "") + format_bytes(num_bytes) if num_bytes else "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """An option in words and in bytes."""

    key: str
    text: str
    rows: tuple[Effect, ...]
    """Empty where the option changes nothing that zplan counts; the text says why."""
    documented_bound_bytes: int | None = None
    """The 4.5x rule, for the options that the documentation states it for."""

    @property
    def effects(self) -> tuple[str, ...]:
        """The rows as lines of text."""
        lines = [str(row) for row in self.rows]
        if self.documented_bound_bytes is not None:
            lines.append(f"documented 4.5x bound of both buckets: {format_bytes(self.documented_bound_bytes)}")
        return tuple(lines)


Changes = Callable[["Question"], Iterator[tuple[str, Choice, Choice]]]
"""(what changes, before, after) of every effect worth showing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The model and configuration that an explanation speaks about."""

    shape: ModelShape
    recipe: Recipe
    choice: Choice
    cluster: Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """One option: its text, and how to show its effect."""

    text: str
    changes: Changes


def explain(key: str, shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster) -> Explanation:
    """Explain one option for one configuration.

    Options of ZeRO-3 are shown at stage 3 and offloading at the lowest stage that has it, whatever the stage of
    `choice`: the change says so.

    Raises:
        ConfigError: an unknown option, with the nearest one.
    """
    name = _topic_name(key)
    question = Question(shape=shape, recipe=recipe, choice=choice, cluster=cluster)
    topic = TOPICS[name]
    rows = tuple(
        _effect(change, evaluate(shape, recipe, before, cluster), evaluate(shape, recipe, after, cluster))
        for change, before, after in topic.changes(question)
    )
    bound = None
    if name in ("overlap_comm", "reduce_bucket_size", "allgather_bucket_size"):
        bound = documented_bucket_bytes(choice.zero, itemsize=recipe.weight_bytes)
    return Explanation(key=name, text=topic.text, rows=rows, documented_bound_bytes=bound)


def _topic_name(key: str) -> str:
    name = key.strip().lstrip("-").replace("zero_optimization.", "")
    name = name.replace("-", "_").replace(" ", "_") if name.replace("-", "_").replace(" ", "_") in TOPICS else name
    name = STAGE3_KEYS.get(name, name)
    name = name.rpartition(".")[2] if name.endswith(".pin_memory") else name
    if name in TOPICS:
        return name
    near = nearest(name, TOPICS)
    raise ConfigError(
        f"--explain {key}: no such option", because=f"the options are {', '.join(TOPICS)}",
        fix=f"--explain {near or 'overlap_comm'}",
    )  # fmt: skip


def _effect(change: str, before: Candidate, after: Candidate) -> Effect:
    old, new = before.speed.tokens_per_second, after.speed.tokens_per_second
    phases = before.memory.gpu.phases
    deltas = {phase: after.memory.gpu.phases[phase] - num_bytes for phase, num_bytes in phases.items()}
    phase = max(deltas, key=lambda name: abs(deltas[name]))
    return Effect(
        change=change,
        gpu_bytes=after.memory.gpu.allocated.expected - before.memory.gpu.allocated.expected,
        phase=phase,
        phase_bytes=deltas[phase],
        host_bytes=after.memory.host.resident_bytes - before.memory.host.resident_bytes,
        tokens_per_second=new / old if old and new else None,
    )


def _at(choice: Choice, stages: tuple[Stage, ...]) -> tuple[str, Choice]:
    """The choice at a stage where the option acts, and how to say so."""
    if choice.zero.stage in stages:
        return "", choice
    stage = stages[0]
    return f"at stage {stage}: ", replace(choice, zero=replace(choice.zero, stage=stage))


def _settings(stages: tuple[Stage, ...], *changes: tuple[str, str]) -> Changes:
    """Effects of `KEY=BEFORE -> KEY=AFTER`."""

    def make(question: Question) -> Iterator[tuple[str, Choice, Choice]]:
        where, choice = _at(question.choice, stages)
        for before, after in changes:
            yield (
                f"{where}{before} -> {after}",
                replace(choice, zero=apply_settings(choice.zero, [before])),
                replace(choice, zero=apply_settings(choice.zero, [after])),
            )

    return make


def _auto_against_default(key: str, stages: tuple[Stage, ...]) -> Changes:
    """DeepSpeed's default size against what transformers' "auto" gives for this model."""

    def make(question: Question) -> Iterator[tuple[str, Choice, Choice]]:
        auto = hf_auto_bucket_sizes(question.shape.hidden_size)[key]
        default = getattr(ZeroConfig(), key)
        yield from _settings(stages, (f"{key}={default}", f"{key}={auto}"))(question)

    return make


def _offload_optimizer(question: Question) -> Iterator[tuple[str, Choice, Choice]]:
    where, choice = _at(question.choice, (1, 2, 3))
    none = _with(choice, offload_optimizer=OffloadOptimizer())
    cpu = _with(choice, offload_optimizer=OffloadOptimizer(device="cpu"))
    yield f"{where}offload_optimizer.device=none -> cpu", none, cpu
    path = question.cluster.host.nvme_path
    if path:
        where, choice = _at(question.choice, (3,))
        cpu = _with(choice, offload_optimizer=OffloadOptimizer(device="cpu"))
        nvme = _with(choice, offload_optimizer=OffloadOptimizer(device="nvme", nvme_path=path))
        yield f"{where}offload_optimizer.device=cpu -> nvme", cpu, nvme


def _offload_param(question: Question) -> Iterator[tuple[str, Choice, Choice]]:
    where, choice = _at(question.choice, (3,))
    none = _with(choice, offload_param=OffloadParam())
    yield f"{where}offload_param.device=none -> cpu", none, _with(choice, offload_param=OffloadParam(device="cpu"))


def _pin_memory(question: Question) -> Iterator[tuple[str, Choice, Choice]]:
    where, choice = _at(question.choice, (1, 2, 3))
    pinned = _with(choice, offload_optimizer=OffloadOptimizer(device="cpu"))
    pageable = _with(choice, offload_optimizer=OffloadOptimizer(device="cpu", pin_memory=False))
    yield f"{where}with the optimizer on cpu, pin_memory=true -> false", pinned, pageable


def _with(choice: Choice, **sections: OffloadOptimizer | OffloadParam) -> Choice:
    return replace(choice, zero=replace(choice.zero, **sections))  # type: ignore[arg-type]


def _checkpointing(question: Question) -> Iterator[tuple[str, Choice, Choice]]:
    kept = replace(question.choice, gradient_checkpointing=False)
    yield "gradient_checkpointing=false -> true", kept, replace(kept, gradient_checkpointing=True)


def _nothing(question: Question) -> Iterator[tuple[str, Choice, Choice]]:
    return iter(())


_ALL_ZERO: tuple[Stage, ...] = (1, 2, 3)
TOPICS: Mapping[str, Topic] = {
    "overlap_comm": Topic(
        text="Reduces gradients on a second stream while backward goes on, which hides communication. Stages 1 and 2 "
        "then hold two reduce buckets instead of one. The documentation's 4.5x rule describes DeepSpeed before 0.4.0.",
        changes=_settings(_ALL_ZERO, ("overlap_comm=false", "overlap_comm=true")),
    ),
    "allgather_bucket_size": Topic(
        text="Meant to cut the all-gather of updated parameters into pieces of that many elements (stages 1 and 2). "
        "The installed engine gathers each partition at once where torch has all_gather_into_tensor, so it has no "
        "effect there, although the documentation counts it at 4.5x.",
        changes=_settings((1, 2), ("allgather_bucket_size=500000000", "allgather_bucket_size=50000000")),
    ),
    "reduce_bucket_size": Topic(
        text="Elements of gradients that are reduced together. Stages 1 and 2 allocate the bucket at the start of each "
        "backward (twice under overlap_comm), stage 3 keeps one for the whole run. Smaller buckets save memory and "
        "start more collectives.",
        changes=_auto_against_default("reduce_bucket_size", _ALL_ZERO),
    ),
    "round_robin_gradients": Topic(
        text="Deals gradients out to the ranks in turns, so that under optimizer offload all ranks copy to the host at "
        "the same time (stages 1 and 2). It reorders partitions and needs no memory of its own.",
        changes=_settings((1, 2), ("round_robin_gradients=false", "round_robin_gradients=true")),
    ),
    "offload_optimizer": Topic(
        text="Keeps master weights and optimizer states on the host (stages 1 to 3) or on NVMe (stage 3) and updates "
        "them with the CPU. It frees 12 bytes per trainable parameter and GPU share, and costs the way over PCIe and a "
        "slower update.",
        changes=_offload_optimizer,
    ),
    "offload_param": Topic(
        text="Keeps each rank's 16-bit partition on the host or on NVMe and brings it to the GPU before every gather "
        "(stage 3 only; accepted and ignored below).",
        changes=_offload_param,
    ),
    "pin_memory": Topic(
        text="Page-locks the host buffers of offloading, so that copies run at full speed beside the arithmetic. "
        "Pinned memory cannot be swapped, counts against `ulimit -l`, and is the default since DeepSpeed's 2026-08 "
        "releases.",
        changes=_pin_memory,
    ),
    "stage3_max_live_parameters": Topic(
        text="Elements of gathered parameters that may be on a GPU at once before the engine stops prefetching and "
        "releases (stage 3). It is a limit, not an allocation: what is really live follows the order of the modules.",
        changes=_settings((3,), ("stage3_max_live_parameters=1000000000", "stage3_max_live_parameters=100000000")),
    ),
    "stage3_max_reuse_distance": Topic(
        text="A gathered parameter that is used again within that many elements is not released (stage 3). Smaller "
        "values release more and gather more often.",
        changes=_settings((3,), ("stage3_max_reuse_distance=1000000000", "stage3_max_reuse_distance=0")),
    ),
    "stage3_gather_16bit_weights_on_model_save": Topic(
        text="Gathers all 16-bit weights on rank 0's host when the model is saved (stage 3), so that the result loads "
        "without DeepSpeed. It costs host memory for one whole model while saving, and time.",
        changes=_settings(
            (3,),
            ("stage3_gather_16bit_weights_on_model_save=false", "stage3_gather_16bit_weights_on_model_save=true"),
        ),
    ),
    "sub_group_size": Topic(
        text="The optimizer step at stage 3 works on groups of that many elements; its fp32 gradients and temporaries "
        "are as large as one group's partition. Smaller groups save memory in the step; with NVMe they are what is "
        "swapped at once.",
        changes=_settings((3,), ("sub_group_size=1000000000", "sub_group_size=100000000")),
    ),
    "stage3_prefetch_bucket_size": Topic(
        text="Elements that are gathered ahead of their use (stage 3). More hides communication better and keeps more "
        "parameters live.",
        changes=_auto_against_default("stage3_prefetch_bucket_size", (3,)),
    ),
    "stage3_param_persistence_threshold": Topic(
        text="Parameters of at most that many elements stay gathered on every GPU (stage 3): norms and biases, which "
        "are many and small. A larger threshold saves small collectives and costs memory.",
        changes=_auto_against_default("stage3_param_persistence_threshold", (3,)),
    ),
    "contiguous_gradients": Topic(
        text="Copies gradients into one buffer as they appear, which avoids fragmentation. The buffer is the reduce "
        "bucket, so without it there is none. Offloading at stages 1 and 2 switches it on.",
        changes=_settings(_ALL_ZERO, ("contiguous_gradients=true", "contiguous_gradients=false")),
    ),
    "gradient_checkpointing": Topic(
        text="Keeps only the input of each layer and computes the rest again in backward. One more forward of the "
        "layers buys the activations of all layers but one.",
        changes=_checkpointing,
    ),
    "sliding_window": Topic(
        text="Sparse or sliding-window attention is part of the model (sliding_window in config.json), not a switch. "
        "With sdpa or flash attention no score matrix is stored, so a window saves arithmetic and no training memory; "
        "DeepSpeed's own sparse_attention section has been removed.",
        changes=_nothing,
    ),
    "tensor_parallel": Topic(
        text="DeepSpeed's AutoTP (tensor_parallel.autotp_size) splits each weight matrix over GPUs, with an all-reduce "
        "of activations in every layer; it needs stage 0, 1 or 2. zplan does not plan it yet, so no bytes are given.",
        changes=_nothing,
    ),
}
"""Option -> explanation."""
