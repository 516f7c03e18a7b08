"""What the memory model does not model, said out loud: such an estimate is never called `fits`."""

from __future__ import annotations

from zplan.autotp import cannot_cut
from zplan.combinations import offload_refused
from zplan.memory.attention import attention_widths
from zplan.memory.families import leaf_refused, refused, unknown_layers
from zplan.memory.quantized import num_groups
from zplan.memory.trainable import layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import Choice

CHECKED_OPTIMIZERS = frozenset({"adamw", "sgd", "muon"})
"""Muon where `_of_muon` says nothing."""


def not_modelled(shape: ModelShape, recipe: Recipe, choice: Choice, *, on_cpu: bool) -> tuple[str, ...]:
    """Options whose bytes are missing or known to be wrong; each one line, `not modelled: ...`."""
    found = [
        *_of_model(shape, recipe),
        *_of_recipe(recipe, on_cpu),
        *([] if on_cpu else _of_heads(shape, recipe)),
        *_of_gradient_types(recipe, choice),
        *_of_zero(choice),
        *_of_granularity(recipe, choice),
    ]
    found += _of_quantizer(shape, recipe, choice)
    stopped = leaf_refused(shape, recipe, choice)
    found += [f"{stopped}; try --gradient-checkpointing"] if stopped else []
    uncut = cannot_cut(shape, recipe, choice.batch.autotp_size, stage=choice.zero.stage)
    found += [uncut] if uncut else []
    unoffloaded = offload_refused(choice.zero, recipe.optimizer, on_cpu=on_cpu)
    found += [unoffloaded] if unoffloaded else []
    found += _of_muon(choice) if recipe.optimizer == "muon" else []
    return tuple(f"not modelled: {line}" for line in found)


def _of_model(shape: ModelShape, recipe: Recipe) -> list[str]:
    lines = list(refused(shape, recipe))
    unknown = unknown_layers(shape)
    lines += [unknown] if unknown else []
    if shape.model_type == "mpt" or shape.config.get("alibi"):
        lines.append("ALiBi's scores")
    if recipe.use_dora and recipe.method == "qlora":
        lines.append("DoRA on quantised weights, which are dequantised for the norm (peft, lora/dora.py)")
    if recipe.use_dora and shape.model_type == "gpt2":
        lines.append("DoRA on GPT-2's transposed matrices: products with the whole weight (peft, lora/dora.py)")
    return lines


def _of_heads(shape: ModelShape, recipe: Recipe) -> list[str]:
    """Flash attention takes heads of a multiple of 8 elements; others are copied to larger ones before it. The heads of
    latent attention are as wide as their two parts, whatever the hidden size (GLM 4.7 Flash).

    Source: torch 2.13.0, aten/native/transformers/attention.cpp (pad_last_dim<8>).
    """
    heads, width, _, _ = attention_widths(shape)
    head_dim = width // heads
    if head_dim % 8 == 0 or recipe.attention == "eager" or recipe.dtype == "fp32":
        return []
    return [
        f"{recipe.attention} attention with heads of {head_dim} elements, no multiple of 8: which kernel runs,"
        " and the padded copies of q, k and v that flash attention keeps"
    ]


def _of_recipe(recipe: Recipe, on_cpu: bool) -> list[str]:
    lines = []
    if recipe.load_in_8bit:
        lines.append("8-bit copies of the inputs that LLM.int8() keeps for backward, and its outlier columns")
    elif recipe.method == "qlora" and on_cpu:
        lines.append("4-bit weights on CPU ranks: bitsandbytes multiplies there in other ways than on GPUs")
    if recipe.method == "qlora" and recipe.dtype == "fp32":
        lines.append(
            "adapters in bf16 beside fp32, as TRL casts those of a quantised model (trl 1.16.0, sft_trainer.py:908):"
            " they are counted in fp32, and the copies of their inputs are missing; try --dtype bf16"
        )
    return lines


def _of_gradient_types(recipe: Recipe, choice: Choice) -> list[str]:
    accumulated, stage = recipe.grad_accum_dtype or recipe.dtype, choice.zero.stage
    communicated = recipe.communication_data_type or recipe.dtype
    lines = []
    if accumulated != recipe.dtype and stage == 0:
        lines.append(f"gradients of {recipe.dtype} accumulated in {accumulated} at stage 0: DeepSpeed refuses them")
    elif accumulated not in (recipe.dtype, "fp32") and stage < 3:
        lines.append(
            f"gradients of {recipe.dtype} accumulated in {accumulated} at stage {stage}: each beside the other, and"
            " what takes them for its own dtype (stage_1_and_2.py, get_all_grad_tensors)"
        )
    if recipe.optimizer == "muon" and (accumulated, communicated) != (recipe.dtype, recipe.dtype):
        lines.append("Muon's gathers of gradients that are accumulated or reduced in another dtype")
    return lines


