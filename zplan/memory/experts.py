"""A layer's routed experts: router, grouped products on T * k rows, weighting, shared expert.

Legend: T tokens, k experts per token, E experts, h hidden size, b bytes of the training dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zplan.memory import operations as ops
from zplan.memory.layer_modules import LayerModules
from zplan.memory.operations import FP32, Modules, Sizes
from zplan.memory.tape import Tape, Value
from zplan.memory.trainable import EXPERT_ADAPTERS, Weight

LEAF_FAMILIES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
"""Whose MoE block ZeRO-3 gathers at once and hooks as one module.

Source: deepspeed 0.19.8, runtime/zero/leaf_module_config.py (DEFAULT_LEAF_MODULE_CLASSES)."""
LEAF = "mlp"
FP32_ROUTERS = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe"})
"""Routers that see an fp32 copy of the hidden states (transformers 5.23.0, models/*/modeling_*.py)."""
LOW_WEIGHTS = frozenset({"qwen2_moe", "qwen3_moe", "olmoe", "granitemoe"})
"""Families that cast the routing weights to the training dtype; elsewhere the weighted rows are fp32."""

FeedForward = Callable[[Tape, LayerModules, Sizes, Modules, Value, list[str]], Value]


def run_experts(
    tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value, feed_forward: FeedForward
) -> Value:
    """Router, experts, shared expert.

    Limits: routing is taken as balanced over the experts; indices and counts of tokens are left out.
    Source: transformers 5.23.0, integrations/moe.py (grouped_mm_experts_forward), models/deepseek_v2.
    """
    whole = sizes.bytes(layer.shape.hidden_size)
    leaf = layer.shape.model_type in LEAF_FAMILIES
    if leaf:
        tape.enter_leaf(modules.number(LEAF))
    scores = _route(tape, layer, sizes, modules, x)
    summed = _grouped(tape, layer, sizes, modules, x, scores)
    tape.drop(scores)
    shared = [name for name in layer.mlp if "shared" in name]
    if len(shared) >= 3:
        extra = feed_forward(tape, layer, sizes, modules, x, shared[:3])
        total = tape.apply(whole, [(summed, None), (extra, None)])
        tape.drop(summed, extra)
        summed = total
    if leaf:
        tape.exit_leaf(modules.number(LEAF))
    return summed


def _route(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> Value:
    """The router's probabilities, fp32; the best k are gathered out of them, which keeps indices only."""
    gates = [name for name in layer.mlp if name.endswith("gate")]
    stacked = next(weight for weight in layer.laid.weights if len(weight.shape) == 3)
    width, hidden = stacked.shape[0], layer.shape.hidden_size
    fine = sizes.fp32_bytes(width)
    if not gates:
        return tape.apply(fine, [(x, sizes.bytes(hidden))])
    if layer.shape.model_type not in FP32_ROUTERS or sizes.itemsize == FP32:
        logits = ops.linear(tape, modules, sizes, gates[0], x, flat=True)
        return _probabilities(tape, logits, sizes.bytes(width), fine)
    number, owned = modules.number(gates[0]), modules.owner_of(gates[0])
    trains = any(weight.trainable for _, weight in owned)
    tape.enter(number)
    wide = tape.apply(sizes.fp32_bytes(hidden), [(x, sizes.bytes(hidden))])
    logits = tape.apply(
        fine, [(wide, sizes.fp32_bytes(hidden))], saves=(wide,) if trains else (), weights=ops.gradients_of(owned)
    )
    tape.drop(wide)
    out = _probabilities(tape, logits, fine, fine)
    tape.exit(number)
    return out


def _probabilities(tape: Tape, logits: Value, num_bytes: int, fine: int) -> Value:
    out = tape.apply(fine, [(logits, num_bytes)], saves_output=True)
    tape.drop(logits)
    return out


def _grouped(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value, scores: Value) -> Value:
    shape = layer.shape
    picked = max(shape.num_experts_per_tok, 1)
    inner = shape.moe_intermediate_size or shape.intermediate_size
    rows_hidden, rows_inner = sizes.bytes(picked * shape.hidden_size), sizes.bytes(picked * inner)
    owned = [(i, w) for i, w in enumerate(layer.laid.weights) if len(w.shape) == 3]
    around = sorted(wrappers(layer.laid.weights).values(), key=len)
    inside = f"{around[-1]}.base_layer" if around else owned[0][1].module
    entered = [modules.number(name) for name in (*around, inside)]
    for number in entered:
        tape.enter(number)
    first, second = owned[: len(owned) // 2] or owned, owned[len(owned) // 2 :]
    factors = {id(weight): _factors(tape, layer, weight) for _, weight in owned}
    rows = tape.apply(rows_hidden, [(x, sizes.bytes(shape.hidden_size))])
    gate_up = _adapted(tape, sizes, first, factors)
    both = _product(tape, 2 * rows_inner, rows, rows_hidden, gate_up, first)
    gate, up = tape.split(both, 2, 2 * rows_inner)
    act_number = modules.number(f"{inside}.act_fn")
    tape.enter(act_number)
    acted = tape.apply(rows_inner, [(gate, rows_inner)], saves=(gate,))
    tape.exit(act_number)
    product = tape.apply(rows_inner, [(acted, rows_inner), (up, rows_inner)], saves=(acted, up))
    tape.drop(both, gate, up, acted)
    down = _adapted(tape, sizes, second, factors)
    out = _product(tape, rows_hidden, product, rows_inner, down, second)
    tape.drop(product)
    summed = _weigh(tape, layer, sizes, out, scores, picked)
    tape.drop(rows, *gate_up, *down)
    for number in reversed(entered):
        tape.exit(number)
    return summed


def wrappers(weights: Sequence[Weight]) -> dict[str, str]:
    """Name of each stacked weight with an adapter -> the module that wraps it, reads it and so gathers it and its
    adapter; they are nested, the last weight's is the outermost, and the experts' own module gathers nothing.

    Source: peft 0.21.2, tuners/lora/layer.py (ParamWrapper, get_param), tuners/tuners_utils.py
    (_inject_parameters); deepspeed 0.19.8, runtime/zero/parameter_offload.py (ZeROOrderedDict.__getitem__).
    """
    names = {weight.name for weight in weights}
    adapted = [w for w in weights if len(w.shape) == 3 and f"{w.name}.{EXPERT_ADAPTERS[0]}" in names]
    return {w.name: w.module + ".base_layer" * depth for depth, w in enumerate(reversed(adapted))}


def _product(
    tape: Tape, num_bytes: int, rows: Value, row_bytes: int, merged: tuple[Value, ...], owned: list[tuple[int, Weight]]
) -> Value:
    """One grouped product: keeps the rows if the experts or their adapters train."""
    gradients = ops.gradients_of(owned)
    return tape.apply(
        num_bytes,
        [(rows, row_bytes), *((value, value.storage.bytes) for value in merged)],
        saves=(rows, *merged) if merged or gradients else (),
        weights=gradients,
    )


def _weigh(tape: Tape, layer: LayerModules, sizes: Sizes, rows: Value, scores: Value, picked: int) -> Value:
    """Rows times their routing weights, in fp32 unless the family casts those; back in the order of tokens; summed."""
    hidden = layer.shape.hidden_size
    plain, whole = sizes.bytes(picked * hidden), sizes.bytes(hidden)
    low = layer.shape.model_type in LOW_WEIGHTS
    wide = plain if low else sizes.fp32_bytes(picked * hidden)
    weighted = tape.apply(
        wide, [(rows, plain), (scores, scores.storage.bytes)], saves=(rows,), temporary=wide if low else 2 * wide
    )
    ordered = tape.apply(wide, [(weighted, wide)])
    tape.drop(weighted)
    summed = tape.apply(whole if low else sizes.fp32_bytes(hidden), [(ordered, None)])
    tape.drop(ordered, rows)
    if low or sizes.itemsize == FP32:
        return summed
    cast = tape.apply(whole, [(summed, sizes.fp32_bytes(hidden))])
    tape.drop(summed)
    return cast


Factors = dict[int, tuple[Value, int] | None]
"""By id of the stacked weight: its adapter as views of lora_A and lora_B, and their bytes; None without one."""


def _factors(tape: Tape, layer: LayerModules, weight: Weight) -> tuple[Value, int] | None:
    """The adapter of one stacked weight, seen as one small matrix per expert; made before any product, so that the
    adapters' gradients come after all of them.

    Source: peft 0.21.2, tuners/lora/layer.py (get_delta_factors, called by _activate_lora).
    """
    adapters = [(i, w) for i, w in enumerate(layer.laid.weights) if w.name.startswith(f"{weight.name}.expert_lora")]
    gradients = ops.gradients_of(adapters)
    if not adapters:
        return None
    return tape.apply(0, [], weights=gradients), sum(num_bytes for _, num_bytes in gradients)


def _adapted(tape: Tape, sizes: Sizes, owned: list[tuple[int, Weight]], factors: Factors) -> tuple[Value, ...]:
    """The stacked weight with its adapter folded in: a copy of all experts, made when it is first read and kept until
    the experts return and for backward, where it has a gradient.

    Source: peft 0.21.2, tuners/lora/layer.py (ParamWrapper._activate_lora: parametrize.cached, _LoraFactorsProxy).
    """
    merged = []
    for _, weight in owned:
        factor = factors[id(weight)]
        if factor is not None:
            value, num_bytes = factor
            merged.append(tape.apply(weight.numel * sizes.itemsize, [(value, num_bytes)]))
    return tuple(merged)
