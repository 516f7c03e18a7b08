"""estimate_memory: every byte of one configuration, on GPU, host and NVMe, by phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from zplan.autotp import cut_shape
from zplan.hardware import Cluster
from zplan.memory import runtime
from zplan.memory.attention import is_windowed
from zplan.memory.bf16_optimizer import is_dealt, takes_bf16_optimizer
from zplan.memory.course import course
from zplan.memory.documented import documented_bucket_bytes
from zplan.memory.exchange import Exchange
from zplan.memory.host import ZERO_GRADIENTS, estimate_host, host_bytes
from zplan.memory.host_limits import limit_notes
from zplan.memory.instances import instances
from zplan.memory.limits import not_modelled, unchecked
from zplan.memory.loss import FP32, TOKEN_TILE, VOCAB_TILE
from zplan.memory.memo import Kept
from zplan.memory.meter import KIND_NAMES, Kind
from zplan.memory.outside import outside_allocator, ranks_of_node
from zplan.memory.replay import replay_of
from zplan.memory.resident import Resident, resident
from zplan.memory.script import STEP_PHASES, Course, Kinds, StepPhase
from zplan.memory.shards import shard
from zplan.memory.stage12 import partition
from zplan.memory.sub_groups import COPY_CHUNK_NUMEL
from zplan.memory.terms import PHASES, VERDICTS, ByteRange, GpuEstimate, MemoryEstimate, Phase, Term
from zplan.memory.timeline import record
from zplan.memory.trainable import Layout, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.values import dataclass
from zplan.zero_config import Choice, ZeroConfig

BucketRule = Literal["engine", "documented"]
FP64 = 8
MARGIN_LOW_PERCENT, MARGIN_HIGH_PERCENT = 98, 104
"""The formula's own error, assumed; reports/ shows where it is larger."""


def estimate_memory(
    shape: ModelShape,
    recipe: Recipe,
    choice: Choice,
    cluster: Cluster,
    *,
    bucket_rule: BucketRule = "engine",
    rank: int | None = None,
) -> MemoryEstimate:
    """Peak bytes of every phase for the worst rank, the host of one node, and the NVMe.

    Args:
        bucket_rule: which bucket bytes the verdict uses: what the installed engine allocates, or the documentation's
            4.5x rule.
        rank: whose GPU; None is the rank that holds most.
    """
    on_cpu = cluster.gpu.kind == "cpu"
    missing = not_modelled(shape, recipe, choice, on_cpu=on_cpu)
    shape = cut_shape(shape, choice.batch.autotp_size)
    laid = layout(shape, recipe)
    still = standing_of(laid, recipe, choice, cluster, rank)
    walked = course_of(shape, recipe, laid, choice, on_cpu=on_cpu)
    replay = replay_of(walked.script, instances(laid), recipe.weight_bytes, rank, Exchange.of(recipe, cluster))
    terms = _terms(still.terms, replay.peaks(walked, choice))
    phases = phase_bytes(terms)
    peak = max(phases.values())
    host, nvme = estimate_host(
        laid, recipe, choice, cluster, partition_numel=still.partition_numel, rank_bytes=peak if on_cpu else 0,
        touched_numel=still.node_touched_numel,
    )  # fmt: skip
    return MemoryEstimate(
        gpu=_gpu(terms, phases, shape, recipe, choice, cluster, bucket_rule, is_whole=not missing),
        host=host,
        nvme=nvme,
        notes=(*missing, *unchecked(recipe), *_notes(recipe, choice, cluster), *limit_notes(host.limits)),
    )


_STANDING: Kept[tuple[object, ...], tuple[Layout, Resident]] = Kept(512)


def standing_of(laid: Layout, recipe: Recipe, choice: Choice, cluster: Cluster, rank: int | None) -> Resident:
    """`standing`, recomputation or not; kept, because a search bounds what it then asks about.

    Args:
        rank: whose; every rank of the node is then taken to be like it.
    """
    key = (id(laid), recipe, choice.zero, choice.batch, cluster, rank)
    known = _STANDING.get(key)
    if known is None or known[0] is not laid:
        known = _STANDING.keep(key, (laid, standing(laid, recipe, choice, cluster, rank)))
    return known[1]


