"""What one option does, in two or three sentences, with its effect for this model in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from zplan.autotp import cannot_cut
from zplan.candidates import Candidate, Stage, evaluate
from zplan.errors import ConfigError
from zplan.explanation import Effect, Explanation
from zplan.hardware import Cluster
from zplan.memory.documented import documented_bucket_bytes
from zplan.memory.terms import Phase
from zplan.model_shape import ModelShape
from zplan.recipe import Attention, Recipe
from zplan.sequence import refusals
from zplan.settings import STAGE3_KEYS, apply_settings, hf_auto_bucket_sizes, nearest
from zplan.values import dataclass
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, OffloadParam, ZeroConfig

Change = tuple[str, "Question", "Question"]
"""(what changes, before, after)."""
Changes = Callable[["Question"], Iterator[Change]]
"""Every effect worth showing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The model and configuration that an explanation speaks about."""

    shape: ModelShape
    recipe: Recipe
    choice: Choice
    cluster: Cluster

    def answer(self) -> Candidate:
        return evaluate(self.shape, self.recipe, self.choice, self.cluster)

    def with_zero(self, zero: ZeroConfig) -> Question:
        return replace(self, choice=replace(self.choice, zero=zero))


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
    rows = tuple(_effect(change, before.answer(), after.answer()) for change, before, after in topic.changes(question))
    bound = None
    if name in ("overlap_comm", "reduce_bucket_size", "allgather_bucket_size"):
        stage = choice.zero.stage if choice.zero.stage in (1, 2) else 2
        documented = replace(choice.zero, stage=stage, overlap_comm=True)
        bound = documented_bucket_bytes(documented, itemsize=recipe.weight_bytes)
    return Explanation(key=name, text=topic.text, rows=rows, documented_bound_bytes=bound)


_ALIASES = {
    "sparse_attention": "sliding_window", "sliding_window_attention": "sliding_window",
    "tensor_parallelism": "tensor_parallel", "autotp": "tensor_parallel", "autotp_size": "tensor_parallel",
    "ulysses": "sequence_parallel_size", "sequence_parallel": "sequence_parallel_size",
    "sp_size": "sequence_parallel_size",
    "activation_checkpointing": "gradient_checkpointing", "checkpointing": "gradient_checkpointing",
}  # fmt: skip
"""Other words for a topic."""


def _topic_name(key: str) -> str:
    name = key.strip().lstrip("-").replace("zero_optimization.", "").replace("-", "_").replace(" ", "_")
    name = _ALIASES.get(name.rpartition(".")[2], name)
    name = STAGE3_KEYS.get(name, name)
    name = name.rpartition(".")[2] if name.endswith(".pin_memory") else name.removesuffix(".device")
    if name in TOPICS:
        return name
    near = nearest(name, TOPICS)
    raise ConfigError(
        f"--explain {key}: no such option", because=f"the options are {', '.join(TOPICS)}",
        fix=f"--explain {near or 'overlap_comm'}",
    )  # fmt: skip


def _effect(change: str, before: Candidate, after: Candidate) -> Effect:
    old, new = before.speed.tokens_per_second, after.speed.tokens_per_second
    phase, phase_bytes = _most_changed(before.memory.gpu.phases, after.memory.gpu.phases)
    host_phase, host_phase_bytes = _most_changed(before.memory.host.phases, after.memory.host.phases)
    alike = before.choice.batch.world_size == after.choice.batch.world_size
    return Effect(
        change=change,
        gpu_bytes=after.memory.gpu.allocated.expected - before.memory.gpu.allocated.expected,
        phase=phase,
        phase_bytes=phase_bytes,
        host_phase=host_phase,
        host_phase_bytes=host_phase_bytes,
        host_bytes=after.memory.host.resident_bytes - before.memory.host.resident_bytes if alike else None,
        tokens_per_second=new / old if old and new and alike else None,
    )


def _most_changed(before: Mapping[Phase, int], after: Mapping[Phase, int]) -> tuple[Phase, int]:
    deltas = {phase: after[phase] - num_bytes for phase, num_bytes in before.items()}
    phase = max(deltas, key=lambda name: abs(deltas[name]))
    return phase, deltas[phase]


def _at(question: Question, stages: tuple[Stage, ...]) -> tuple[str, Question]:
    """The question at a stage where the option acts, and how to say so."""
    if question.choice.zero.stage in stages:
        return "", question
    stage = stages[0]
    return f"at stage {stage}: ", question.with_zero(replace(question.choice.zero, stage=stage))


def _settings(stages: tuple[Stage, ...], *changes: tuple[str, str]) -> Changes:
    """Effects of `KEY=BEFORE -> KEY=AFTER`."""

    def make(question: Question) -> Iterator[Change]:
        where, at = _at(question, stages)
        for settings in changes:
            before, after = (at.with_zero(apply_settings(at.choice.zero, [setting])) for setting in settings)
            yield f"{where}{settings[0]} -> {settings[1]}", before, after

    return make


def _auto_against_default(key: str, stages: tuple[Stage, ...]) -> Changes:
    """DeepSpeed's default size against what transformers' "auto" gives for this model."""

    def make(question: Question) -> Iterator[Change]:
        auto = hf_auto_bucket_sizes(question.shape.hidden_size)[key]
        default = getattr(ZeroConfig(), key)
        yield from _settings(stages, (f"{key}={default}", f"{key}={auto}"))(question)

    return make


def _offload_optimizer(question: Question) -> Iterator[Change]:
    where, at = _at(question, (1, 2, 3))
    none, cpu = OffloadOptimizer(), OffloadOptimizer(device="cpu")
    yield (
        f"{where}offload_optimizer.device=none -> cpu",
        _with(at, offload_optimizer=none),
        _with(at, offload_optimizer=cpu),
    )
    path = question.cluster.host.nvme_path
    if path:
        where, at = _at(question, (3,))
        nvme = _with(at, offload_optimizer=OffloadOptimizer(device="nvme", nvme_path=path))
        yield f"{where}offload_optimizer.device=cpu -> nvme", _with(at, offload_optimizer=cpu), nvme


def _offload_param(question: Question) -> Iterator[Change]:
    where, at = _at(question, (3,))
    none, cpu = _with(at, offload_param=OffloadParam()), _with(at, offload_param=OffloadParam(device="cpu"))
    yield f"{where}offload_param.device=none -> cpu", none, cpu


def _pin_memory(question: Question) -> Iterator[Change]:
    where, at = _at(question, (1, 2, 3))
    pinned = _with(at, offload_optimizer=OffloadOptimizer(device="cpu"))
    pageable = _with(at, offload_optimizer=OffloadOptimizer(device="cpu", pin_memory=False))
    yield f"{where}with the optimizer on cpu, pin_memory=true -> false", pinned, pageable


def _with(question: Question, **sections: OffloadOptimizer | OffloadParam) -> Question:
    return question.with_zero(replace(question.choice.zero, **sections))  # type: ignore[arg-type]


def _gather_to_save(question: Question) -> Iterator[Change]:
    """Saving states that are on the GPUs takes more host memory than the weights; offloaded ones are there already."""
    where, at = _at(question, (3,))
    key = "stage3_gather_16bit_weights_on_model_save"
    for told, on in (
        ("", at),
        ("with the optimizer on cpu, ", _with(at, offload_optimizer=OffloadOptimizer(device="cpu"))),
    ):
        left, gathered = (
            on.with_zero(apply_settings(on.choice.zero, [f"{key}={value}"])) for value in ("false", "true")
        )
        yield f"{where}{told}{key}=false -> true", left, gathered


def _checkpointing(question: Question) -> Iterator[Change]:
    kept, again = (
        replace(question, choice=replace(question.choice, gradient_checkpointing=on)) for on in (False, True)
    )
    yield "gradient_checkpointing=false -> true", kept, again


def _attention(question: Question) -> Iterator[Change]:
    """The window of the model against none, and the implementation that stores scores against one that does not."""
    shape = question.shape
    if shape.sliding_window:
        whole = replace(shape, sliding_window=None, layer_types=("full_attention",) * len(shape.layer_types))
        yield f"sliding_window={shape.sliding_window} -> null", question, replace(question, shape=whole)
    eager, sdpa = (
        replace(question, recipe=replace(question.recipe, attention=attention)) for attention in _STORED_OR_NOT
    )
    yield "attention=eager -> sdpa", eager, sdpa


def _sequence_parallel(question: Question) -> Iterator[Change]:
    """The same batch over half as many micro-batches at a time; then over as few as the model and the ranks allow."""
    alone = replace(question, choice=replace(question.choice, batch=_shared(question.choice.batch, 1)))
    batch = alone.choice.batch
    sizes = [
        n for n in range(2, batch.world_size + 1)
        if batch.world_size % n == 0 and not any(refusals(question.shape, question.recipe, n))
    ]  # fmt: skip
    for ranks in sorted({*sizes[:1], *sizes[-1:]}):
        shared = replace(alone, choice=replace(alone.choice, batch=_shared(batch, ranks)))
        yield f"sequence_parallel_size=1 -> {ranks}", alone, shared


def _shared(batch: BatchSizes, ranks: int) -> BatchSizes:
    """The same global batch, as near as whole accumulation steps get, with `ranks` ranks to a sequence."""
    steps = batch.gradient_accumulation_steps * ranks // batch.sequence_parallel_size
    return replace(batch, sequence_parallel_size=ranks, gradient_accumulation_steps=max(steps, 1))


def _tensor_parallel(question: Question) -> Iterator[Change]:
    """Half of each matrix on a rank, and half as many micro-batches at a time; under full logits, as AutoTP needs."""
    where, at = _at(question, (2, 1, 0))
    batch = replace(at.choice.batch, autotp_size=1, sequence_parallel_size=1)
    recipe = at.recipe if at.shape.tie_word_embeddings else replace(at.recipe, loss="full")
    if batch.world_size % 2 or cannot_cut(at.shape, recipe, 2, stage=at.choice.zero.stage):
        return
    whole = replace(at, recipe=recipe, choice=replace(at.choice, batch=batch))
    cut = replace(batch, autotp_size=2, gradient_accumulation_steps=2 * batch.gradient_accumulation_steps)
    loss = "" if recipe == at.recipe else "with loss full, "
    yield f"{where}{loss}autotp_size=1 -> 2", whole, replace(whole, choice=replace(whole.choice, batch=cut))


_STORED_OR_NOT: tuple[Attention, Attention] = ("eager", "sdpa")
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
        "the same time (stages 1 and 2). It reorders partitions: which gradients a GPU keeps changes, and when.",
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
        "Pinned memory cannot be swapped. It is DeepSpeed's default, and pinned by the CUDA driver, which `ulimit -l` "
        "does not count; under DS_PIN_MEMORY_BACKEND=native, and for NVMe, pages are locked and count.",
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
        changes=_gather_to_save,
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
    "zero_hpz_partition_size": Topic(
        text="ZeRO++: keeps a second copy of the weights cut over that many ranks, one node's as a rule, so that "
        "backward gathers within the node (stage 3). The copy of what trains is there from its release to the update.",
        changes=_settings((3,), ("zero_hpz_partition_size=1", "zero_hpz_partition_size=2")),
    ),
    "zero_quantized_weights": Topic(
        text="ZeRO++: gathers weights as int8 with a float32 scale for up to 8000 of them (stage 3). It halves what is "
        "sent, not what is held: the int8 buffer and its fp16 copy lie beside the weights while they arrive.",
        changes=_settings((3,), ("zero_quantized_weights=false", "zero_quantized_weights=true")),
    ),
    "zero_quantized_gradients": Topic(
        text="ZeRO++: reduces matrices' gradients as 4-bit integers, within the node and then between nodes (stage 3; "
        "one node reduces as ever). Its kernel reads fp16: under bf16 the sums are wrong.",
        changes=_settings((3,), ("zero_quantized_gradients=false", "zero_quantized_gradients=true")),
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
        "With sdpa or flash attention no score matrix is stored, so a window saves arithmetic rather than training "
        "memory; DeepSpeed's own sparse_attention section has been removed.",
        changes=_attention,
    ),
    "sequence_parallel_size": Topic(
        text="Ulysses: ranks share each sequence and trade positions for heads around the attention; accelerate's "
        "ParallelismConfig(sp_size, sp_backend) switches it on, and the tuner does not search it. Activations and loss "
        "shrink by that factor, ZeRO still cuts over all ranks, and fewer micro-batches run at a time. Gradients are "
        "then reduced in fp32, which doubles stage 3's bucket in 16 bits and copies what other stages reduce.",
        changes=_sequence_parallel,
    ),
    "tensor_parallel": Topic(
        text="DeepSpeed's AutoTP (tensor_parallel.autotp_size) splits the matrices of each layer and the head over "
        "ranks, with an all-reduce of activations behind every pair; embeddings, a head that is tied to them and norms "
        "stay whole, and ZeRO cuts each part over the ranks that are left. TRL's own losses would read the part of an "
        "untied head, so it needs the loss full. Without a row below it is not modelled; the tuner does not search it.",
        changes=_tensor_parallel,
    ),
}
"""Option -> explanation."""
