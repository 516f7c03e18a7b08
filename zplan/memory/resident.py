"""Terms that stay: parameters, masters, optimizer states, permanent buffers; and the peak while they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from zplan.hardware import Cluster
from zplan.memory.bf16_optimizer import accumulated_bytes, takes_bf16_optimizer
from zplan.memory.exchange import Exchange
from zplan.memory.flatten import Flattened, flattened
from zplan.memory.instances import Instances, instances
from zplan.memory.loading import (
    beside_adapters_bytes,
    not_yet_cut_bytes,
    quantising_bytes,
    uncut_adapters_bytes,
    whole_bytes,
)
from zplan.memory.muon import ADAM_STATES, first_updates_bytes, precision
from zplan.memory.runtime import ALLOCATOR_ROUNDING
from zplan.memory.shards import Shards, second_copies_bytes, secondary_group
from zplan.memory.stage12 import Partitions, muon_offload_bytes
from zplan.memory.states import FP32, optimizer_state_bytes, step_temporary_bytes
from zplan.memory.sub_groups import left_on_gpu, muon_bytes, sub_groups
from zplan.memory.terms import Phase, Term
from zplan.memory.trainable import Layout
from zplan.recipe import Recipe
from zplan.values import dataclass
from zplan.zero_config import Choice

PEFT = "peft 0.21.2, tuners/tuners_utils.py (_move_adapter_to_device_of_base_layer)"
BF16_SOURCE = "deepspeed 0.19.8, runtime/bf16_optimizer.py"
AFTER_LOAD: tuple[Phase, ...] = ("init", "forward", "backward", "step", "save")
STEPS: tuple[Phase, ...] = ("forward", "backward", "step", "save")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """What a rank holds between steps, as terms."""

    terms: tuple[Term, ...]
    partition_numel: int
    """Trainable elements whose state this rank holds, padding included."""
    node_touched_numel: int = 0
    """Stages 1 and 2: elements of the parameters that touch the partitions of the node's ranks, summed over ranks."""


def resident(
    laid: Layout, recipe: Recipe, choice: Choice, cluster: Cluster, cut: Partitions | None, shards: Shards | None
) -> Resident:
    """The permanent terms of the configured stage."""
    on_cpu = cluster.gpu.kind == "cpu"
    if shards is not None:
        found = _stage3(laid, recipe, choice, shards, on_cpu=on_cpu)
    elif cut is not None:
        found = _stage12(laid, recipe, choice, cluster, cut)
    else:
        found = _stage0(laid, recipe, on_cpu=on_cpu)
    return replace(found, terms=(*found.terms, _batches(recipe, choice), _norms(laid, choice)))


def _norms(laid: Layout, choice: Choice) -> Term:
    """A scalar on the GPU for every offloaded gradient of ZeRO-3; each takes an allocator's block.

    Source: deepspeed 0.19.8, runtime/zero/stage3.py (norm_for_param_grads).
    """
    offloads = choice.zero.stage == 3 and choice.zero.offloads_optimizer
    count = sum(block.repeat * sum(weight.trainable for weight in block.weights) for block in laid.blocks)
    formula = f"{ALLOCATOR_ROUNDING} x {count} trained parameters"
    num_bytes = ALLOCATOR_ROUNDING * count if offloads else 0
    return _term("gradient norms", num_bytes, STEPS, formula, "deepspeed 0.19.8, runtime/zero/stage3.py")


def _batches(recipe: Recipe, choice: Choice) -> Term:
    """input_ids, labels and attention_mask (int64) of every micro-batch: fetched together, alive for the whole step.
    Where ranks share sequences there are positions beside them.

        3 * 8 * micro-batch * length * accumulation      (4 * 8, of a rank's part)

    Source: transformers 5.23.0, trainer.py (get_batch_samples).
    """
    batch = choice.batch
    length = recipe.max_length // batch.sequence_parallel_size
    tokens = batch.train_micro_batch_size_per_gpu * batch.gradient_accumulation_steps * length
    count = 3 if batch.sequence_parallel_size == 1 else 4
    formula = f"{count} x 8 x {tokens} tokens of all micro-batches"
    return _term(
        "batches", 8 * count * tokens, ("forward", "backward", "step"), formula, "transformers 5.23.0, trainer.py"
    )