def standing(laid: Layout, recipe: Recipe, choice: Choice, cluster: Cluster, rank: int | None) -> Resident:
    """What a rank holds all the time. Below stage 3 the weights are loaded in host memory and reach a GPU at init."""
    items, zero, world = instances(laid), choice.zero, choice.batch.zero_ranks
    cut = None
    if zero.stage in (1, 2):
        dealt = is_dealt(zero, Exchange.of(recipe), recipe.weight_bytes)
        cut = partition(items, world, rank, dealt=dealt)
    shards, on_cpu = shard(items, zero, world) if zero.stage == 3 else None, cluster.gpu.kind == "cpu"
    still = resident(laid, recipe, choice, cluster, cut, shards)
    if cut is not None:
        ranks = ranks_of_node(choice, cluster)
        touched = sum(cut.touched_by_rank[:ranks]) if rank is None else ranks * cut.touched_numel
        still = replace(still, node_touched_numel=touched)
    if on_cpu:
        offloaded = _offloaded_to_itself(laid, recipe, choice, cluster, still)
        return replace(still, terms=_without_what_was_before(still.terms, offloaded))
    return still if zero.stage == 3 else replace(still, terms=_without_load(still.terms))


def _offloaded_to_itself(
    laid: Layout, recipe: Recipe, choice: Choice, cluster: Cluster, still: Resident
) -> tuple[Term, ...]:
    """What a CPU rank "offloads" stays in its own memory: the host's offload terms, of one rank."""
    found = host_bytes(
        laid, recipe, choice, cluster, partition_numel=still.partition_numel, rank_bytes=0,
        touched_numel=still.node_touched_numel,
    )  # fmt: skip
    ranks = ranks_of_node(choice, cluster)
    return tuple(
        replace(term, bytes=term.bytes // ranks, formula=f"{term.formula}, of one rank")
        for term in found.terms
        if term.name.startswith("offloaded")
    )


def _without_what_was_before(terms: tuple[Term, ...], offloaded: tuple[Term, ...]) -> tuple[Term, ...]:
    """All terms of a CPU rank. Stages 1 and 2 flatten before they make what they offload; at ZeRO-3 the buffers of its
    initialize come after the gradients of zeros. Either counts for what it is more than the other.

    Source: deepspeed 0.19.8, stage_1_and_2.py (__init__), stage3.py (_setup_for_real_optimizer).
    """
    made = sum(term.bytes for term in offloaded if term.phases != ("init",))
    buffers = sum(term.bytes for term in terms if term.name == "buffers at initialize") if offloaded else 0
    less = {"flattening": made, ZERO_GRADIENTS: buffers}
    every = (*terms, *offloaded)
    return tuple(
        replace(term, bytes=max(0, term.bytes - less[term.name])) if term.name in less else term for term in every
    )


def course_of(shape: ModelShape, recipe: Recipe, laid: Layout, choice: Choice, *, on_cpu: bool) -> Course:
    """Activations and loss of one micro-step of the choice."""
    partitioned, batch = choice.zero.stage == 3, choice.batch
    recording = record(
        shape, recipe, laid, micro_batch=batch.train_micro_batch_size_per_gpu, on_cpu=on_cpu, partitioned=partitioned,
        sequence_parallel_size=batch.sequence_parallel_size,
    )  # fmt: skip
    return course(recording, checkpointing=choice.gradient_checkpointing, fetches=partitioned)


def phase_bytes(terms: tuple[Term, ...]) -> dict[Phase, int]:
    """What is live at the peak of each phase."""
    phases: dict[Phase, int] = dict.fromkeys(PHASES, 0)
    for term in terms:
        for phase in term.phases:
            phases[phase] += term.bytes
    return phases


def _without_load(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    return tuple(
        replace(term, phases=term.phases[1:]) if term.phases[0] == "load" else term
        for term in terms
        if term.phases != ("load",)
    )


def _terms(still: tuple[Term, ...], peaks: dict[StepPhase, Kinds]) -> tuple[Term, ...]:
    terms = list(still)
    for phase in STEP_PHASES:
        for kind, num_bytes in enumerate(peaks[phase]):
            if num_bytes:
                terms.append(
                    Term(
                        name=KIND_NAMES[kind],
                        bytes=num_bytes,
                        phases=(phase,),
                        formula=f"live at the peak of {phase}, from the replay of the step",
                        source=_KIND_SOURCES[kind],
                    )
                )
    return tuple(term for term in terms if term.bytes)


_KIND_SOURCES = {
    Kind.ACTIVATIONS: "transformers 5.23.0 modules on torch 2.13.0 autograd, zplan/memory/operations.py",
    Kind.LOSS: "trl 1.16.0, trl/kernels/chunked_logprob.py",
    Kind.GRADIENTS: "deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py (gradient hooks)",
    Kind.BUCKETS: "deepspeed 0.19.8, runtime/zero/stage_1_and_2.py (setup_buckets)",
    Kind.GATHERED_PARAMETERS: "deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (fetch_sub_module)",
    Kind.TEMPORARIES: "deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py (reduction and step)",
}


def _gpu(
    terms: tuple[Term, ...],
    phases: dict[Phase, int],
    shape: ModelShape,
    recipe: Recipe,
    choice: Choice,
    cluster: Cluster,
    bucket_rule: BucketRule,
    *,
    is_whole: bool,
) -> GpuEstimate:
    documented = documented_bucket_bytes(choice.zero, itemsize=recipe.weight_bytes)
    judged = max(phases.values())
    if bucket_rule == "documented" and documented is not None:
        engine = sum(term.bytes for term in terms if term.name == KIND_NAMES[Kind.BUCKETS])
        judged = max(judged, judged - engine + documented)
    laid = layout(shape, recipe)
    largest = largest_of_engine(laid, recipe, choice) + largest_of_model(shape, laid, recipe, choice)
    ranges = gpu_ranges(judged, largest, outside_allocator(choice, cluster), on_cpu=cluster.gpu.kind == "cpu")
    level, short = gpu_level(ranges.used, cluster.gpu.free_bytes, is_whole=is_whole)
    return GpuEstimate(
        allocated=ranges.allocated,
        reserved=ranges.reserved,
        used=ranges.used,
        capacity_bytes=cluster.gpu.total_bytes,
        free_bytes=cluster.gpu.free_bytes,
        verdict=VERDICTS[level],
        short_bytes=short,
        phases=phases,
        terms=terms,
        documented_bound_bytes=documented,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """The same bytes as tensors use them, as the allocator holds them, as nvidia-smi shows them."""

    allocated: ByteRange
    reserved: ByteRange
    used: ByteRange


def gpu_ranges(peak: int, largest_block: int, outside: ByteRange, *, on_cpu: bool) -> Ranges:
    """From the peak of a rank to what its GPU shows. Integers only: whole columns of them are taken as well.

    Args:
        largest_block: the largest tensors that come and go, one of each kind: those of the engine on streams of their
            own, those of the model.
        outside: what no allocator holds.
    """
    workspace = runtime.NOTHING if on_cpu else runtime.CUBLAS_WORKSPACE
    allocated = ByteRange(
        low=peak * MARGIN_LOW_PERCENT // 100 + workspace.low,
        expected=peak + workspace.expected,
        high=peak * MARGIN_HIGH_PERCENT // 100 + workspace.high,
    )
    reserved = runtime.reserved_range(allocated, on_cpu=on_cpu, largest_block=largest_block)
    used = ByteRange(
        low=reserved.low + outside.low,
        expected=reserved.expected + outside.expected,
        high=reserved.high + outside.high,
    )
    return Ranges(allocated=allocated, reserved=reserved, used=used)


def largest_of_engine(laid: Layout, recipe: Recipe, choice: Choice) -> int:
    """The largest tensor of the engine that comes and goes: a reduce bucket, an fp32 gradient, a gradient in fp64 for
    its norm, a gathered weight."""
    zero, b = choice.zero, recipe.weight_bytes
    gathers_for_muon = laid.muon and zero.stage == 3
    reduced = Exchange.of(recipe).for_batch(choice.batch, b).communicated_bytes(b) if zero.stage == 3 else b
    normed = _normed_numel(laid, choice)
    if takes_bf16_optimizer(zero, Exchange.of(recipe), b):
        reduced = normed = 0  # it has no buckets, and takes its norm in fp32
    return max(
        reduced * zero.reduce_bucket_size if zero.stage and (zero.contiguous_gradients or gathers_for_muon) else 0,
        FP32 * laid.largest_trainable,
        FP64 * normed,
        b * laid.largest if zero.stage == 3 else 0,
    )


def _normed_numel(laid: Layout, choice: Choice) -> int:
    """Most elements of a gradient of which ZeRO takes the norm at once: of what one rank has of it.

    Source: deepspeed 0.19.8, runtime/zero/utils.py:59 (get_norm_dtype); stage_1_and_2.py:1873
    (set_norm_for_param_grad_in_gpu), :2684 (get_grad_norm_direct); stage3.py:1960 (_constant_buffered_norm2), :2457.
    """
    zero, ranks = choice.zero, choice.batch.zero_ranks
    match zero.stage:
        case 0:
            return 0
        case 3:
            part = -(-laid.largest_trainable // ranks)
            return min(part, COPY_CHUNK_NUMEL) if zero.offloads_optimizer else part
        case _:
            return min(laid.largest_trainable, -(-laid.trainable_numel // ranks))


def largest_of_model(shape: ModelShape, laid: Layout, recipe: Recipe, choice: Choice) -> int:
    """The largest tensors of forward and backward: logits or the middle of an MLP, all experts with their adapter
    folded in (experts.py), and scores where there are any: eager attention, and under sdpa grouped queries in fp32
    (scores.py, takes_math_kernel)."""
    length, b = recipe.max_length // choice.batch.sequence_parallel_size, recipe.weight_bytes
    tokens = choice.batch.train_micro_batch_size_per_gpu * length
    grouped = shape.num_key_value_heads < shape.num_attention_heads and not is_windowed(shape, length)
    math = recipe.attention == "sdpa" and recipe.dtype == "fp32" and grouped
    has_scores = recipe.attention == "eager" or math
    scores = FP32 * tokens * recipe.max_length * shape.num_attention_heads if has_scores else 0
    return (
        scores
        + b * laid.largest_folded
        + max(
            FP32 * tokens * shape.vocab_size if recipe.loss == "full" else b * min(tokens, TOKEN_TILE) * VOCAB_TILE,
            b * tokens * (shape.intermediate_size or 0),
        )
    )


def gpu_level(used: ByteRange, free_bytes: int, *, is_whole: bool) -> tuple[int, int]:
    """(index into VERDICTS, bytes short by `high`); integers only, so that columns are taken as well.

    fits: `high` fits; tight: only `expected` does, or something is not modelled (limits.py).
    """
    is_short, is_shorter = 1 * (used.high > free_bytes), 1 * (used.expected > free_bytes)
    return is_short + is_shorter + (1 - is_short) * (1 - is_whole), is_short * (used.high - free_bytes)


def _notes(recipe: Recipe, choice: Choice, cluster: Cluster) -> tuple[str, ...]:
    zero = choice.zero
    notes = [*_quantizer_notes(recipe, zero, cluster)] if zero.stage == 3 else []
    if zero.offload_param.device != "none" and zero.stage != 3:
        notes.append(f"offload_param has no effect at stage {zero.stage}")
    if zero.offload_optimizer.device != "none" and zero.stage == 0:
        notes.append("offload_optimizer has no effect at stage 0")
    if zero.stage in (1, 2):
        notes.append("allgather_bucket_size has no effect where all_gather_into_tensor exists")
    if cluster.gpu.kind == "cpu" and zero.overlap_comm:
        notes.append("overlap_comm overlaps nothing on CPU ranks: the accelerator is synchronous")
    return tuple(notes)


def _quantizer_notes(recipe: Recipe, zero: ZeroConfig, cluster: Cluster) -> Iterator[str]:
    """ZeRO++ that does nothing, or something else than it says.

    Source: deepspeed 0.19.8, runtime/zero/partition_parameters.py (_partition_param), stage3.py:1928
    (__avg_scatter_grads), ops/csrc/quantization/pt_binding.cpp (ds_swizzle_quant: (__half*)input_vals.data_ptr()).
    """
    reduced = recipe.communication_data_type or recipe.dtype
    if zero.zero_quantized_nontrainable_weights:
        yield (
            "zero_quantized_nontrainable_weights has no effect here: weights are cut while the model is built, before"
            " PEFT freezes them"
        )
    if zero.zero_quantized_gradients and cluster.nodes == 1:
        yield "zero_quantized_gradients has no effect within one node: DeepSpeed quantises between nodes only"
    elif zero.zero_quantized_gradients and reduced != "fp16":
        yield (
            f"zero_quantized_gradients reads the bits of {reduced} gradients as fp16, and the sums are wrong: set"
            " communication_data_type to fp16"
        )
