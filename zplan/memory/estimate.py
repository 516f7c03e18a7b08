"""estimate_memory: every byte of one configuration, on GPU, host and NVMe, by phase."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from zplan.hardware import Cluster
from zplan.memory import runtime
from zplan.memory.course import STEP_PHASES, Kinds, StepPhase, course
from zplan.memory.documented import documented_bucket_bytes
from zplan.memory.host import estimate_host, host_bytes, ranks_of_node
from zplan.memory.instances import instances
from zplan.memory.limits import not_modelled, unchecked
from zplan.memory.loss import FP32, TOKEN_TILE, VOCAB_TILE
from zplan.memory.meter import KIND_NAMES, Kind
from zplan.memory.replay import replay_of
from zplan.memory.resident import Resident, resident
from zplan.memory.stage3 import Shards, shard
from zplan.memory.stage12 import Partitions, partition
from zplan.memory.terms import ByteRange, GpuEstimate, MemoryEstimate, Phase, Term, Verdict
from zplan.memory.timeline import record
from zplan.memory.trainable import Layout, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import Choice

BucketRule = Literal["engine", "documented"]
MARGIN_LOW, MARGIN_HIGH = 0.98, 1.04
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
    laid = layout(shape, recipe)
    cut, shards = _cut(laid, choice, rank)
    still = resident(laid, recipe, choice, cut, shards)
    peaks = _replay(shape, recipe, choice, laid, rank, on_cpu)
    if on_cpu:
        still = replace(still, terms=(*still.terms, *offloaded_to_itself(laid, recipe, choice, cluster, still)))
    # below stage 3 the weights are loaded in host memory and reach the GPU at initialize
    terms = _terms(still.terms if on_cpu or choice.zero.stage == 3 else _without_load(still.terms), peaks)
    phases: dict[Phase, int] = {
        phase: sum(term.bytes for term in terms if phase in term.phases)
        for phase in ("load", "init", "forward", "backward", "step", "save")
    }
    peak = max(phases.values())
    host, nvme = estimate_host(
        laid, recipe, choice, cluster, partition_numel=still.partition_numel, rank_bytes=peak if on_cpu else 0
    )
    gpu = _gpu(terms, phases, peak, recipe, choice, cluster, bucket_rule, _largest_block(shape, laid, recipe, choice))
    missing = not_modelled(shape, recipe, choice)
    return MemoryEstimate(
        gpu=replace(gpu, verdict="tight") if missing and gpu.verdict == "fits" else gpu,
        host=host,
        nvme=nvme,
        notes=(*missing, *unchecked(shape, recipe), *_notes(choice, on_cpu)),
    )


def offloaded_to_itself(
    laid: Layout, recipe: Recipe, choice: Choice, cluster: Cluster, still: Resident
) -> tuple[Term, ...]:
    """What a CPU rank "offloads" stays in its own memory: the host's offload terms, of one rank."""
    found = host_bytes(laid, recipe, choice, cluster, partition_numel=still.partition_numel, rank_bytes=0)
    ranks = ranks_of_node(choice, cluster)
    return tuple(
        replace(term, bytes=term.bytes // ranks, formula=f"{term.formula}, of one rank")
        for term in found.terms
        if term.name.startswith("offloaded")
    )


def _cut(laid: Layout, choice: Choice, rank: int | None) -> tuple[Partitions | None, Shards | None]:
    items, world = instances(laid), choice.batch.world_size
    if choice.zero.stage == 3:
        return None, shard(items, choice.zero, world)
    return (partition(items, world, rank) if choice.zero.stage else None), None


def _replay(
    shape: ModelShape,
    recipe: Recipe,
    choice: Choice,
    laid: Layout,
    rank: int | None,
    on_cpu: bool,
) -> dict[StepPhase, Kinds]:
    recording = record(shape, recipe, laid, micro_batch=choice.batch.train_micro_batch_size_per_gpu, on_cpu=on_cpu)
    walked = course(recording, checkpointing=choice.gradient_checkpointing, fetches=choice.zero.stage == 3)
    return replay_of(walked.script, recording.items, recording.sizes.itemsize, rank).peaks(walked, choice)


def _without_load(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    kept = (replace(term, phases=tuple(phase for phase in term.phases if phase != "load")) for term in terms)
    return tuple(term for term in kept if term.phases)


def _terms(still: tuple[Term, ...], peaks: dict[StepPhase, Kinds]) -> tuple[Term, ...]:
    terms = list(still)
    for phase in STEP_PHASES:
        for kind, num_bytes in enumerate(peaks[phase]):
            if num_bytes:
                terms.append(
                    Term(
                        name=KIND_NAMES[Kind(kind)],
                        bytes=num_bytes,
                        phases=(phase,),
                        formula=f"live at the peak of {phase}, from the replay of the step",
                        source=_KIND_SOURCES[Kind(kind)],
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
    peak: int,
    recipe: Recipe,
    choice: Choice,
    cluster: Cluster,
    bucket_rule: BucketRule,
    largest_block: int,
) -> GpuEstimate:
    on_cpu = cluster.gpu.kind == "cpu"
    documented = documented_bucket_bytes(choice.zero, itemsize=recipe.weight_bytes)
    workspace = runtime.NOTHING if on_cpu else runtime.CUBLAS_WORKSPACE
    judged = peak
    if bucket_rule == "documented" and documented is not None:
        engine = sum(term.bytes for term in terms if term.name == KIND_NAMES[Kind.BUCKETS])
        judged = max(peak, max(phases.values()) - engine + documented)
    allocated = ByteRange(
        low=int(judged * MARGIN_LOW) + workspace.low,
        expected=judged + workspace.expected,
        high=int(judged * MARGIN_HIGH) + workspace.high,
    )
    reserved = runtime.reserved_range(allocated, on_cpu=on_cpu, largest_block=largest_block)
    extra = runtime.overheads(
        on_cpu=on_cpu,
        num_ranks=cluster.world_size,
        num_communicators=2 if choice.zero.zero_hpz_partition_size > 1 else 1,
    )
    used = ByteRange(
        low=reserved.low + extra.context.low + extra.nccl.low,
        expected=reserved.expected + extra.context.expected + extra.nccl.expected,
        high=reserved.high + extra.context.high + extra.nccl.high,
    )
    verdict, short = _verdict(used, cluster.gpu.free_bytes)
    return GpuEstimate(
        allocated=allocated,
        reserved=reserved,
        used=used,
        capacity_bytes=cluster.gpu.total_bytes,
        free_bytes=cluster.gpu.free_bytes,
        verdict=verdict,
        short_bytes=short,
        phases=phases,
        terms=terms,
        documented_bound_bytes=documented,
    )


def _largest_block(shape: ModelShape, laid: Layout, recipe: Recipe, choice: Choice) -> int:
    """The largest single tensor of a step: a reduce bucket, an fp32 gradient or a gathered weight, logits, scores."""
    zero, micro_batch = choice.zero, choice.batch.train_micro_batch_size_per_gpu
    tokens, b = micro_batch * recipe.max_length, recipe.weight_bytes
    return max(
        b * zero.reduce_bucket_size if zero.stage and zero.contiguous_gradients else 0,
        FP32 * laid.largest_trainable,
        b * laid.largest if zero.stage == 3 else 0,
        FP32 * tokens * shape.vocab_size if recipe.loss == "full" else b * min(tokens, TOKEN_TILE) * VOCAB_TILE,
        FP32 * tokens * recipe.max_length * shape.num_attention_heads if recipe.attention == "eager" else 0,
        b * tokens * (shape.intermediate_size or 0),
    )


def _verdict(used: ByteRange, free_bytes: int) -> tuple[Verdict, int]:
    """fits: `high` fits; tight: only `expected` does, or something is not modelled (limits.py)."""
    if used.high <= free_bytes:
        return "fits", 0
    short = used.high - free_bytes
    return ("tight" if used.expected <= free_bytes else "does_not_fit"), short


def _notes(choice: Choice, on_cpu: bool) -> tuple[str, ...]:
    zero = choice.zero
    notes = []
    if zero.offload_param.device != "none" and zero.stage != 3:
        notes.append(f"offload_param has no effect at stage {zero.stage}")
    if zero.offload_optimizer.device != "none" and zero.stage == 0:
        notes.append("offload_optimizer has no effect at stage 0")
    if zero.stage in (1, 2):
        notes.append("allgather_bucket_size has no effect where all_gather_into_tensor exists")
    if on_cpu and zero.overlap_comm:
        notes.append("overlap_comm overlaps nothing on CPU ranks: the accelerator is synchronous")
    return tuple(notes)