def _of_muon(choice: Choice) -> list[str]:
    zero, lines = choice.zero, []
    if zero.stage == 3 and zero.offload_optimizer.device == "nvme":
        lines.append("Muon with NVMe: how its update swaps momentum and gradients (stage3.py, _writeback_swap_state)")
    if zero.stage == 3 and choice.batch.sequence_parallel_size > 1:
        lines.append("Muon at stage 3 with shared sequences: momentum and gathers in fp32 (_create_momentum_buffer)")
    return lines


def _of_zero(choice: Choice) -> list[str]:
    zero = choice.zero
    if zero.stage != 3:
        return []
    lines = []
    if zero.offload_optimizer.device == "nvme" and zero.offload_optimizer.ratio < 1:
        lines.append(
            f"offload_optimizer.ratio {zero.offload_optimizer.ratio} with NVMe: which states of the first sub-groups "
            "stay on the GPU (stage3.py, subgroup_to_device)"
        )
    if zero.zero_hpz_partition_size > 1 and zero.offload_param.device == "nvme":
        lines.append(
            "zero_hpz_partition_size with offload_param on NVMe: DeepSpeed makes hpZ's copies on a device 'nvme', which"
            " torch refuses (partition_parameters.py:1917)"
        )
    if zero.zero_quantized_gradients and choice.batch.sequence_parallel_size > 1:
        lines.append("zero_quantized_gradients of shared sequences, which are cast to fp32 before (stage3.py:1920)")
    return lines


def _of_granularity(recipe: Recipe, choice: Choice) -> list[str]:
    """Leaf modules are gathered whole and prefetched otherwise; a released one leaves every parameter a tensor of one
    element, which a kept graph takes for an adapter's weight when its gradient is added.

    Source: deepspeed 0.19.8, runtime/zero/parameter_offload.py:611 (_set_z3_leaf_modules_by_threshold),
    partitioned_param_coordinator.py (release_sub_module: empty_buffer).
    """
    threshold = choice.zero.stage3_module_granularity_threshold
    if choice.zero.stage != 3 or threshold <= 0:
        return []
    line = f"the leaf modules that stage3_module_granularity_threshold {threshold} makes, gathered whole"
    if recipe.method != "full" and not choice.gradient_checkpointing:
        line += "; with adapters and without gradient checkpointing DeepSpeed fails in backward"
    return [f"{line}; try --set stage3_module_granularity_threshold=0"]


def _of_quantizer(shape: ModelShape, recipe: Recipe, choice: Choice) -> list[str]:
    """A module that qwZ cannot gather: it is asked for alone in the first step, which has no trace.

    Source: deepspeed 0.19.8, runtime/zero/partition_parameters.py (CUDAQuantizer.quantize).
    """
    ranks = choice.batch.zero_ranks
    if choice.zero.stage != 3 or not choice.zero.zero_quantized_weights or ranks == 1:
        return []
    for block in layout(shape, recipe).blocks:
        parts: dict[str, int] = {}
        for weight in block.weights:
            parts[weight.module] = parts.get(weight.module, 0) - -weight.numel // ranks
        for module, numel in parts.items():
            if num_groups(numel) is None:
                return [
                    f"zero_quantized_weights over {ranks} ranks: {numel} elements a rank of {module} are no multiple"
                    " of 8, and DeepSpeed refuses them (CUDAQuantizer.quantize)"
                ]
    return []


def unchecked(recipe: Recipe) -> tuple[str, ...]:
    """Terms written from the libraries' source that no simulation has confirmed; each one line, `unchecked: ...`."""
    lines = []
    if recipe.optimizer not in CHECKED_OPTIMIZERS:
        lines.append(f"states and temporaries of {recipe.optimizer}")
    if recipe.load_in_8bit:
        lines.append("8-bit weights and their dequantisation")
    if recipe.neftune_noise_alpha is not None:
        lines.append("NEFTune's noise, one tensor as large as the embedded batch")
    if recipe.loss == "liger":
        lines.append("Liger's fused loss")
    return tuple(f"unchecked: {line} (from the source, not simulated)" for line in lines)
