"""The forward of a decoder layer as its parameters describe it, for every family of the catalogue.

Modules are recognised by name and shape: fused or separate q, k, v; gated or plain MLP; norms before, after, or both;
experts; latent attention. Legend: H heads, D head size.
"""

from __future__ import annotations

from zplan.memory import norms
from zplan.memory import operations as ops
from zplan.memory.attention import attend
from zplan.memory.block_tape import Build
from zplan.memory.experts import run_experts
from zplan.memory.layer_modules import LayerModules
from zplan.memory.operations import Modules, Sizes
from zplan.memory.tape import Tape, Value, kept_factors
from zplan.memory.trainable import LaidBlock
from zplan.model_shape import ModelShape

_POST_NORM_FAMILIES = ("olmo2", "olmo3")
_PARALLEL = frozenset(
    {"falcon", "gptj", "codegen", "gpt_neox", "gpt_neox_japanese", "phi", "cohere", "cohere2", "stablelm"}
)
"""Unless their config says otherwise; Phi-3 is none of them."""


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
    width = layer.shape.hidden_size
    whole = sizes.bytes(width)
    before, after, before_mlp, after_mlp = _norm_roles(layer.norms, layer.shape.model_type)
    normed = norms.norm(tape, modules, sizes, before, x, width) if before else x
    if before and is_parallel(layer.shape):
        return _parallel(tape, layer, sizes, modules, x, normed, before_mlp)
    attended = attend(tape, layer, sizes, modules, normed)
    if before:
        tape.drop(normed)
    attended = _scaled(tape, layer, whole, _after(tape, modules, sizes, after, attended, width))
    middle = tape.apply(whole, [(x, None), (attended, None)])
    tape.drop(attended)
    normed = norms.norm(tape, modules, sizes, before_mlp, middle, width) if before_mlp else middle
    fed = _mlp(tape, layer, sizes, modules, normed)
    if before_mlp:
        tape.drop(normed)
    fed = _scaled(tape, layer, whole, _after(tape, modules, sizes, after_mlp, fed, width))
    out = tape.apply(whole, [(middle, None), (fed, None)])
    tape.drop(middle, fed)
    return out


def is_parallel(shape: ModelShape) -> bool:
    """Whether attention and MLP both read the layer's input.

    Source: transformers 5.23.0, models/gpt_neox/modeling_gpt_neox.py (GPTNeoXLayer.forward), models/falcon/
    modeling_falcon.py (FalconDecoderLayer.forward).
    """
    parallel = shape.config.get("use_parallel_residual", True) and shape.config.get("parallel_attn", True)
    return bool(parallel) and shape.model_type in _PARALLEL


def _parallel(
    tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value, normed: Value, before_mlp: str | None
) -> Value:
    """Attention and MLP side by side, of one norm or of one each: Falcon makes both at once, others in turn."""
    width, at_once = layer.shape.hidden_size, layer.shape.model_type == "falcon"
    whole, fed_normed = sizes.bytes(width), normed
    if before_mlp and at_once:
        fed_normed = norms.norm(tape, modules, sizes, before_mlp, x, width)
    attended = attend(tape, layer, sizes, modules, normed)
    if before_mlp and not at_once:
        tape.drop(normed)
        fed_normed = norms.norm(tape, modules, sizes, before_mlp, x, width)
    fed = _mlp(tape, layer, sizes, modules, fed_normed)
    both = tape.apply(whole, [(attended, None), (fed, None)])
    tape.drop(attended, fed, fed_normed, *([normed] if before_mlp and at_once else []))
    out = tape.apply(whole, [(both, None), (x, None)])
    tape.drop(both)
    return out


def _scaled(tape: Tape, layer: LayerModules, num_bytes: int, x: Value) -> Value:
    """Times the residual multiplier of Granite (transformers 5.23.0, models/granite/modeling_granite.py)."""
    if not layer.shape.model_type.startswith("granite"):
        return x
    out = tape.apply(num_bytes, [(x, num_bytes)])
    tape.drop(x)
    return out


def _after(tape: Tape, modules: Modules, sizes: Sizes, name: str | None, x: Value, width: int) -> Value:
    if name is None:
        return x
    out = norms.norm(tape, modules, sizes, name, x, width)
    tape.drop(x)
    return out


def _norm_roles(names: list[str], model_type: str) -> tuple[str | None, str | None, str | None, str | None]:
    """(before attention, after attention, before MLP, after MLP)."""
    if len(names) >= 4:
        return names[0], names[1], names[2], names[3]
    if model_type in _POST_NORM_FAMILIES and len(names) == 2:
        return None, names[0], None, names[1]
    if len(names) >= 2:
        return names[0], None, names[1], None
    return (names[0] if names else None), None, None, None


def _mlp(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> Value:
    names = layer.mlp
    if layer.experts:
        return run_experts(tape, layer, sizes, modules, x, _feed_forward)
    container = modules.number(names[0].rpartition(".")[0])
    tape.enter(container)
    out = _feed_forward(tape, layer, sizes, modules, x, names)
    inner, outer = layer.inner_dropouts[1], layer.dropouts[1]
    if inner:
        out = ops.dropout_module(tape, modules, sizes, inner, out, layer.shape.hidden_size)
    tape.exit(container)
    return out if inner else ops.dropout_module(tape, modules, sizes, outer, out, layer.shape.hidden_size)


def _feed_forward(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value, names: list[str]) -> Value:
    last = [name.rpartition(".")[2] for name in names]
    inner = ops.out_features(modules, names[0], transposed=layer.is_conv1d) // (2 if "gate_up_proj" in last else 1)
    whole = sizes.bytes(inner)
    flat = layer.shape.model_type == "opt"  # its layer makes one dimension of batch and sequence (modeling_opt.py)
    act_number = modules.number("act_fn")
    if len(names) >= 3:
        gate = ops.linear(tape, modules, sizes, names[0], x)
        acted = _activated(tape, sizes, act_number, gate, inner, layer.shape.hidden_act)
        tape.drop(gate)
        up = ops.linear(tape, modules, sizes, names[1], x)
        product = tape.apply(whole, [(acted, whole), (up, whole)], saves=kept_factors(acted, up))
        tape.drop(acted, up)
        out = ops.linear(tape, modules, sizes, names[2], product)
        tape.drop(product)
        return out
    first = ops.linear(tape, modules, sizes, names[0], x, transposed=layer.is_conv1d, flat=flat)
    if "gate_up_proj" in last:
        gate, up = tape.split(first, 2, 2 * whole)
        tape.drop(first)
        acted = _activated(tape, sizes, act_number, gate, inner, layer.shape.hidden_act)
        product = tape.apply(whole, [(acted, whole), (up, whole)], saves=kept_factors(acted, up))
        tape.drop(gate, up, acted)
    else:
        product = _activated(tape, sizes, act_number, first, inner, layer.shape.hidden_act)
        tape.drop(first)
    out = ops.linear(tape, modules, sizes, names[-1], product, transposed=layer.is_conv1d, flat=flat)
    tape.drop(product)
    return out


def _activated(tape: Tape, sizes: Sizes, number: int, x: Value, width: int, hidden_act: str) -> Value:
    """The nonlinearity as the module that it is, whatever its name."""
    tape.enter(number)
    out = ops.activation(tape, sizes, x, width, hidden_act)
    tape.exit(number)
    return out