def _term(name: str, num_bytes: int, phases: tuple[Phase, ...], formula: str, source: str) -> Term:
    return Term(name=name, bytes=num_bytes, phases=phases, formula=formula, source=source)


def _stage0(laid: Layout, recipe: Recipe, *, on_cpu: bool) -> Resident:
    """Everything on every rank: b per parameter, and 4 + states per trainable one (no master in fp32)."""
    numel = laid.trainable_numel
    source = "deepspeed 0.19.8, runtime/fp16/unfused_optimizer.py:72"
    shapes = instances(laid).muon.values()
    of_muon = sum(map(prod, shapes))
    states = optimizer_state_bytes(recipe.optimizer, numel)
    if laid.muon:
        states = FP32 * of_muon + ADAM_STATES * (numel - of_muon)
    terms = [
        _term("parameters", laid.stored_bytes, ("load", *AFTER_LOAD), f"{laid.stored_bytes} bytes, replicated", source),
    ]
    if recipe.weight_bytes == FP32:
        terms.append(_term("optimizer states", states, STEPS, f"{numel} elements, from the first step", source))
    else:
        terms.append(_term("optimizer states", states, AFTER_LOAD, f"{numel} elements", source))
        terms.append(_term("master weights", FP32 * numel, AFTER_LOAD, f"4 x {numel}", source))
        terms.append(
            _term(
                "zero gradients at initialize",
                (FP32 + recipe.weight_bytes) * numel,
                ("init",),
                f"(4 + {recipe.weight_bytes}) x {numel}",
                source,
            )
        )
        updating = first_updates_bytes(shapes, numel - of_muon, precision(FP32, on_cpu=on_cpu))
        terms.append(_term("Muon's update at initialize", updating, ("init",), "on gradients of zeros", source))
    return Resident(terms=tuple(terms), partition_numel=numel)


def _stage12(laid: Layout, recipe: Recipe, choice: Choice, cluster: Cluster, cut: Partitions) -> Resident:
    """b PAD + frozen + 4 S + states(S); with optimizer offload b PAD + frozen + b largest parameter.

    Source: deepspeed 0.19.8, stage_1_and_2.py (__init__: flatten, clone().float(), temp_grad_buffer_for_gpu_offload).
    """
    b, numel, padded = recipe.weight_bytes, sum(cut.sizes), sum(cut.padded)
    source = "deepspeed 0.19.8, runtime/zero/stage_1_and_2.py"
    flat = b * padded + laid.frozen_bytes
    terms = [
        _term("parameters", laid.stored_bytes, ("load",), f"{laid.stored_bytes} bytes, replicated", source),
        _term("parameters", flat, AFTER_LOAD, f"{b} x {padded} flat + {laid.frozen_bytes} frozen", source),
    ]
    states = optimizer_state_bytes(recipe.optimizer, numel, num_tensors=len(cut.sizes))
    if laid.muon:
        states = _muon_states_of_stage12(instances(laid), cut, b)
    after = [_term("offload staging", b * cut.largest_numel, AFTER_LOAD, f"{b} x {cut.largest_numel}", source)]
    if not choice.zero.offloads_optimizer:
        after = [
            _term("master weights", FP32 * numel, AFTER_LOAD, f"4 x {numel}", source),
            _term(
                "optimizer states",
                states,
                STEPS,
                f"{recipe.optimizer} on {numel} elements, from the first step",
                source,
            ),
        ]
    elif laid.muon:
        ranks = choice.batch.zero_ranks
        after.append(_kept_by_muon(muon_offload_bytes(instances(laid), ranks, cut.rank, dealt=cut.dealt)[0]))
    if takes_bf16_optimizer(choice.zero, Exchange.of(recipe), b):
        whole = _term("fp32 gradients", accumulated_bytes(cut), AFTER_LOAD, f"4 x {padded}, on every rank", BF16_SOURCE)
        return Resident(terms=(*terms, *after, whole), partition_numel=numel)
    made = sum(term.bytes for term in after if "init" in term.phases)
    groups = flattened(laid, recipe, choice, cluster, cut)
    return Resident(terms=(*terms, *after, _flattening(groups, made)), partition_numel=numel)


