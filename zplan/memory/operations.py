"""What each module of a transformer keeps for its backward, written as operations on a tape.

Legend: B micro-batch, S sequence length, T = B * S tokens, b bytes of the training dtype.
Source: transformers 5.23.0, models/llama/modeling_llama.py and its siblings; torch 2.13.0, derivatives.yaml.
"""

from __future__ import annotations

from dataclasses import field

from zplan.memory.tape import Tape, Value
from zplan.memory.trainable import NF4_BLOCK, LaidBlock, Weight
from zplan.recipe import Attention
from zplan.values import dataclass

FP32 = 4
MAGNITUDE = "lora_magnitude_vector.default"
"""DoRA's module beside lora_A and lora_B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The numbers that activations depend on."""

    micro_batch: int
    length: int
    itemsize: int
    attention: Attention
    on_cpu: bool
    fp32_norm_weight: bool = False
    """RMSNorm multiplies by its weight before the cast back (OLMo 2 and 3, Helium, Gemma), and keeps fp32 for it."""
    centred_norm: bool = False
    """The norm is a LayerNorm of the family's own, written out in fp32 (Cohere)."""
    partitioned: bool = False
    """ZeRO-3, whose linear keeps its input even if the weight is frozen, and gives gradients that are no views
    (deepspeed 0.19.8, runtime/zero/linear.py, LinearFunctionForZeroStage3)."""
    multiplies_by_hand: bool = False
    """Matrices of the layers are no calls of F.linear, the only one that ZeRO-3 replaces (Falcon; transformers 5.23.0,
    models/falcon/modeling_falcon.py, FalconLinear)."""
    residual_dropout: float = 0.0
    """Behind the attention and behind the MLP."""
    attention_dropout: float = 0.0
    """On eager attention's weights; fused kernels draw theirs as they go."""
    adapter_dropout: float = 0.0
    """On the input of every lora_A."""
    sequence_parallel_size: int = 1
    """Ranks that share each sequence (Ulysses); `length` is one rank's part."""

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.length

    def bytes(self, width: int) -> int:
        """T x width in the training dtype."""
        return self.tokens * width * self.itemsize

    def fp32_bytes(self, width: int) -> int:
        return self.tokens * width * FP32


@dataclass(slots=True)
class Modules:
    """A laid block's weights by module, and the numbers that events carry."""

    weights: dict[str, list[tuple[int, Weight]]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, laid: LaidBlock) -> Modules:
        modules = cls()
        for index, weight in enumerate(laid.weights):
            modules.weights.setdefault(weight.module, []).append((index, weight))
        return modules

    def number(self, name: str) -> int:
        """The number of a module in events, in the order of first use."""
        return self.numbers.setdefault(name, len(self.numbers))

    def owner_of(self, name: str) -> list[tuple[int, Weight]]:
        return self.weights.get(name, [])


def gradients_of(owned: list[tuple[int, Weight]]) -> tuple[tuple[int, int], ...]:
    """(weight index, gradient bytes) of the trainable ones."""
    return tuple((index, weight.itemsize * weight.numel) for index, weight in owned if weight.trainable)


def out_features(modules: Modules, name: str, *, transposed: bool = False) -> int:
    """Width of a linear module's output."""
    matrix = next(weight for _, weight in modules.owner_of(name) if len(weight.shape) == 2)
    return matrix.shape[1] if transposed else matrix.shape[0]


def linear(
    tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, *, transposed: bool = False, flat: bool = False
) -> Value:
    """A linear module, with its adapter if it has one.

    The input is kept only for the weight's gradient: a frozen base keeps nothing, lora_A keeps the input, lora_B the
    r-wide middle. lora_dropout is a module of its own, an Identity at rate 0, whose hook prefetches as any other's
    (peft 0.21.2, tuners/lora/layer.py, update_layer, Linear.forward).

    Args:
        transposed: weight stored as (in, out), as GPT-2's Conv1D.
        flat: the input has two dimensions; with three its gradient is a view of a product of two.
    """
    owned = modules.owner_of(name)
    matrix = next(weight for _, weight in owned if len(weight.shape) == 2)
    in_features, out_features = matrix.shape if transposed else reversed(matrix.shape)
    adapted = modules.owner_of(f"{name}.lora_A.default")
    path = f"{name}.base_layer" if adapted else name
    if adapted:
        tape.enter(modules.number(name), x)
    out = _matmul(tape, modules, sizes, path, owned, x, (in_features, out_features), flat)
    if not adapted:
        return out
    if modules.owner_of(f"{name}.{MAGNITUDE}"):
        added = _dora(tape, modules, sizes, name, x, out, flat)
        tape.exit(modules.number(name))
        return added
    rank = adapted[0][1].shape[0]
    thinned = _adapter_dropout(tape, modules, sizes, f"{name}.lora_dropout.default", x, in_features)
    middle = _matmul(tape, modules, sizes, f"{name}.lora_A.default", adapted, thinned, (in_features, rank), flat)
    if thinned is not x:
        tape.drop(thinned)
    second = modules.owner_of(f"{name}.lora_B.default")
    wide = _matmul(tape, modules, sizes, f"{name}.lora_B.default", second, middle, (rank, out_features), flat)
    tape.drop(middle)
    scaled = tape.apply(sizes.bytes(out_features), [(wide, sizes.bytes(out_features))])
    tape.drop(wide)
    added = tape.apply(sizes.bytes(out_features), [(out, None), (scaled, None)])
    tape.drop(scaled, out)
    tape.exit(modules.number(name))
    return added


