"""Norms as operations on a tape: RMSNorm, torch's LayerNorm, Cohere's own.

Source: transformers 5.23.0, models/llama/modeling_llama.py and its siblings; torch 2.13.0, derivatives.yaml.
"""

from __future__ import annotations

from zplan.memory import operations as ops
from zplan.memory.operations import FP32, Modules, Sizes
from zplan.memory.tape import Tape, Value


def rms_norm(tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, width: int) -> Value:
    """RMSNorm in fp32, cast back before the weight (LlamaRMSNorm): keeps the fp32 input and the normalised output.

    In an fp32 run the casts are no operations and the input itself is kept.
    """
    owned = modules.owner_of(name)
    number = modules.number(name)
    small, large, fine = sizes.bytes(width), sizes.fp32_bytes(width), sizes.fp32_bytes(1)
    casts = sizes.itemsize != FP32
    tape.enter(number, x)
    wide = tape.apply(large, [(x, small)]) if casts else x
    square = tape.apply(large, [(wide, large)], saves=(wide,), temporary=2 * large)
    mean = tape.apply(fine, [(square, large)])
    tape.drop(square)
    root = tape.apply(fine, [(mean, fine)], saves_output=True)
    tape.drop(mean)
    normal = tape.apply(large, [(wide, large), (root, fine)], saves=(wide, root), temporary=large)
    tape.drop(root)
    if casts:
        tape.drop(wide)
    trains = any(weight.trainable for _, weight in owned)
    if casts and sizes.fp32_norm_weight:
        scaled = tape.apply(
            large, [(normal, large)], saves=(normal,) if trains else (), weights=ops.gradients_of(owned),
            temporary=large if trains else 0,
        )  # fmt: skip
        out = tape.apply(small, [(scaled, large)])
        tape.drop(normal, scaled)
        tape.exit(number, out)
        return out
    back = tape.apply(small, [(normal, large)]) if casts else normal
    out = tape.apply(
        small,
        [(back, small)],
        saves=(back,) if trains else (),
        weights=ops.gradients_of(owned),
        temporary=small if trains else 0,
    )
    tape.drop(normal)
    if casts:
        tape.drop(back)
    tape.exit(number, out)
    return out


def layer_norm(tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, width: int) -> Value:
    """torch's fused LayerNorm: keeps its input, mean and reciprocal deviation.

    Source: torch 2.13.0, derivatives.yaml (native_layer_norm).
    """
    owned = modules.owner_of(name)
    number = modules.number(name)
    tape.enter(number, x)
    out = tape.apply(
        sizes.bytes(width),
        [(x, sizes.bytes(width))],
        saves=(x,),
        extra_saved=2 * sizes.fp32_bytes(1),
        weights=ops.gradients_of(owned),
    )
    tape.exit(number, out)
    return out


def norm(tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, width: int) -> Value:
    """The norm that its parameters show: with a bias it is LayerNorm."""
    with_bias = any(weight.name.endswith("bias") for _, weight in modules.owner_of(name))
    if with_bias:
        return layer_norm(tape, modules, sizes, name, x, width)
    return (centred_norm if sizes.centred_norm else rms_norm)(tape, modules, sizes, name, x, width)


def centred_norm(tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, width: int) -> Value:
    """LayerNorm without a bias, in fp32: the difference from the mean is made twice, and both are kept.

    Source: transformers 5.23.0, models/cohere/modeling_cohere.py (CohereLayerNorm.forward).
    """
    owned = modules.owner_of(name)
    number = modules.number(name)
    small, large, fine = sizes.bytes(width), sizes.fp32_bytes(width), sizes.fp32_bytes(1)
    tape.enter(number, x)
    wide = tape.apply(large, [(x, small)])
    mean = tape.apply(fine, [(wide, large)])
    first = tape.apply(large, [(wide, None), (mean, fine)])
    square = tape.apply(large, [(first, large)], saves=(first,), temporary=2 * large)
    tape.drop(first)
    variance = tape.apply(fine, [(square, large)])
    tape.drop(square)
    second = tape.apply(large, [(wide, None), (mean, fine)])
    root = tape.apply(fine, [(variance, fine)], saves_output=True)
    normal = tape.apply(large, [(second, large), (root, fine)], saves=(second, root), temporary=large)
    tape.drop(wide, second, root)
    trains = any(weight.trainable for _, weight in owned)
    scaled = tape.apply(
        large, [(normal, large)], saves=(normal,) if trains else (), weights=ops.gradients_of(owned),
        temporary=large if trains else 0,
    )  # fmt: skip
    tape.drop(normal)
    out = tape.apply(small, [(scaled, large)])
    tape.drop(scaled, mean, variance)
    tape.exit(number, out)
    return out
