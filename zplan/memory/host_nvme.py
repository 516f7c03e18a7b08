"""What stays in a node's host memory when optimizer states or parameters are on the NVMe, and bytes on the drive.

Legend: L ranks of the node, b bytes of the training dtype, S offloaded trainable elements of one rank.
"""

from __future__ import annotations

from zplan.memory.instances import instances
from zplan.memory.on_drive import aligned, on_host
from zplan.memory.states import FP32, offloaded_state_bytes
from zplan.memory.sub_groups import is_swapped, sub_groups
from zplan.memory.terms import Phase, Term
from zplan.memory.trainable import Layout
from zplan.recipe import Recipe
from zplan.zero_config import Choice

STEPS: tuple[Phase, ...] = ("forward", "backward", "step", "save")
STEADY: tuple[Phase, ...] = ("init", *STEPS)
STATE_BUFFERS, SWAP_BUFFERS = "NVMe swap buffers", "parameter swap buffers"
WRITE_BUFFERS = "buffers of updated parameters"
LOCKED = (STATE_BUFFERS, SWAP_BUFFERS, WRITE_BUFFERS)
"""Terms that are allocated with mlock (swap_tensor/utils.py, partitioned_param_swapper.py: new_cpu_locked_tensor)."""


def host_term(name: str, num_bytes: int, phases: tuple[Phase, ...], formula: str, source: str) -> Term:
    """Of all ranks of the node."""
    return Term(name=name, bytes=num_bytes, phases=phases, formula=formula, source=source)


def optimizer_on_nvme(
    layout: Layout, recipe: Recipe, choice: Choice, ranks: int, numel: int, low: int, disk: int
) -> tuple[list[Term], int, int]:
    """What stays in host memory when master weights, states and fp32 gradients are on the NVMe.

        buffers:    ranks * buffer_count * 4 * largest sub-group
        gradients:  ranks * b S
        small sub-groups, below 1 MiB: masters and gradients, and their states from the first step
        first step: ranks * states of the largest swapped sub-group, made by the optimizer before they are swapped out
        initialize: ranks * max(4 * largest sub-group - b S, b S if pinned): its masters before they are swapped out, or
                    the gradients' zeros before they are pinned

    The buffers hold a whole sub-group, of one parameter at least: they can be larger than the states they replace.

    Source: deepspeed 0.19.8, stage3.py:791 (grad_partitions_flat_buffer), :847 (largest_numel), :1118
    (_swappable_optimizer_subgroup); swap_tensor/optimizer_utils.py (SwapBufferManager, is_swappable_tensor).
    """
    config, world = choice.zero.offload_optimizer, choice.batch.zero_ranks
    groups = sub_groups(instances(layout), world, choice.zero.sub_group_size).numel
    largest, small = max(groups), sum(size for size in groups if not is_swapped(size))
    swap = ranks * config.buffer_count * FP32 * largest
    source = "deepspeed 0.19.8, runtime/zero/stage3.py, swap_tensor/optimizer_utils.py"
    formula = f"{ranks} ranks x {config.buffer_count} buffers x 4 x {largest} (the largest sub-group)"
    swapped = largest if is_swapped(largest) else 0
    states = ranks * offloaded_state_bytes(recipe.optimizer, small)
    firsts = ranks * offloaded_state_bytes(recipe.optimizer, swapped) if swapped else 0
    made = max(FP32 * largest - low, low if config.pin_memory else 0)
    on_largest = f"{recipe.optimizer} on {swapped} elements a rank, first step"
    terms = [
        host_term(STATE_BUFFERS, swap, STEADY, formula, source),
        host_term("offloaded gradients", ranks * low, STEADY, f"{ranks} ranks x b S", source),
        host_term("small sub-groups", ranks * 2 * FP32 * small, STEADY, f"{ranks} ranks x (4 + 4) x {small}", source),
        host_term(
            "states of small sub-groups", states, STEPS, f"{recipe.optimizer} on {small} elements a rank", source
        ),
        host_term(
            "master weights, then gradients to be pinned", ranks * made, ("init",), f"{ranks} ranks x {made}", source
        ),
        host_term("states before they are swapped out", firsts, ("step",), on_largest, source),
    ]
    return terms, swap + (ranks * low if config.pin_memory else 0), ranks * disk


def parameters_on_nvme(layout: Layout, choice: Choice, ranks: int, b: int) -> tuple[list[Term], int, int]:
    """What stays in host memory of parameters on the NVMe.

        buffers:    ranks * buffer_count * buffer_size * b
        kept:       ranks * min(trained, max_in_cpu) * b; frozen ones are never moved back
        small:      ranks * partitions below 1 MiB
        written:    ranks * whole parameters of the largest sub-group * b, unless all that trains is kept

    Source: deepspeed 0.19.8, swap_tensor/partitioned_param_swapper.py:131 (buffers), :393
    (reserve_partitioned_swap_space), and as on_drive.py.
    """
    config, source = choice.zero.offload_param, "deepspeed 0.19.8, swap_tensor/partitioned_param_swapper.py"
    there, buffer = on_host(instances(layout), choice), aligned(config.buffer_size, b)
    swap, update = ranks * config.buffer_count * buffer * b, ranks * there.update_numel * b
    kept, small = ranks * there.moved_numel * b, ranks * there.small_bytes
    made = f"{ranks} x {config.buffer_count} x {buffer} x {b}"
    of_engine = "deepspeed 0.19.8, runtime/zero/stage3.py"
    terms = [
        host_term(SWAP_BUFFERS, swap, STEADY, made, source),
        host_term(
            WRITE_BUFFERS, update, STEADY, f"{ranks} x {there.update_numel} x {b} (a whole sub-group)", of_engine
        ),
        host_term("trained parameters kept on the host", kept, STEADY, "at most max_in_cpu elements a rank", of_engine),
        host_term("partitions below 1 MiB", small, ("load", *STEADY), f"{ranks} x {there.small_bytes}", source),
        host_term("second copy while pinning", swap, ("load",), "partitioned_param_swapper.py:131", source),
    ]
    return terms, swap + update + kept + (small if config.pin_memory else 0), ranks * there.written_bytes