def _dora(tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, result: Value, flat: bool) -> Value:
    """result + (m - 1) * result + m * lora_B(lora_A(x)) * scaling, m the trained magnitude over the norm of W + B A.

    For the norm B A is made out of an identity (in x in, kept by its graph as long as B A is), then scaled and added to
    W: two more of out x in. Both products with m keep both factors and take one temporary for m's gradient; with the
    norm these are three vectors of the output's width.
    Under dropout W multiplies the thinned input once more, in place of `result`; without it a bias is taken off first.

    Source: peft 0.21.2, tuners/lora/dora.py (DoraLinearLayer.forward, get_lora_weight, get_weight_norm), variants.py
    (DoraLinearVariant.forward).
    """
    lora_a, lora_b, inner = f"{name}.lora_A.default", f"{name}.lora_B.default", f"{name}.{MAGNITUDE}"
    (_, first), (_, second) = modules.owner_of(lora_a)[0], modules.owner_of(lora_b)[0]
    (rank, in_features), out_features = first.shape, second.shape[0]
    wide = sizes.bytes(out_features)
    thinned = x
    if sizes.adapter_dropout:
        thinned = _adapter_dropout(tape, modules, sizes, f"{name}.lora_dropout.default", x, in_features)
    tape.enter(modules.number(inner))
    product = _norm_of_sum(tape, modules, sizes, (lora_a, lora_b), (rank, in_features, out_features))
    norm, magnitude, less_one = (tape.new(sizes.itemsize * out_features) for _ in range(3))
    middle = _matmul(tape, modules, sizes, lora_a, modules.owner_of(lora_a), thinned, (in_features, rank), flat)
    lora = _matmul(tape, modules, sizes, lora_b, modules.owner_of(lora_b), middle, (rank, out_features), flat)
    tape.drop(middle)
    again = _base_result(tape, modules, sizes, name, thinned, result, (in_features, out_features))
    owned = modules.owner_of(inner)
    saves = (again, less_one, norm)
    left = tape.apply(wide, [(again, wide)], saves=saves, weights=gradients_of(owned), temporary=wide)
    right = tape.apply(wide, [(lora, wide)], saves=(lora, magnitude), temporary=wide)
    tape.drop(less_one)
    scaled = tape.apply(wide, [(right, wide)])
    tape.drop(right)
    both = tape.apply(wide, [(left, None), (scaled, None)])
    tape.drop(left, scaled, lora, norm, magnitude, *product, *((again,) if again is not result else ()))
    tape.exit(modules.number(inner))
    out = tape.apply(wide, [(result, None), (both, None)])
    tape.drop(result, both, *((thinned,) if thinned is not x else ()))
    return out


def _norm_of_sum(
    tape: Tape, modules: Modules, sizes: Sizes, adapter: tuple[str, str], features: tuple[int, int, int]
) -> list[Value]:
    """What is left of the norm's way: B A, and with it the identity and B's input where a graph is made."""
    rank, in_features, out_features = features
    identity = tape.new(sizes.itemsize * in_features**2)
    middle = tape.new(sizes.itemsize * in_features * rank)
    tape.visit(modules.number(adapter[0]))
    matrix = sizes.itemsize * in_features * out_features
    product = tape.new(matrix)
    tape.visit(modules.number(adapter[1]))
    kept = [identity, middle]
    if not tape.keeps:
        tape.drop(*kept)
        kept = []
    tape.touch(2 * matrix)
    return [product, *kept]


def _base_result(
    tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, result: Value, features: tuple[int, int]
) -> Value:
    """What DoRA scales by m - 1."""
    in_features, out_features = features
    if sizes.adapter_dropout:
        saves = (x,) if sizes.partitioned else ()
        return tape.apply(sizes.bytes(out_features), [(x, sizes.bytes(in_features))], saves=saves)
    if any(weight.name.endswith("bias") for _, weight in modules.owner_of(name)):
        return tape.apply(sizes.bytes(out_features), [(result, None)])
    return result