def _flattening(groups: Sequence[Flattened], made: int) -> Term:
    """What comes and goes beside all masters: the gradients of zeros at the end, or earlier a group that is flattened
    while its old copy lives, beside the masters of the groups before it.

        max(4 S, max over groups of   b PAD_g + 4 (S_1 + ... + S_g-1) - made)

    A GPU without room for b PAD_g gets the flat copy from its host, and holds b S_g while the group's masters are made.

    Args:
        made: bytes that are there in the end.

    Source: deepspeed 0.19.8, stage_1_and_2.py (__init__: flatten_dense_tensors_aligned, initialize_optimizer_states).
    """
    zeros, flattening = groups[-1].masters, max(group.beside for group in groups) - made
    source = "deepspeed 0.19.8, runtime/zero/stage_1_and_2.py"
    if flattening <= zeros:
        return _term("zero gradients at initialize", max(zeros, 0), ("init",), f"{zeros} of masters", source)
    where = "on the host" if any(group.on_host for group in groups) else "while the old copy lives"
    formula = f"a group of {max(group.padded for group in groups)} flattened {where}, less later masters"
    return _term("flattening", flattening, ("init",), formula, source)


def _muon_states_of_stage12(items: Instances, cut: Partitions, b: int) -> int:
    """Momentum of the whole matrices that touch the partition, in the gradients' dtype, and the copy in which a step
    writes it before it is known to count; AdamW's states of the other group's partition.

        2 b * touched + 8 S

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:2805 (_muon_momentum_buffer), :2989
    (_muon_staging_momentum).
    """
    touched = sum(items.numel[number] for number in items.muon if number in cut.mine)
    return 2 * b * touched + ADAM_STATES * sum(cut.sizes[1 if items.muon else 0 :])


