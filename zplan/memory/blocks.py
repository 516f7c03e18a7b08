"""The forward of a decoder layer as its parameters describe it, for every family of the catalogue.

Modules are recognised by name and shape: fused or separate q, k, v; gated or plain MLP; norms before, after, or both;
experts; latent attention. Legend: H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from zplan.memory import operations as ops
from zplan.memory.operations import Modules, Sizes
from zplan.memory.tape import Build, Tape, Value
from zplan.memory.trainable import EXPERT_ADAPTERS, LaidBlock, Weight
from zplan.model_shape import ModelShape

_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "W_pack_out", "out")
_POST_NORM_FAMILIES = ("olmo2", "olmo3")
_SPLIT_QKV = ("gpt2", "gpt_neox")
"""Fused q, k, v taken apart by torch.split or torch.chunk; others slice (transformers 5.23.0, modeling_gpt2.py,
modeling_gpt_neox.py, modeling_phi3.py)."""
_PARALLEL_NORMS = ("falcon", "gptj", "gpt_neox", "phi", "cohere")


@dataclass(frozen=True)
class LayerModules:
    """A layer's modules by what they do, in the order they run."""

    laid: LaidBlock
    shape: ModelShape

    @cached_property
    def _linears(self) -> list[str]:
        names = []
        for weight in self.laid.weights:
            is_adapter = weight.module.endswith(("lora_A.default", "lora_B.default")) or is_expert_adapter(weight)
            is_matrix = len(weight.shape) == 2 and not is_adapter
            if is_matrix and weight.group == 0 and weight.module not in names:
                names.append(weight.module)
        return names

    @cached_property
    def attention(self) -> list[str]:
        return [name for name in self._linears if "attn" in name or "attention" in name.lower()]

    @cached_property
    def mlp(self) -> list[str]:
        return [name for name in self._linears if name not in self.attention]

    @cached_property
    def output(self) -> str | None:
        named = [name for name in self.attention if name.rpartition(".")[2] in _OUTPUTS]
        return named[-1] if named else (self.attention[-1] if self.attention else None)

    @cached_property
    def projections(self) -> list[str]:
        return [name for name in self.attention if name != self.output]

    @cached_property
    def norms(self) -> list[str]:
        """Norms over the hidden size, outside the attention."""
        names: list[str] = []
        for weight in self.laid.weights:
            if weight.group == 1 and len(weight.shape) == 1 and weight.shape[0] == self.shape.hidden_size:
                inside = weight.module in self._linears or "attn." in weight.module or "attention." in weight.module
                if not inside and weight.module not in names and weight.name.endswith("weight"):
                    names.append(weight.module)
        return names

    @cached_property
    def head_norms(self) -> list[str]:
        """q_norm and k_norm."""
        names = [weight.module for weight in self.laid.weights if weight.module.endswith(("q_norm", "k_norm"))]
        return list(dict.fromkeys(names))

    @cached_property
    def experts(self) -> int:
        """Elements of the expert tensors of this layer; 0 in a dense layer."""
        return sum(weight.numel for weight in self.laid.weights if len(weight.shape) == 3)

    @cached_property
    def is_conv1d(self) -> bool:
        return self.shape.model_type == "gpt2"


def build_layer(laid: LaidBlock, shape: ModelShape, sizes: Sizes, modules: Modules) -> Build:
    """The forward of one decoder layer, ready to be recorded."""
    layer = LayerModules(laid, shape)

    def forward(tape: Tape, x: Value) -> Value:
        tape.enter(modules.number(""))
        out = _residual_layer(tape, layer, sizes, modules, x)
        tape.exit(modules.number(""))
        return out

    return forward


