"""A layer's routed experts: router, grouped products on T * k rows, weighting, shared expert.

Legend: T tokens, k experts per token, E experts, h hidden size, b bytes of the training dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zplan.memory import operations as ops
from zplan.memory.layer_modules import LayerModules
from zplan.memory.operations import FP32, Modules, Sizes
from zplan.memory.tape import Tape, Value, kept_factors
from zplan.memory.trainable import EXPERT_ADAPTERS, Weight

LEAF_FAMILIES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
"""Whose MoE block ZeRO-3 gathers at once and hooks as one module.

Source: deepspeed 0.19.8, runtime/zero/leaf_module_config.py (DEFAULT_LEAF_MODULE_CLASSES)."""
LEAF = "mlp"
READ_AS_STORED = frozenset({"gpt_oss"})
"""Families whose stacked weights are multiplied without being transposed, so that the graph keeps no view of them."""
FP32_ROUTERS = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "dots1", "ernie4_5_moe"})
"""Routers that see an fp32 copy of the hidden states (transformers 5.23.0, models/*/modeling_*.py)."""
LOW_WEIGHTS = frozenset({"qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "ernie4_5_moe"})
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
    container = modules.number(LEAF if leaf else layer.experts_module.rpartition(".")[0])
    if leaf:
        tape.enter_leaf(container, delays=sizes.partitioned)
    else:
        tape.enter(container)
    scores = _route(tape, layer, sizes, modules, x)
    summed = _grouped(tape, layer, sizes, modules, x, scores)
    tape.drop(scores)
    shared = [name for name in layer.mlp if "shared" in name]
    if len(shared) >= 3:
        number = modules.number(shared[0].rpartition(".")[0])
        tape.enter(number)
        extra = feed_forward(tape, layer, sizes, modules, x, shared[:3])
        tape.exit(number)
        total = tape.apply(whole, [(summed, None), (extra, None)])
        tape.drop(summed, extra)
        summed = total
    (tape.exit_leaf if leaf else tape.exit)(container)
    return summed


def _route(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> Value:
    """The router's probabilities, fp32; the best k are gathered out of them, which keeps indices only."""
    gates = [name for name in layer.mlp if name.endswith(("gate", "router"))]
    stacked = next(weight for weight in layer.laid.weights if len(weight.shape) == 3)
    width, hidden = stacked.shape[0], layer.shape.hidden_size
    fine = sizes.fp32_bytes(width)
    if not gates:
        return tape.apply(fine, [(x, sizes.bytes(hidden))])
    if layer.shape.model_type not in FP32_ROUTERS or sizes.itemsize == FP32:
        logits = ops.linear(tape, modules, sizes, gates[0], x, flat=True)
        return _probabilities(tape, logits, sizes.bytes(width), fine)
    parts = ("", ".lora_A.default", ".lora_B.default")
    number, owned = modules.number(gates[0]), [item for part in parts for item in modules.owner_of(gates[0] + part)]
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
    biases = [(i, w) for i, w in enumerate(layer.laid.weights) if w.name.endswith("_proj_bias")]
    both, picked_biases = _biased(tape, both, 2 * rows_inner, biases[:1])
    if layer.shape.model_type == "gpt_oss":
        product = clamped_gate(tape, both, rows_inner)
        tape.drop(both)
    else:
        product = _gate(tape, both, rows_inner, modules.number(f"{inside}.act_fn"))
    down = _adapted(tape, sizes, second, factors)
    tape.drop(*picked_biases)
    out = _product(tape, rows_hidden, product, rows_inner, down, second)
    out, picked_biases = _biased(tape, out, rows_hidden, biases[1:])
    tape.drop(product)
    summed = _weigh(tape, layer, sizes, out, scores, picked)
    tape.drop(rows, *gate_up, *down, *picked_biases)
    for number in reversed(entered):
        tape.exit(number)
    return summed


def _gate(tape: Tape, both: Value, rows_inner: int, act_number: int) -> Value:
    """act(gate) * up of one tensor in two halves."""
    gate, up = tape.split(both, 2, 2 * rows_inner)
    tape.enter(act_number)
    acted = tape.apply(rows_inner, [(gate, rows_inner)], saves=(gate,))
    tape.exit(act_number)
    product = tape.apply(rows_inner, [(acted, rows_inner), (up, rows_inner)], saves=kept_factors(acted, up))
    tape.drop(both, gate, up, acted)
    return product


def clamped_gate(tape: Tape, both: Value, rows_inner: int) -> Value:
    """(up + 1) * gate * sigmoid(alpha gate) of every other column, each clamped before; a column's gradient is one of
    the whole.

    Source: transformers 5.23.0, models/gpt_oss/modeling_gpt_oss.py (GptOssExperts._apply_gate).
    """
    inner = rows_inner
    gate, up = (tape.apply(None, [(both, 2 * inner)]) for _ in range(2))
    low = tape.apply(inner, [(gate, inner)], saves=(gate,))
    tape.drop(gate)
    near = tape.apply(inner, [(up, inner)], saves=(up,))
    tape.drop(up)
    scaled = tape.apply(inner, [(low, inner)])
    bent = tape.apply(inner, [(scaled, inner)], saves_output=True)
    tape.drop(scaled)
    glu = tape.apply(inner, [(low, inner), (bent, inner)], saves=(low, bent))
    tape.drop(bent)
    more = tape.apply(inner, [(near, None)])
    out = tape.apply(inner, [(more, inner), (glu, inner)], saves=(more, glu))
    tape.drop(more, glu, low, near)
    return out


def _biased(
    tape: Tape, rows: Value, num_bytes: int, owned: list[tuple[int, Weight]]
) -> tuple[Value, tuple[Value, ...]]:
    """A bias for every row, picked out of the experts' and added in place; it lives until the next ones are picked.

    Source: transformers 5.23.0, integrations/moe.py (grouped_mm_experts_forward: selected_biases; _grouped_linear).
    """
    if not owned:
        return rows, ()
    gradients = ops.gradients_of(owned)
    picked = tape.apply(num_bytes, [], weights=gradients)
    picked.needs_gradient = bool(gradients)
    added = tape.apply(None, [(rows, None), (picked, None)])
    tape.drop(rows)
    return added, (picked,)


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
    """One grouped product: keeps the rows for the gradient of experts or adapters that train, and the experts with
    adapters folded in for the gradient of the rows, which have none before the first adapter of the model.

    Source: torch 2.13.0, derivatives.yaml (_grouped_mm).
    """
    gradients = ops.gradients_of(owned)
    kept_rows = (rows,) if merged or gradients else ()
    return tape.apply(
        num_bytes,
        [(rows, row_bytes), *((value, value.storage.bytes) for value in merged)],
        saves=(*kept_rows, *merged) if rows.needs_gradient else kept_rows,
        weights=gradients,
    )


def _weigh(tape: Tape, layer: LayerModules, sizes: Sizes, rows: Value, scores: Value, picked: int) -> Value:
    """Rows times their routing weights, in fp32 unless the family casts those; back in the order of tokens; summed."""
    hidden = layer.shape.hidden_size
    plain, whole = sizes.bytes(picked * hidden), sizes.bytes(hidden)
    low = layer.shape.model_type in LOW_WEIGHTS
    wide = plain if low else sizes.fp32_bytes(picked * hidden)
    gone = plain if tape.unpacks else 0  # the rows, before their gradient is cast; both gradients are there in fp32
    weighted = tape.apply(
        wide,
        [(rows, plain), (scores, scores.storage.bytes)],
        saves=(rows,) if scores.needs_gradient else (),
        temporary=wide if low else 2 * wide - gone,
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