def _initialising(
    laid: Layout, recipe: Recipe, choice: Choice, shards: Shards, bucket: int, largest_group: int
) -> list[Term]:
    """What comes and goes while the optimizer is built, beside parameters and masters.

        max(4 * largest sub-group, gradients + bucket + largest parameter, weights before they are cut)

    Each trained parameter is gathered once. While the model is loaded a module at a time is whole on every GPU:
    zero.Init cuts it when it was made, and gathers it again for its weights. PEFT puts whole adapters beside the base
    weights; the engine cuts them. A quantised model is whole on every GPU until then (loading.py).
    """
    b, zero, numel = recipe.weight_bytes, choice.zero, shards.trainable_numel
    accumulated = Exchange.of(recipe).accumulated_bytes(b)
    staged = -(-laid.largest_trainable // choice.batch.zero_ranks) if zero.offloads_param else 0
    buffers = bucket + b * (laid.largest_trainable + staged)
    if not zero.offloads_optimizer:
        buffers = max(FP32 * largest_group, accumulated * numel + buffers)
    ranks, offloads = choice.batch.zero_ranks, zero.offloads_param
    uncut, most = uncut_adapters_bytes(laid, recipe, numel, offloads_param=offloads), 0
    adapting = uncut + beside_adapters_bytes(laid, recipe)
    copies = 1 if offloads else secondary_group(zero, ranks)
    whole = whole_bytes(laid, b, ranks, offloads_param=offloads, secondary_ranks=copies)
    if recipe.method == "lora" and not offloads:
        whole -= b * numel  # of adapters, which come later
    if recipe.method == "qlora":
        whole, most = not_yet_cut_bytes(instances(laid), shards, offloads_param=offloads)
        whole += quantising_bytes(laid, b)
    masters = 0 if zero.offloads_optimizer else FP32 * numel
    formula = "max(4 x largest sub-group, gradients + bucket + largest parameter, weights not yet cut)"
    source = "deepspeed 0.19.8, runtime/zero/stage3.py (_setup_for_real_optimizer)"
    return [
        _term("buffers at initialize", max(buffers, uncut - masters, most - masters), ("init",), formula, source),
        _term("weights before they are cut", max(adapting, whole), ("load",), "less what is left of them", PEFT),
    ]


def _secondary(laid: Layout, recipe: Recipe, choice: Choice, *, on_cpu: bool) -> list[Term]:
    """hpZ's second copy: of frozen parameters for good, of trained ones from their release (Stage3Engine) to the end of
    the update, and from loading to the first update; a quantised model is cut when it is loaded. With offload_param a
    GPU's lies in host memory (host.py).
    """
    ranks = choice.batch.zero_ranks
    group = 1 if choice.zero.offloads_param and not on_cpu else secondary_group(choice.zero, ranks)
    trained, frozen = second_copies_bytes(instances(laid), ranks, group)
    name, formula = "secondary partitions (hpZ)", f"a second copy cut over {group} ranks"
    source = "deepspeed 0.19.8, runtime/zero/partition_parameters.py (ds_secondary_tensor)"
    loading: tuple[Phase, ...] = () if recipe.method == "qlora" else ("load",)
    return [
        _term(name, frozen, (*loading, *AFTER_LOAD), f"{formula}, of frozen parameters", source),
        _term(name, trained, (*loading, "init", "step"), f"{formula}, of trained parameters", source),
    ]


def _left_on_gpu(laid: Layout, choice: Choice) -> list[Term]:
    """Partial offload (ratio): fp32 masters, gradients and Adam's states of the first sub-groups; their update, by
    torch's AdamW, takes two temporaries of the largest.

        (4 + 4) n, from the first step on 8 n more, in the step 8 * largest sub-group

    Source: deepspeed 0.19.8, stage3.py:1160 (_create_fp32_partitions), :1342 (initialize_optimizer_states), :1257
    (_optimizer_step: backup_optimizer); torch 2.13.0, optim/adamw.py (_multi_tensor_adamw).
    """
    groups = left_on_gpu(instances(laid), choice.zero, choice.batch.zero_ranks)
    numel, source = sum(groups), "deepspeed 0.19.8, runtime/zero/stage3.py (subgroup_to_device)"
    of_ratio = f"of {numel} elements, offload_optimizer.ratio {choice.zero.offload_optimizer.ratio}"
    states = 2 * FP32 * numel + FP32 * len(groups)
    return [
        _term("master weights", FP32 * numel, AFTER_LOAD, f"4 bytes {of_ratio}", source),
        _term("fp32 gradients", FP32 * numel, AFTER_LOAD, f"4 bytes {of_ratio}", source),
        _term("optimizer states", states, STEPS, f"8 bytes {of_ratio}", source),
        _term("optimizer temporaries", 2 * FP32 * max(groups, default=0), ("step",), "8 x the largest of them", source),
    ]


def _states_of_stage3(laid: Layout, recipe: Recipe, choice: Choice, shards: Shards, num_groups: int) -> list[Term]:
    """States of the partitions, from the first step. Muon: momentum of its own in the dtype of the reduction from the
    start, the buffers of its gathers (muon3.py), and AdamW's states of the others.

    Source: deepspeed 0.19.8, runtime/zero/stage3.py:1066 (_create_momentum_buffer), :2060
    (_partitioned_buffers_all_gather).
    """
    items, b, numel = instances(laid), recipe.weight_bytes, shards.trainable_numel
    source = "deepspeed 0.19.8, runtime/zero/stage3.py"
    made = f"{recipe.optimizer} on {numel} elements, from the first step"
    if not laid.muon:
        states = optimizer_state_bytes(recipe.optimizer, numel, num_tensors=num_groups)
        return [_term("optimizer states", states, STEPS, made, source)]
    matrices = sum(shards.partition[number] for number in items.muon)
    return [
        _term("optimizer states", ADAM_STATES * (numel - matrices), STEPS, f"{made}, {matrices} aside", source),
        _term("Muon's momentum", b * matrices, AFTER_LOAD, f"{b} x {matrices}", source),
    ]


def _scales(laid: Layout) -> list[Term]:
    """QLoRA under ZeRO-3, which takes apart the packed weights and knows nothing of their scales.

    Source: bitsandbytes 0.50.2, nn/modules.py (Params4bit.quant_state).
    """
    scales = sum(block.repeat * sum(weight.states_bytes for weight in block.weights) for block in laid.blocks)
    source = "bitsandbytes 0.50.2, nn/modules.py"
    return [_term("scales of quantised weights", scales, ("load", *AFTER_LOAD), "whole on every rank", source)]


def _kept_by_muon(kept: int) -> Term:
    """Source: deepspeed 0.19.8, stage3.py:2060 (_partitioned_buffers_all_gather), stage_1_and_2.py:1956
    (_muon_all_gather_partitions)."""
    source = "deepspeed 0.19.8, runtime/zero/stage3.py, stage_1_and_2.py"
    return _term("Muon's gather buffers", kept, STEPS, "kept from step to step, 256 MiB at most", source)


def _stage3(laid: Layout, recipe: Recipe, choice: Choice, shards: Shards, *, on_cpu: bool) -> Resident:
    """b P + 4 P + states(P) + b P gradients + the bucket + persistent parameters, less what is offloaded.

    Source: deepspeed 0.19.8, stage3.py (_create_fp16_partitions, _create_fp32_partitions, grad_partitions_flat_buffer,
    setup_ipg), parameter_offload.py (mark_persistent_parameters).
    """
    b, numel, zero = recipe.weight_bytes, shards.trainable_numel, choice.zero
    exchange = Exchange.of(recipe).for_batch(choice.batch, b)
    accumulated = exchange.accumulated_bytes(b)
    groups = sub_groups(instances(laid), choice.batch.zero_ranks, zero.sub_group_size).numel
    source = "deepspeed 0.19.8, runtime/zero/stage3.py"
    terms = []
    if not zero.offloads_param:
        terms.append(
            _term(
                "parameters", shards.stored_bytes, ("load", *AFTER_LOAD), f"{shards.stored_bytes} partitioned", source
            )
        )
    if not zero.offloads_optimizer:
        terms += _states_of_stage3(laid, recipe, choice, shards, len(groups))
        terms += [
            _term("master weights", FP32 * numel, AFTER_LOAD, f"4 x {numel}", source),
            _term("gradient partitions", accumulated * numel, STEPS, f"{accumulated} x {numel}", source),
        ]
    terms += _scales(laid)
    reduced = exchange.communicated_bytes(b)
    bucket = reduced * zero.reduce_bucket_size if zero.contiguous_gradients else 0
    terms += _initialising(laid, recipe, choice, shards, bucket, max(groups))
    if bucket:
        terms.append(_term("reduce bucket", bucket, STEPS, f"{reduced} x {zero.reduce_bucket_size}", source))
    terms += _secondary(laid, recipe, choice, on_cpu=on_cpu)
    terms += _left_on_gpu(laid, choice)
    kept = "gathered for good, but for the update itself (Stage3Engine.end_step)"
    terms.append(_term("persistent parameters", shards.persistent_bytes, ("forward", "backward", "save"), kept, source))
    if laid.muon:
        of = precision(b, in_fp16=laid.in_fp16)
        terms.append(_kept_by_muon(muon_bytes(instances(laid), zero, choice.batch.zero_ranks, of)[0]))
    optimizer = 0 if zero.offloads_optimizer else step_temporary_bytes(recipe.optimizer, max(groups))
    terms.append(_term("optimizer temporaries", optimizer, ("step",), "largest sub-group", source))
    return Resident(terms=tuple(terms), partition_numel=numel)
