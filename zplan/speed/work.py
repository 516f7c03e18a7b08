"""What one token costs: multiplications per token and elements moved, counted once per model and recipe."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from zplan.adapted_modules import adapter_shapes
from zplan.model_shape import ModelShape, ParameterShape
from zplan.recipe import Recipe
from zplan.saved_modules import copied_blocks, is_saved
from zplan.values import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Elements of a model by what a training step does with them."""

    layer_numel: int
    """Weights of the layers that multiply a token (of the experts only those a token visits)."""
    head_numel: int
    """The output head, tied or not."""
    adapter_numel: int
    """LoRA weights that multiply every token, and always train."""
    folded_numel: int
    """Of the stacked experts that a token visits, those that an adapter is folded into: their gradient is made whole.

    Limits: folding, which costs the same for any number of tokens, is not counted."""
    trainable_numel: int
    total_numel: int
    """Everything that is stored, frozen or not."""
    attention_flops_per_sequence: int
    """Forward FLOPs of scores and values of one sequence, all layers."""


_KNOWN: dict[tuple[Any, ...], tuple[ModelShape, Work]] = {}
_MOST_KNOWN = 64


def work_of(shape: ModelShape, recipe: Recipe) -> Work:
    """The work of `recipe` on `shape`; kept, because a search asks for the same one again and again."""
    key = (
        id(shape), recipe.method, recipe.lora_r, recipe.lora_target, recipe.modules_to_save, recipe.max_length,
        recipe.attention,
    )  # fmt: skip
    known = _KNOWN.get(key)
    if known is not None and known[0] is shape:
        return known[1]
    if len(_KNOWN) >= _MOST_KNOWN:
        _KNOWN.clear()
    work = _count(shape, recipe)
    _KNOWN[key] = (shape, work)
    return work


def part_of(work: Work, autotp_size: int) -> Work:
    """One rank's part of it under AutoTP; embeddings and norms, which are whole, count as cut."""
    if autotp_size == 1:
        return work
    return Work(**{item.name: getattr(work, item.name) // autotp_size for item in fields(work)})


def _count(shape: ModelShape, recipe: Recipe) -> Work:
    layers = head = adapters = saved = stacked = folded = 0
    for block in copied_blocks(shape, recipe):
        for parameter in block.parameters:
            numel = _active_numel(parameter, shape) * block.repeat
            if block.role in ("layer", "encoder_layer"):
                layers += numel
            elif block.role == "head":
                head += numel
            if is_saved(parameter, recipe):
                saved += parameter.numel * block.repeat if block.role != "original" else 0
                continue
            shapes = adapter_shapes(parameter, block, recipe, shape.model_type)
            if shapes is None:
                continue
            beside = sum(rows * columns for rows, columns in shapes) * block.repeat
            if len(parameter.shape) == 2:
                adapters += beside
            else:
                stacked, folded = stacked + beside, folded + numel
    head = head or shape.vocab_size * shape.hidden_size
    trainable = shape.num_parameters if recipe.method == "full" else adapters + stacked + saved
    return Work(
        layer_numel=layers,
        head_numel=head,
        adapter_numel=adapters,
        folded_numel=folded,
        trainable_numel=trainable,
        total_numel=shape.num_parameters + adapters + stacked,
        attention_flops_per_sequence=attention_flops(shape, recipe.max_length, masked=recipe.attention != "eager"),
    )


def _active_numel(parameter: ParameterShape, shape: ModelShape) -> int:
    """Elements that multiply one token: a router sends it to `num_experts_per_tok` of `num_local_experts`."""
    if parameter.kind in ("norm", "bias", "embedding"):
        return 0
    routed = parameter.kind == "experts" or ".experts." in f".{parameter.name}"
    if routed and shape.num_local_experts:
        return parameter.numel * shape.num_experts_per_tok // shape.num_local_experts
    return parameter.numel


def attention_flops(shape: ModelShape, length: int, *, masked: bool) -> int:
    """Forward FLOPs of Q K^T and P V of one sequence over all layers.

        layers * 4 * length * span * num_attention_heads * head_dim

    `span` is the average number of keys a query meets: length / 2 under a causal mask that the kernel skips, all of
    them for eager attention, w - w^2 / (2 length) in a window of w.

    Args:
        masked: the kernel skips masked blocks (sdpa, flash_attention_2).
    """
    full = 4 * length * shape.num_attention_heads * shape.head_dim
    windowed = num_windowed_layers(shape)
    window = min(shape.sliding_window or length, length)
    causal_span = length / 2 if masked else length
    window_span = window - window * window / (2 * length) if masked else length
    return int(full * ((shape.num_hidden_layers - windowed) * causal_span + windowed * window_span))


def num_windowed_layers(shape: ModelShape) -> int:
    """Layers whose attention is confined to `sliding_window`."""
    if shape.sliding_window is None:
        return 0
    if shape.layer_types:
        return sum(kind == "sliding_attention" for kind in shape.layer_types)
    return shape.num_hidden_layers
