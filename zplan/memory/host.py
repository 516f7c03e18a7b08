"""Host memory of one node by phase: processes, loading, offloaded states, pinned buffers, saving; NVMe bytes.

Legend: L ranks of the node, b bytes of the training dtype, S offloaded trainable elements of one rank, W elements of
the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from zplan.hardware import Cluster
from zplan.memory.exchange import Exchange
from zplan.memory.flatten import on_host_bytes
from zplan.memory.host_limits import host_limits, verdict_of
from zplan.memory.host_nvme import LOCKED, STEADY, STEPS, host_term, optimizer_on_nvme, parameters_on_nvme
from zplan.memory.instances import instances
from zplan.memory.muon import ADAM_STATES
from zplan.memory.outside import ranks_of_node
from zplan.memory.shards import second_copies_bytes, secondary_group
from zplan.memory.stage12 import partition
from zplan.memory.states import offloaded_state_bytes
from zplan.memory.sub_groups import left_on_gpu, sub_groups
from zplan.memory.super_offload import shared_memory_bytes, super_offload_terms
from zplan.memory.terms import PHASES, HostEstimate, NvmeEstimate, Phase, Term
from zplan.memory.trainable import Layout
from zplan.recipe import Recipe
from zplan.units import MIB
from zplan.values import dataclass
from zplan.zero_config import Choice

FP32 = 4
PROCESS_CUDA = 1800 * MIB
"""RSS of a rank that has imported torch, transformers, trl, deepspeed and started CUDA: 1.5 to 2.2 GB, about 1 GB of
it the CUDA libraries."""
PROCESS_CPU = 700 * MIB
"""RSS of a rank with the same imports on a CPU build of torch."""
ZERO_GRADIENTS = "offloaded gradients of zeros at initialize"
UPDATED: tuple[Phase, ...] = ("init", "forward", "backward", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBytes:
    """Terms of one node, and how many of the bytes are pinned."""

    terms: tuple[Term, ...]
    pinned_bytes: int
    nvme_bytes: int


def estimate_host(
    layout: Layout,
    recipe: Recipe,
    choice: Choice,
    cluster: Cluster,
    *,
    partition_numel: int,
    rank_bytes: int,
    touched_numel: int = 0,
) -> tuple[HostEstimate, NvmeEstimate]:
    """Resident and pinned bytes of one node.

    Args:
        partition_numel: trainable elements of one rank (S), padding included.
        rank_bytes: tensor bytes of one rank that live in host memory anyway (CPU ranks, offloaded ones included), 0 on
            GPUs.
        touched_numel: elements of the parameters that touch the partitions of the node's ranks, summed over the ranks.
    """
    found = host_bytes(
        layout, recipe, choice, cluster, partition_numel=partition_numel, rank_bytes=rank_bytes,
        touched_numel=touched_numel,
    )  # fmt: skip
    phases = {phase: sum(term.bytes for term in found.terms if phase in term.phases) for phase in PHASES}
    resident = max(phases.values())
    ranks = ranks_of_node(choice, cluster)
    locked = sum(term.bytes for term in found.terms if term.name in LOCKED) // ranks
    there = offloaded_numel(layout, choice, partition_numel)
    limits = host_limits(
        cluster, ranks=ranks, resident_bytes=resident, locked_bytes_of_a_rank=locked,
        shared_bytes=shared_memory_bytes(choice.zero, ranks=ranks, there=there),
    )  # fmt: skip
    verdict, short = verdict_of(limits)
    host = HostEstimate(
        resident_bytes=resident, pinned_bytes=found.pinned_bytes, phases=phases, terms=found.terms, verdict=verdict,
        short_bytes=short, limits=limits,
    )  # fmt: skip
    free = cluster.host.nvme_free_bytes
    lacks = found.nvme_bytes > 0 and (free is None or free < found.nvme_bytes)
    return host, NvmeEstimate(bytes=found.nvme_bytes, verdict="does_not_fit" if lacks else "fits", free_bytes=free)


def offloaded_numel(layout: Layout, choice: Choice, partition_numel: int) -> int:
    """S less what a ratio leaves on the GPU."""
    return partition_numel - sum(left_on_gpu(instances(layout), choice.zero, choice.batch.zero_ranks))


def host_bytes(
    layout: Layout,
    recipe: Recipe,
    choice: Choice,
    cluster: Cluster,
    *,
    partition_numel: int,
    rank_bytes: int,
    touched_numel: int = 0,
) -> HostBytes:
    """All terms of the node."""
    ranks, zero, b = ranks_of_node(choice, cluster), choice.zero, recipe.weight_bytes
    on_cpu = cluster.gpu.kind == "cpu"
    terms = [_processes(ranks, on_cpu)]
    pinned = nvme = 0
    if rank_bytes:
        terms.append(
            host_term("tensors of all ranks", ranks * rank_bytes, STEADY, f"{ranks} ranks x {rank_bytes}", "CPU ranks")
        )
    terms.append(_loading(layout, recipe, choice, ranks))
    if zero.offloads_optimizer and not rank_bytes:
        states, pins, disk = _optimizer(layout, recipe, choice, ranks, partition_numel, on_cpu)
        terms.extend(states)
        in_fp32 = Exchange.of(recipe).accumulated == "fp32"  # in buffers of the GPU (stage12_fp32.py)
        if zero.stage == 2 and choice.batch.gradient_accumulation_steps > 1 and not in_fp32:
            terms.append(_accumulation(b, touched_numel))
            pins += terms[-1].bytes if zero.offload_optimizer.pin_memory else 0
        pinned, nvme = pinned + pins, nvme + disk
    if zero.offloads_param and not rank_bytes:
        made = sum(term.bytes for term in terms if term.name not in ("processes", *LOCKED) and "init" in term.phases)
        states, pins, disk = _parameters(layout, recipe, choice, ranks, partition_numel, made)
        terms.extend(states)
        pinned, nvme = pinned + pins, nvme + disk
    if not rank_bytes:
        terms.append(_on_their_way(terms, ranks * on_host_bytes(layout, recipe, choice, cluster)))
    terms.append(_saving(layout, recipe, choice, ranks, partition_numel, on_cpu))
    return HostBytes(
        terms=tuple(term for term in terms if term.bytes), pinned_bytes=0 if on_cpu else pinned, nvme_bytes=nvme
    )


def _processes(ranks: int, on_cpu: bool) -> Term:
    each = PROCESS_CPU if on_cpu else PROCESS_CUDA
    return host_term(
        "processes",
        ranks * each,
        PHASES,
        f"{ranks} ranks x {each} (Python, libraries, CUDA)",
        "model constant, host.py",
    )


def _loading(layout: Layout, recipe: Recipe, choice: Choice, ranks: int) -> Term:
    """Every rank holds its own copy until the engine moves it to the GPU, before it makes anything of its own; under
    ZeRO-3's zero.Init only one shard of the file.

    Source: transformers 5.23.0, modeling_utils.py (from_pretrained on the CPU; _load_state_dict_into_zero3_model);
    deepspeed 0.19.8, runtime/engine.py (_configure_distributed_model, then _configure_optimizer).
    """
    whole = layout.stored_bytes
    if choice.zero.stage == 3:
        shard = min(whole, 5 * 10**9)
        return host_term(
            "loading", ranks * shard, ("load",), f"{ranks} ranks x one checkpoint shard", "transformers 5.23.0"
        )
    return host_term("loading", ranks * whole, ("load",), f"{ranks} ranks x {whole}", "transformers 5.23.0")


def _on_their_way(terms: Sequence[Term], most: int) -> Term:
    """Weights that the engine moves to the GPU or flattens here, as far as they are more than what it makes later."""
    made = sum(term.bytes for term in terms if term.name != "processes" and "init" in term.phases)
    source = "deepspeed 0.19.8, runtime/engine.py, runtime/zero/stage_1_and_2.py"
    return host_term(
        "weights on their way to the GPU", max(0, most - made), ("init",), f"max(0, {most} - {made} made later)", source
    )


def _optimizer(
    layout: Layout, recipe: Recipe, choice: Choice, ranks: int, numel: int, on_cpu: bool
) -> tuple[list[Term], int, int]:
    """Offloaded master weights, gradients and states of all ranks of the node.

        stages 1, 2:  ranks * (4 S + 4 S + b S + b largest), and 8 S from the first step
        stage 3:      ranks * (4 S + 4 S + b S), and 8 S from the first step; less 16 for every element that a ratio
                      leaves on the GPU; the last term in the accumulation dtype

    Source: deepspeed 0.19.8, stage_1_and_2.py:463 (cpu_offload buffers), stage3.py (_create_fp32_partitions).
    """
    zero, b = choice.zero, recipe.weight_bytes
    there = offloaded_numel(layout, choice, numel)
    states = _muon_states(layout, choice, there, b) if layout.muon else offloaded_state_bytes(recipe.optimizer, there)
    low = (Exchange.of(recipe).accumulated_bytes(b) if zero.stage == 3 else b) * numel
    master, gradients = FP32 * there, FP32 * there
    extra = b * layout.largest_trainable if zero.stage < 3 else 0
    source = "deepspeed 0.19.8, stage_1_and_2.py, stage3.py"
    if zero.offload_optimizer.device == "nvme" and zero.stage == 3:
        return optimizer_on_nvme(layout, recipe, choice, ranks, numel, low, master + states + gradients)
    total = ranks * (master + gradients + low + extra)
    formula = f"{ranks} ranks x (4 S + 4 S + {b} S), S = {numel}" + (f", {there} of it here" if there < numel else "")
    made = f"{recipe.optimizer} on {there} elements, from the first step"
    terms = [
        host_term("offloaded optimizer", total, STEADY, formula, source),
        host_term("offloaded optimizer states", ranks * states, STEPS, made, source),
        _overflow_check(layout, choice, ranks, numel),
    ]
    pins = zero.offload_optimizer.pin_memory and not on_cpu
    if zero.stage < 3:
        source = "deepspeed 0.19.8, pin_memory(torch.zeros())"
        doubled = ranks * FP32 * there if pins else 0
        terms.append(host_term("second copy while pinning", doubled, ("init",), f"{ranks} ranks x 4 S", source))
        return terms, total if pins else 0, 0
    largest = max(sub_groups(instances(layout), choice.batch.zero_ranks, zero.sub_group_size).numel)
    on_gpu = left_on_gpu(instances(layout), zero, choice.batch.zero_ranks)
    terms.append(_zero_gradients(ranks, low, master, FP32 * largest, FP32 * max(on_gpu, default=0), pins=pins))
    more, pinned = super_offload_terms(
        zero, ranks=ranks, there=there, largest_group=largest, process_bytes=PROCESS_CUDA
    )
    return [*terms, *more], pinned + (ranks * (gradients + low) if pins else 0), 0


def _zero_gradients(ranks: int, low: int, master: int, largest: int, on_gpu: int, *, pins: bool) -> Term:
    """What ZeRO-3 holds at initialize beside all that stays: a buffer of zeros of its largest sub-group and, with
    pin_memory, zeros that are about to be pinned, both before the flat gradients are made; or these before they are.
    What partial offload leaves on the GPU comes first, and is made on the host all the same.

        c = 2 if pinned else 1
        max(c * largest - b S, b S if pinned, largest + c * largest of the GPU - 4 S offloaded - b S)

    Args:
        low: b S.
        master: bytes of the offloaded master weights, as many as of their gradients.
        largest: bytes of the largest sub-group's gradients.
        on_gpu: of the largest one that stays on the GPU.

    Source: deepspeed 0.19.8, stage3.py:1300 (initialize_optimizer_states), :791 (grad_partitions_flat_buffer).
    """
    each = 1 + pins
    left = largest + each * on_gpu - master - low if on_gpu else 0
    num_bytes = ranks * max(largest * each - low, low if pins else 0, left)
    formula = f"{ranks} ranks x max({largest} x {each} - {low}, {low if pins else 0}, {left})"
    return host_term(ZERO_GRADIENTS, num_bytes, ("init",), formula, "deepspeed 0.19.8, runtime/zero/stage3.py")


def _overflow_check(layout: Layout, choice: Choice, ranks: int, numel: int) -> Term:
    """ZeRO-3 looks for infinities in the flat buffer of its fp16 gradients where that lies: a byte for each.

    Source: deepspeed 0.19.8, runtime/zero/stage3.py (has_overflow: isinf, isnan).
    """
    num_bytes = ranks * numel if layout.in_fp16 and choice.zero.stage == 3 else 0
    source = "deepspeed 0.19.8, runtime/zero/stage3.py"
    return host_term("offloaded gradients' overflow check", num_bytes, ("step",), f"{ranks} ranks x S", source)


def _muon_states(layout: Layout, choice: Choice, there: int, b: int) -> int:
    """One rank's momentum of Muon's matrices, in fp32 or, at stage 3, in the dtype of the reduction, and AdamW's
    states of the rest.

    Source: deepspeed 0.19.8, stage_1_and_2.py:2059 (_apply_muon_updates_cpu_offload), stage3.py:1066
    (_create_momentum_buffer).
    """
    items, ranks = instances(layout), choice.batch.zero_ranks
    if not items.muon:
        return ADAM_STATES * there
    if choice.zero.stage == 3:
        matrices, momentum = sum(-(-items.numel[number] // ranks) for number in items.muon), b
    else:
        matrices, momentum = partition(items, ranks).sizes[0], FP32
    return momentum * matrices + ADAM_STATES * (there - matrices)


def _accumulation(b: int, touched_numel: int) -> Term:
    """Gradients of earlier micro-steps at stage 2: whole parameters, on every rank whose partition they touch.

        b * elements, summed over the ranks of the node

    Source: deepspeed 0.19.8, stage_1_and_2.py (async_accumulate_grad_in_cpu_via_gpu: torch.zeros(param.numel())).
    """
    formula = f"{b} x {touched_numel} elements of whole parameters, of all ranks"
    source = "deepspeed 0.19.8, stage_1_and_2.py (async_accumulate_grad_in_cpu_via_gpu)"
    return host_term("offloaded gradient accumulation", b * touched_numel, STEPS, formula, source)


def _parameters(
    layout: Layout, recipe: Recipe, choice: Choice, ranks: int, numel: int, made: int
) -> tuple[list[Term], int, int]:
    """Partitions of all parameters on the host, hpZ's second copies of them, or the swap buffers in front of the NVMe.

    Args:
        numel: trainable elements of one rank.
        made: what initialize makes after these.

    Source: deepspeed 0.19.8, partition_parameters.py (_partition_param), swap_tensor/partitioned_param_swapper.py.
    """
    config, world = choice.zero.offload_param, choice.batch.zero_ranks
    shard = ceil(layout.stored_bytes / world)
    source = "deepspeed 0.19.8, partition_parameters.py"
    if config.device == "nvme":
        return parameters_on_nvme(layout, choice, ranks, recipe.weight_bytes)
    total, flat = ranks * shard, ranks * recipe.weight_bytes * numel
    phases = STEADY if recipe.method == "qlora" else ("load", *STEADY)  # which is cut when it is loaded
    copies = second_copies_bytes(instances(layout), world, secondary_group(choice.zero, world))
    of_trained, of_frozen = (ranks * copy for copy in copies)
    formula = f"a second copy cut over {choice.zero.zero_hpz_partition_size} ranks"
    terms = [
        host_term("offloaded parameters", total, phases, f"{ranks} ranks x {shard}", source),
        host_term("secondary partitions (hpZ)", of_frozen, phases, f"{formula}, of frozen parameters", source),
        host_term("secondary partitions (hpZ)", of_trained, ("load", *UPDATED), f"{formula}, of trained", source),
        _flattening(flat, made),
    ]
    return terms, total + of_trained + of_frozen if config.pin_memory else flat, 0


def _flattening(flat: int, made: int) -> Term:
    """Trained parameters while they are made one flat buffer, which is always pinned: zeros that are about to be, the
    buffer, and the parameters. What offloads the optimizer makes comes later.

        max(0, 2 b S - that)

    Source: deepspeed 0.19.8, runtime/zero/stage3.py:888 (_create_param_groups_fp16_flat_cpu_memory), :978
    (_move_to_flat_buffer).
    """
    formula, source = f"max(0, 2 x {flat} - {made})", "deepspeed 0.19.8, runtime/zero/stage3.py"
    return host_term("copies while parameters are flattened", max(0, 2 * flat - made), ("init",), formula, source)


def _saving(layout: Layout, recipe: Recipe, choice: Choice, ranks: int, numel: int, on_cpu: bool) -> Term:
    """Copies in host memory while a checkpoint or the model is written, first the weights, then the states.

        max(weights, states)
        weights   trained elements * b on rank 0: gathered at stage 3 if stage3_gather_16bit_weights_on_model_save,
                  copied off the GPU below it
        states    ranks * 4 S, of the largest sub-group at stage 3: torch.save copies one flat state at a time; at
                  stage 0 rank 0 writes alone

    What is in host memory already (offloaded states, CPU ranks below stage 3) is written from where it is.

    Source: deepspeed 0.19.8, runtime/engine.py (_zero3_consolidated_16bit_state_dict); safetensors 0.8, torch.py
    (_to_ndarray); torch 2.13, serialization.py (_save).
    """
    zero = choice.zero
    gathers = zero.stage3_gather_16bit_weights_on_model_save if zero.stage == 3 else not on_cpu
    weights = recipe.weight_bytes * layout.trainable_numel if gathers else 0
    flat = numel
    if zero.stage == 3:
        flat = max(sub_groups(instances(layout), choice.batch.zero_ranks, zero.sub_group_size).numel)
    writers = ranks if zero.stage else 1
    states = 0 if on_cpu or zero.offloads_optimizer else writers * FP32 * flat
    formula = f"max(weights of rank 0 {weights}, {writers} ranks x 4 x {flat} = {states})"
    return host_term(
        "copies while saving", max(weights, states), ("save",), formula, "deepspeed 0.19.8, runtime/engine.py"
    )
