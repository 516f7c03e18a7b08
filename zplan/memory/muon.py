"""DeepSpeed's Muon: which parameters it updates, what it keeps of them, what an orthogonalisation allocates.

Legend: N elements of a matrix, n its shorter side, b bytes of the gradient's dtype, w of the dtype in which it is
normalised, h of the dtype in which it is iterated.
Source: deepspeed 0.19.8, runtime/zero/muon/original_muon.py, muon_optimizer.py; line numbers at each rule.

Limits: each operation is counted as it is written. torch.compile, with which DeepSpeed decorates these functions, fuses
some of them and then allocates less.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from zplan.values import dataclass

FP32, HALF = 4, 2
ADAM_STATES = 2 * FP32
"""exp_avg and exp_avg_sq of what Muon leaves to FusedAdam, in the dtype of the masters (ops/adam/fused_adam.py)."""
ADAM_NAMES = ("embed", "lm_head")


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of an element on the way through an orthogonalisation."""

    gradient: int
    normalised: int
    """As the gradient, but fp32 for one of fp16, whose norm would overflow."""
    iterated: int = HALF
    """fp16; fp32 on CPU ranks, where few processors have it."""


def precision(gradient: int, *, in_fp16: bool = False, on_cpu: bool = False) -> Precision:
    """Of gradients of so many bytes.

    Limits: a CPU with fp16 (AMX, AVX512-FP16) iterates in 2 bytes, not in 4 as counted here.
    Source: deepspeed 0.19.8, original_muon.py:41 (ns_compute_dtype), :107 (norm_dtype).
    """
    return Precision(gradient, FP32 if in_fp16 else gradient, FP32 if on_cpu else HALF)


BF16, MASTER = precision(2), precision(FP32)


def is_updated_by_muon(name: str, shape: tuple[int, ...]) -> bool:
    """A matrix that is neither embedding nor head by its name; all else is AdamW's. GPT-2's `wte` counts as a matrix.

    Source: deepspeed 0.19.8, __init__.py:370 (set_optimizer_flags), runtime/engine.py:2425 (_muon_param_groups).
    """
    return len(shape) >= 2 and not any(word in name.lower() for word in ADAM_NAMES)


def update_bytes(shape: tuple[int, ...], of: Precision) -> int:
    """Most that one `muon_update` has live beside gradient and momentum, its result (b N) included.

        momentum        max((b + 3) N, 2 b N)          isfinite's |g| and three masks; lerp and where
        normalised      (w + h) N, + w N for a wider copy      the copy, the quotient, the quotient's cast
        square          h * 6 N                        X, A, B, a X, B X and their sum
        else, s = n n   h * max(N + 7 s, 2 N + 4 s)    X, Q, R, Z, RZ and a sum's three; then Q X beside X, Q, R, Z, RZ
        result          max((b + h) N, 2 b N)          the update in b; where it is finite

    Source: deepspeed 0.19.8, runtime/zero/muon/original_muon.py (muon_update, zeropower_via_gram_newtonschulz).
    """
    numel, short = prod(shape), min(shape[-2:])
    gram = numel // max(shape[-2:]) * short
    square = shape[-1] == shape[-2]
    iterated = 6 * numel if square else max(numel + 7 * gram, 2 * numel + 4 * gram)
    copies = 2 if of.normalised != of.gradient else 1
    cast = of.iterated if of.iterated != of.normalised else 0
    normalised = (copies * of.normalised + cast) * numel
    result = (of.gradient + (of.iterated if of.iterated != of.gradient else of.gradient)) * numel
    momentum = max(of.gradient + 3, 2 * of.gradient) * numel
    return max(momentum, normalised, of.iterated * iterated, result)


def updates_bytes(shapes: Iterable[tuple[int, ...]], of: Precision) -> int:
    """Most that the updates of several matrices have live if all results are kept, as ZeRO-1 and 2 keep them.

        max over k of   b (N_1 + ... + N_k-1) + update_bytes(k)

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:2829 (_get_flat_partition_unpadded).
    """
    kept = most = 0
    for shape in shapes:
        most = max(most, kept + update_bytes(shape, of))
        kept += of.gradient * prod(shape)
    return most


def chained_updates_bytes(shapes: Iterable[tuple[int, ...]], of: Precision) -> int:
    """Most that the updates of several matrices have live if each is applied at once: the one before is still there.

        max over k of   b N_k-1 + update_bytes(k)

    Source: deepspeed 0.19.8, runtime/zero/muon/muon_optimizer.py:57 (MuonWithAuxAdam.step: update).
    """
    before = most = 0
    for shape in shapes:
        most = max(most, before + update_bytes(shape, of))
        before = of.gradient * prod(shape)
    return most


def first_updates_bytes(shapes: Iterable[tuple[int, ...]], adam_numel: int, of: Precision) -> int:
    """Most that the first update of fp32 masters takes beside all states: a matrix's momentum is made when its update
    comes, AdamW's states when all of Muon's have; the last update is still there then.

        max(4 N_last, max over k of   4 (N_1 + ... + N_k) + 4 N_k-1 + update_bytes(k) - states)

    Source: deepspeed 0.19.8, runtime/zero/muon/muon_optimizer.py:57 (MuonWithAuxAdam.step), which
    runtime/fp16/unfused_optimizer.py:412 (initialize_optimizer_states) runs on gradients of zeros.
    """
    momentum = before = most = 0
    for shape in shapes:
        momentum += FP32 * prod(shape)
        most = max(most, momentum + before + update_bytes(shape, of))
        before = FP32 * prod(shape)
    return max(before, most - momentum - ADAM_STATES * adam_numel)
