"""DeepSpeed's Muon: which parameters it updates, what it keeps of them, what an orthogonalisation allocates.

Legend: N elements of a matrix, n its shorter side, b bytes of the gradient's dtype (bf16 or fp32).
Source: deepspeed 0.19.8, runtime/zero/muon/original_muon.py, muon_optimizer.py; line numbers at each rule.

Limits: each operation is counted as it is written. torch.compile, with which DeepSpeed decorates these functions, fuses
some of them and then allocates less. With offload the update runs elsewhere and is not modelled (limits.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

FP32, HALF = 4, 2
ADAM_STATES = 2 * FP32
"""exp_avg and exp_avg_sq of what Muon leaves to FusedAdam, in the dtype of the masters (ops/adam/fused_adam.py)."""
ADAM_NAMES = ("embed", "lm_head")


def is_updated_by_muon(name: str, shape: tuple[int, ...]) -> bool:
    """A matrix that is neither embedding nor head by its name; all else is AdamW's. GPT-2's `wte` counts as a matrix.

    Source: deepspeed 0.19.8, __init__.py:370 (set_optimizer_flags), runtime/engine.py:2425 (_muon_param_groups).
    """
    return len(shape) >= 2 and not any(word in name.lower() for word in ADAM_NAMES)


def update_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Most that one `muon_update` has live beside gradient and momentum, its result (b N) included.

        momentum        max((b + 3) N, 2 b N)          isfinite's |g| and three masks; lerp and where
        normalised      (b + 2) N                      the quotient and its fp16 copy
        square          2 * 6 N                        X, A, B, a X, B X and their sum
        else, s = n n   2 * max(N + 7 s, 2 N + 4 s)    X, Q, R, Z, RZ and a sum's three; then Q X beside X, Q, R, Z, RZ
        result          max((b + 2) N, 2 b N)          the update in b; where it is finite

    Source: deepspeed 0.19.8, runtime/zero/muon/original_muon.py (muon_update, zeropower_via_gram_newtonschulz).
    """
    numel, short = prod(shape), min(shape[-2:])
    gram = numel // max(shape[-2:]) * short
    square = shape[-1] == shape[-2]
    iterated = 6 * numel if square else max(numel + 7 * gram, 2 * numel + 4 * gram)
    return max((itemsize + 3) * numel, 2 * itemsize * numel, HALF * iterated)


def updates_bytes(shapes: Iterable[tuple[int, ...]], itemsize: int) -> int:
    """Most that the updates of several matrices have live if all results are kept, as ZeRO-1 and 2 keep them.

        max over k of   b (N_1 + ... + N_k-1) + update_bytes(k)

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:2829 (_get_flat_partition_unpadded).
    """
    kept = most = 0
    for shape in shapes:
        most = max(most, kept + update_bytes(shape, itemsize))
        kept += itemsize * prod(shape)
    return most


def chained_updates_bytes(shapes: Iterable[tuple[int, ...]], itemsize: int) -> int:
    """Most that the updates of several matrices have live if each is applied at once: the one before is still there.

        max over k of   b N_k-1 + update_bytes(k)

    Source: deepspeed 0.19.8, runtime/zero/muon/muon_optimizer.py:57 (MuonWithAuxAdam.step: update).
    """
    before = most = 0
    for shape in shapes:
        most = max(most, before + update_bytes(shape, itemsize))
        before = itemsize * prod(shape)
    return most


def first_updates_bytes(shapes: Iterable[tuple[int, ...]], adam_numel: int) -> int:
    """Most that the first update of fp32 masters takes beside all states: a matrix's momentum is made when its update
    comes, AdamW's states when all of Muon's have; the last update is still there then.

        max(4 N_last, max over k of   4 (N_1 + ... + N_k) + 4 N_k-1 + update_bytes(k) - states)

    Source: deepspeed 0.19.8, runtime/zero/muon/muon_optimizer.py:57 (MuonWithAuxAdam.step), which
    runtime/fp16/unfused_optimizer.py:412 (initialize_optimizer_states) runs on gradients of zeros.
    """
    momentum = before = most = 0
    for shape in shapes:
        momentum += FP32 * prod(shape)
        most = max(most, momentum + before + update_bytes(shape, FP32))
        before = FP32 * prod(shape)
    return max(before, most - momentum - ADAM_STATES * adam_numel)