def _adapter_dropout(tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, width: int) -> Value:
    """The input as an adapter sees it: itself, or a copy of it beside the mask."""
    number = modules.number(name)
    tape.enter(number, x)
    out = _with_mask(tape, sizes, x, width) if sizes.adapter_dropout else x
    tape.exit(number, out)
    return out


def _matmul(
    tape: Tape,
    modules: Modules,
    sizes: Sizes,
    path: str,
    owned: list[tuple[int, Weight]],
    x: Value,
    features: tuple[int, int],
    flat: bool,
) -> Value:
    in_features, out_features = features
    number = modules.number(path)
    tape.enter(number, x)
    quantised = sum(weight.numel for _, weight in owned if weight.packed)
    by_hand = quantised or (sizes.multiplies_by_hand and ".lora_" not in path)
    partitioned = sizes.partitioned and not by_hand
    forward, backward = dequantised_bytes(quantised, sizes.itemsize)
    out = tape.apply(
        sizes.bytes(out_features),
        [(x, sizes.bytes(in_features))],
        saves=(x,) if partitioned or any(w.trainable and len(w.shape) == 2 for _, w in owned) else (),
        weights=gradients_of(owned),
        temporary=backward,
        viewed=not flat and not partitioned,
        forward_temporary=forward,
    )
    tape.exit(number, out)
    if quantised and path.endswith(".base_layer"):
        tape.touch(sizes.bytes(out_features))  # the clone of the result (peft, lora/bnb.py, Linear4bit.forward)
    return out


def dequantised_bytes(numel: int, itemsize: int) -> tuple[int, int]:
    """Workspace of a product with a 4-bit weight in forward and in the backward of its input: the weight in the
    training dtype, in forward beside two copies of its scales in fp32 (backward's copy is gone before the product).

        b n + 8 n / 64        b n

    Source: bitsandbytes 0.50.2, backends/cuda/ops.py (_dequant_linear_fallback), functional.py (dequantize_4bit).
    Limits: for some hundred tokens or fewer a kernel that dequantises nothing may be chosen, by the GPU.
    """
    return itemsize * numel + 2 * FP32 * -(-numel // NF4_BLOCK), itemsize * numel


def rotary(tape: Tape, sizes: Sizes, x: Value, width: int) -> Value:
    """x * cos + rotate_half(x) * sin: cos and sin need no gradient, so nothing of x is kept."""
    whole, half = sizes.bytes(width), sizes.bytes(width) // 2
    straight = tape.apply(whole, [(x, whole)])
    negative = tape.apply(half, [(x, whole)], temporary=half)
    turned = tape.apply(whole, [(negative, None), (x, whole)])
    tape.drop(negative)
    rotated = tape.apply(whole, [(turned, whole)])
    tape.drop(turned)
    out = tape.apply(whole, [(straight, None), (rotated, None)])
    tape.drop(straight, rotated)
    return out


def dropout(tape: Tape, sizes: Sizes, x: Value, width: int, rate: float) -> Value:
    """Keeps a mask, one byte an element; without the fused kernel (CPU ranks) noise of the training dtype.

    Source: torch 2.13.0, aten/src/ATen/native/Dropout.cpp (native_dropout, _dropout).
    """
    if rate == 0.0:
        return x
    out = _with_mask(tape, sizes, x, width)
    tape.drop(x)
    return out


def dropout_module(tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, width: int) -> Value:
    """A dropout that is a module, whose hooks prefetch at any rate; with an empty name it is a function.

    Source: deepspeed 0.19.8, runtime/zero/parameter_offload.py (_register_deepspeed_module: every module has hooks).
    """
    if not name:
        return dropout(tape, sizes, x, width, sizes.residual_dropout)
    tape.enter(modules.number(name))
    out = dropout(tape, sizes, x, width, sizes.residual_dropout)
    tape.exit(modules.number(name))
    return out


def _with_mask(tape: Tape, sizes: Sizes, x: Value, width: int) -> Value:
    whole = sizes.bytes(width)
    return tape.apply(whole, [(x, whole)], extra_saved=whole if sizes.on_cpu else sizes.tokens * width)


def activation(tape: Tape, sizes: Sizes, x: Value, width: int, hidden_act: str) -> Value:
    """The MLP's nonlinearity: one operation that keeps its input, or GPT-2's tanh formula, which keeps its pieces."""
    whole = sizes.bytes(width)
    if hidden_act == "relu":
        return tape.apply(whole, [(x, whole)], saves_output=True)
    if hidden_act in ("gelu_new", "gelu_fast", "relu2"):
        pieces = 3 if hidden_act != "relu2" else 1
        return tape.apply(whole, [(x, whole)], saves=(x,), extra_saved=pieces * whole, temporary=whole)
    return tape.apply(whole, [(x, whole)], saves=(x,))
