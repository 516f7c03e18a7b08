"""SuperOffload: the Adam of ZeRO-3's offloaded states runs in a process beside each rank.

Legend: S offloaded trainable elements of one rank.
Source: deepspeed 0.19.8, runtime/superoffload/superoffload_utils.py, superoffload_stage3.py. The process gets its
tensors through torch.multiprocessing, which moves a tensor that is sent into shared memory, once and for good.
"""

from __future__ import annotations

from zplan.memory.terms import Phase, Term
from zplan.zero_config import Choice, ZeroConfig

FP32 = 4
STEPS: tuple[Phase, ...] = ("forward", "backward", "step", "save")
STEADY: tuple[Phase, ...] = ("init", *STEPS)


def super_offload_terms(
    zero: ZeroConfig, *, ranks: int, there: int, largest_group: int, process_bytes: int
) -> tuple[list[Term], int]:
    """What the processes of a node hold beside the states themselves, and how much of it is pinned.

        process    the libraries once more, per rank
        scratch    4 * largest sub-group: a gradient is copied there before Adam reads it
        left       4 S with pin_memory: gradients move into shared memory at the first step, and the pinned block that
                   they leave stays with torch's pinned allocator, which gives nothing back

    Args:
        there: S, less what a ratio leaves on the GPU.
        largest_group: elements of one rank's largest sub-group, those on the GPU included.
        process_bytes: of a process that has imported the libraries.

    Source: deepspeed 0.19.8, superoffload_utils.py:37 (_allocate_worker_grad_buffer), :254 (async_step);
    torch 2.13.0, multiprocessing/reductions.py (reduce_storage), ATen/core/CachingHostAllocator.h (maybe_cache_block).
    """
    if not zero.super_offloads:
        return [], 0
    source = "deepspeed 0.19.8, runtime/superoffload/superoffload_utils.py"
    pins = zero.offload_optimizer.pin_memory
    scratch, left = ranks * FP32 * largest_group, ranks * FP32 * there if pins else 0
    terms = [
        _term("optimizer processes", ranks * process_bytes, STEADY, f"{ranks} ranks x {process_bytes}", source),
        _term("offloaded gradients' copy", scratch, STEADY, f"{ranks} ranks x 4 x {largest_group}", source),
        _term("offloaded gradients' pinned block, left", left, STEPS, f"{ranks} ranks x 4 x {there}", source),
    ]
    return [term for term in terms if term.bytes], (scratch + left if pins else 0)


def shared_memory_bytes(zero: ZeroConfig, *, ranks: int, there: int) -> int:
    """Master weights and fp32 gradients of a node's ranks, which lie in /dev/shm from the first step on.

    ranks * (4 + 4) S
    """
    return ranks * 2 * FP32 * there if zero.super_offloads else 0


def contexts_on_first_gpu(choice: Choice, ranks: int) -> int:
    """CUDA contexts on a node's first GPU: its rank's own, and one of every process that pins its scratch.

    A process that never chose a device pins through the first one that it sees; the launchers show every rank all GPUs.

    Source: deepspeed 0.19.8, superoffload_utils.py:37 (pin_empty); torch 2.13.0, ATen/cuda/CachingHostAllocator
    (cudaHostAlloc needs a context; the current device is 0).
    """
    zero = choice.zero
    return 1 + ranks if zero.super_offloads and zero.offload_optimizer.pin_memory else 1


def _term(name: str, num_bytes: int, phases: tuple[Phase, ...], formula: str, source: str) -> Term:
    return Term(name=name, bytes=num_bytes, phases=phases, formula=formula, source=source)
