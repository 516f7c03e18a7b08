"""The course of a step: which calls the engine of the stage gets, and the bytes of activations and loss around them.

A course knows nothing of buckets, partitions or offload. It depends on the model, the micro-batch and recomputation;
what the engine holds at each of its calls depends on the ZeRO configuration alone. Two tables of bytes over the same
calls, added, are the step: `zplan.memory.replay` adds them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from zplan.memory.coordinator import Fetches
from zplan.memory.laps import Laps, laps_of
from zplan.memory.memo import Kept
from zplan.memory.owners import leaf_modules, module_parameters, unread_numbers
from zplan.memory.script import HOOKS, Call, Course, Op, Reduction, Script
from zplan.memory.timeline import Recording, external_numbers, fetch_order, output_numbers
from zplan.memory.walk import Walk

_COURSES: Kept[tuple[int, bool, bool], tuple[Recording, Course]] = Kept()
_SCRIPTS: Kept[tuple[object, ...], Script] = Kept()
_REDUCTIONS: Kept[tuple[object, ...], Reduction] = Kept()


def course(recording: Recording, *, checkpointing: bool, fetches: bool) -> Course:
    """The course of a recording; kept, because a search changes the ZeRO configuration more often than the model.

    Args:
        checkpointing: layers are recomputed in backward.
        fetches: stage 3, whose engine follows every module.
    """
    key = (id(recording), checkpointing, fetches)
    known = _COURSES.get(key)
    if known is not None and known[0] is recording:
        return known[1]
    walk = Walk(recording, checkpointing=checkpointing, fetches=fetches)
    walk.run()
    made = Course(script=_script(walk), moments=tuple(walk.moments), spans=tuple(walk.spans), others=tuple(walk.others))
    _COURSES.keep(key, (recording, made))
    return made


def _script(walk: Walk) -> Script:
    """Recordings that differ in bytes only (micro-batch, length, attention, loss) share one script."""
    recording, calls = walk.recording, tuple(walk.calls)
    key = (recording.items, walk.checkpointing, walk.fetches, calls, recording.sizes.on_cpu)
    known = _SCRIPTS.get(key)
    if known is None:
        order = tuple(fetch_order(recording, checkpointing=walk.checkpointing)) if walk.fetches else ()
        modules = module_parameters(recording) if walk.fetches else {}
        kept = tuple(number for number, (op, _) in enumerate(calls) if op not in HOOKS)
        script = Script(
            calls=calls,
            phases=tuple(walk.phases),
            reduction=_reduction(recording, calls, kept, walk.phases),
            kept=kept,
            fetches=Fetches.of(order, modules, recording.items.numel, *leaf_modules(recording)),
            external=external_numbers(recording) if walk.fetches else (),
            head=output_numbers(recording),
            root=walk.root,
            viewed=walk.viewed,
            unread=unread_numbers(recording) if walk.fetches else frozenset(),
            laps=_laps(walk, calls) if walk.fetches else (),
        )
        known = _SCRIPTS.keep(key, script)
    return known


def _laps(walk: Walk, calls: tuple[Call, ...]) -> tuple[Laps, ...]:
    """The ways through blocks of several layers, in their order."""
    found = []
    for (index, way), starts in walk.starts.items():
        block = walk.recording.blocks[index]
        laps = laps_of(
            calls, starts, (Op.GRADIENT, Op.MADE), Op.END_RECOMPUTED, parameters=way * len(block.laid.weights),
            modules=way * max(len(block.modules.numbers), 1),
            low=walk.recording.items.base[index] + walk.num_apart(index) * len(block.laid.weights),
        )  # fmt: skip
        found += [laps] if laps else []
    return tuple(found)


def _reduction(
    recording: Recording, calls: tuple[Call, ...], kept: tuple[int, ...], phases: Sequence[int]
) -> Reduction:
    """Scripts with the same gradients in the same order (stages, recomputation) share one."""
    found = Reduction(
        calls=tuple(calls[number] for number in kept), phases=tuple(bisect_left(kept, first) for first in phases),
        on_cpu=recording.sizes.on_cpu,
    )  # fmt: skip
    key = (recording.items, found.calls, found.on_cpu)
    return _REDUCTIONS.get(key) or _REDUCTIONS.keep(key, found)