def _residual_layer(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> Value:
    width, norms = layer.shape.hidden_size, list(layer.norms)
    whole = sizes.bytes(width)
    before, after, before_mlp, after_mlp = _norm_roles(norms, layer.shape.model_type)
    normed = ops.norm(tape, modules, sizes, before, x, width) if before else x
    attended = _attention(tape, layer, sizes, modules, normed)
    if before_mlp is None and layer.shape.model_type.startswith(_PARALLEL_NORMS):
        fed = _mlp(tape, layer, sizes, modules, normed)
        both = tape.apply(whole, [(attended, None), (fed, None)])
        tape.drop(attended, fed, normed)
        out = tape.apply(whole, [(both, None), (x, None)])
        tape.drop(both)
        return out
    if before:
        tape.drop(normed)
    attended = _after(tape, modules, sizes, after, attended, width)
    middle = tape.apply(whole, [(x, None), (attended, None)])
    tape.drop(attended)
    normed = ops.norm(tape, modules, sizes, before_mlp, middle, width) if before_mlp else middle
    fed = _mlp(tape, layer, sizes, modules, normed)
    if before_mlp:
        tape.drop(normed)
    fed = _after(tape, modules, sizes, after_mlp, fed, width)
    out = tape.apply(whole, [(middle, None), (fed, None)])
    tape.drop(middle, fed)
    return out


def _after(tape: Tape, modules: Modules, sizes: Sizes, name: str | None, x: Value, width: int) -> Value:
    if name is None:
        return x
    out = ops.norm(tape, modules, sizes, name, x, width)
    tape.drop(x)
    return out


def _norm_roles(norms: list[str], model_type: str) -> tuple[str | None, str | None, str | None, str | None]:
    """(before attention, after attention, before MLP, after MLP)."""
    if len(norms) >= 4:
        return norms[0], norms[1], norms[2], norms[3]
    if model_type in _POST_NORM_FAMILIES and len(norms) == 2:
        return None, norms[0], None, norms[1]
    if len(norms) >= 2:
        return norms[0], None, norms[1], None
    return (norms[0] if norms else None), None, None, None


def _attention(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> Value:
    if layer.output is None:
        return tape.apply(sizes.bytes(layer.shape.hidden_size), [(x, None)])
    container = modules.number(layer.output.rpartition(".")[0])
    tape.enter(container)
    q, k, v = _project(tape, layer, sizes, modules, x)
    shape = layer.shape
    q_width, k_width = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    for name in layer.head_norms:
        if name.endswith("q_norm"):
            q = _head_norm(tape, modules, sizes, name, q, q_width, shape.head_dim)
        else:
            k = _head_norm(tape, modules, sizes, name, k, k_width, shape.head_dim)
    if uses_rotary(shape):
        rotated_q = ops.rotary(tape, sizes, q, q_width)
        rotated_k = ops.rotary(tape, sizes, k, k_width)
        tape.drop(q, k)
        q, k = rotated_q, rotated_k
    widths = (shape.num_attention_heads, q_width, k_width, k_width)
    if sizes.attention == "eager":
        softcap = bool(shape.config.get("attn_logit_softcapping", shape.model_type == "gemma2"))
        fp32_softmax = shape.model_type != "gpt2"
        mixed = ops.eager_attention(tape, sizes, q, k, v, *widths, softcap=softcap, fp32_softmax=fp32_softmax)
    else:
        masked = sizes.attention == "sdpa" and is_windowed(shape, sizes.length)
        mixed = ops.fused_attention(tape, sizes, q, k, v, *widths, masked=masked)
    out = ops.linear(tape, modules, sizes, layer.output, mixed, transposed=layer.is_conv1d)
    tape.drop(q, k, v, mixed)
    tape.exit(container)
    return ops.dropout(tape, sizes, out, shape.hidden_size, sizes.residual_dropout)


def _head_norm(tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, width: int, head_dim: int) -> Value:
    """A norm over each head: the widths are those of all heads, the weight is one head's."""
    out = ops.norm(tape, modules, sizes, name, x, width)
    tape.drop(x)
    return out


def _project(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> tuple[Value, Value, Value]:
    shape = layer.shape
    q_width, k_width = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    outs = [ops.linear(tape, modules, sizes, name, x, transposed=layer.is_conv1d) for name in layer.projections]
    if len(outs) == 3:
        return outs[0], outs[1], outs[2]
    if len(outs) == 1:
        whole = sizes.bytes(q_width + 2 * k_width)
        if shape.model_type in _SPLIT_QKV:
            pieces = tape.split(outs[0], 3, whole)
        else:  # slices, each with a gradient of the whole
            pieces = tuple(tape.apply(None, [(outs[0], whole)]) for _ in range(3))
        tape.drop(outs[0])
        return pieces[0], pieces[1], pieces[2]
    q = tape.apply(sizes.bytes(q_width), [(out, sizes.bytes(q_width)) for out in outs[:1]])
    k = tape.apply(sizes.bytes(k_width), [(out, sizes.bytes(k_width)) for out in outs[-1:]])
    v = tape.apply(sizes.bytes(k_width), [(out, sizes.bytes(k_width)) for out in outs[-1:]])
    tape.drop(*outs)
    return q, k, v


def is_windowed(shape: ModelShape, length: int) -> bool:
    """Whether some layer's window is shorter than the batch, so that sdpa gets a mask instead of `is_causal`.

    Limits: where windows alternate with full attention, every layer is taken as windowed.
    Source: transformers 5.23.0, masking_utils.py (_ignore_causal_mask_sdpa).
    """
    return shape.sliding_window is not None and length >= shape.sliding_window


def uses_rotary(shape: ModelShape) -> bool:
    """Families with learned positions or ALiBi do not rotate q and k."""
    return not shape.model_type.startswith(("gpt2", "opt", "bloom", "t5", "mt5", "umt5", "bart"))


def _mlp(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> Value:
    names = layer.mlp
    if layer.experts:
        return _experts(tape, layer, sizes, modules, x)
    container = modules.number(names[0].rpartition(".")[0])
    tape.enter(container)
    out = _feed_forward(tape, layer, sizes, modules, x, names)
    tape.exit(container)
    return ops.dropout(tape, sizes, out, layer.shape.hidden_size, sizes.residual_dropout)


def _feed_forward(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value, names: list[str]) -> Value:
    last = [name.rpartition(".")[2] for name in names]
    inner = layer.shape.intermediate_size
    whole = sizes.bytes(inner)
    if len(names) >= 3:
        gate = ops.linear(tape, modules, sizes, names[0], x)
        act_number = modules.number("act_fn")
        tape.enter(act_number)
        acted = ops.activation(tape, sizes, gate, inner, layer.shape.hidden_act)
        tape.exit(act_number)
        tape.drop(gate)
        up = ops.linear(tape, modules, sizes, names[1], x)
        product = tape.apply(whole, [(acted, whole), (up, whole)], saves=(acted, up))
        tape.drop(acted, up)
        out = ops.linear(tape, modules, sizes, names[2], product)
        tape.drop(product)
        return out
    first = ops.linear(tape, modules, sizes, names[0], x, transposed=layer.is_conv1d)
    if "gate_up_proj" in last:
        gate, up = tape.split(first, 2, 2 * whole)
        tape.drop(first)
        acted = ops.activation(tape, sizes, gate, inner, layer.shape.hidden_act)
        product = tape.apply(whole, [(acted, whole), (up, whole)], saves=(acted, up))
        tape.drop(gate, up, acted)
    else:
        product = ops.activation(tape, sizes, first, inner, layer.shape.hidden_act)
        tape.drop(first)
    out = ops.linear(tape, modules, sizes, names[-1], product, transposed=layer.is_conv1d)
    tape.drop(product)
    return out


def _experts(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> Value:
    """Routed experts on T * num_experts_per_tok rows, and the shared expert.

    Limits: routing is taken as balanced over the experts; the router's own tensors are left out but for its logits.
    Source: transformers 5.23.0, integrations/moe.py (grouped_mm_experts_forward).
    """
    shape = layer.shape
    picked = max(shape.num_experts_per_tok, 1)
    inner = shape.moe_intermediate_size or shape.intermediate_size
    rows_hidden, rows_inner = sizes.bytes(picked * shape.hidden_size), sizes.bytes(picked * inner)
    owned = [(i, w) for i, w in enumerate(layer.laid.weights) if len(w.shape) == 3]
    container = modules.number(owned[0][1].module)
    tape.enter(container)
    rows = tape.apply(rows_hidden, [(x, sizes.bytes(shape.hidden_size))])
    first, second = owned[: len(owned) // 2] or owned, owned[len(owned) // 2 :]
    down = _adapted_experts(tape, layer, sizes, second)
    gate_up = _adapted_experts(tape, layer, sizes, first)
    both = tape.apply(
        2 * rows_inner,
        [(rows, rows_hidden), *((value, value.storage.bytes) for value in gate_up)],
        saves=(rows, *gate_up),
        weights=ops.gradients_of(first),
    )
    acted = tape.apply(rows_inner, [(both, rows_inner)], saves=(both,))
    product = tape.apply(rows_inner, [(acted, rows_inner), (both, 2 * rows_inner)], saves=(acted, both))
    out = tape.apply(
        rows_hidden,
        [(product, rows_inner), *((value, value.storage.bytes) for value in down)],
        saves=(product, *down),
        weights=ops.gradients_of(second),
    )
    weighted = tape.apply(rows_hidden, [(out, rows_hidden)], saves=(out,))
    summed = tape.apply(sizes.bytes(shape.hidden_size), [(weighted, rows_hidden)])
    tape.drop(rows, both, acted, product, out, weighted, *gate_up, *down)
    tape.exit(container)
    shared = [name for name in layer.mlp if "shared" in name]
    if len(shared) >= 3:
        extra = _feed_forward(tape, layer, sizes, modules, x, shared[:3])
        total = tape.apply(sizes.bytes(shape.hidden_size), [(summed, None), (extra, None)])
        tape.drop(summed, extra)
        return total
    return summed


def is_expert_adapter(weight: Weight) -> bool:
    """lora_A or lora_B beside the stacked weights of experts."""
    return weight.name.endswith(EXPERT_ADAPTERS)


def _adapted_experts(
    tape: Tape, layer: LayerModules, sizes: Sizes, owned: list[tuple[int, Weight]]
) -> tuple[Value, ...]:
    """The stacked weight with its adapter folded in: a copy of all experts, kept for backward, with a gradient.

    Source: peft 0.21.2, tuners/lora/layer.py (ParamWrapper._activate_lora, _LoraFactorsProxy: baddbmm).
    """
    merged = []
    for _, weight in owned:
        adapters = [(i, w) for i, w in enumerate(layer.laid.weights) if w.name.startswith(f"{weight.name}.expert_lora")]
        if adapters:
            merged.append(tape.apply(weight.numel * sizes.itemsize, [], weights=ops.gradients_of(adapters)))
    return tuple(merged)
