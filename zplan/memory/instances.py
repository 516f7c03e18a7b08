"""Every parameter of the run by number, for the replays of the engine: size, dtype, group, place in the flat buffer."""

from __future__ import annotations

from dataclasses import dataclass

from zplan.memory.trainable import Layout


@dataclass(frozen=True, slots=True, eq=False)
class Instances:
    """Parallel tuples over all parameters of all layers, in the order of `model.parameters()`."""

    numel: tuple[int, ...]
    itemsize: tuple[int, ...]
    trainable: tuple[bool, ...]
    group: tuple[int, ...]
    offset: tuple[int, ...]
    """Elements before it in its optimizer group; 0 for frozen ones."""
    base: tuple[int, ...]
    """Number of the first parameter of each block."""
    groups: tuple[tuple[int, ...], ...]
    """Trainable parameters of each non-empty optimizer group, in order."""


_INSTANCES: dict[int, tuple[Layout, Instances]] = {}


def instances(layout: Layout) -> Instances:
    """Number the parameters; kept per layout."""
    known = _INSTANCES.get(id(layout))
    if known is not None and known[0] is layout:
        return known[1]
    made = _number(layout)
    _INSTANCES[id(layout)] = (layout, made)
    return made


def _number(layout: Layout) -> Instances:
    numel: list[int] = []
    itemsize: list[int] = []
    trainable: list[bool] = []
    group: list[int] = []
    offset: list[int] = []
    base: list[int] = []
    members: tuple[list[int], list[int]] = ([], [])
    filled = [0, 0]
    for laid in layout.blocks:
        base.append(len(numel))
        for _ in range(laid.repeat):
            for weight in laid.weights:
                offset.append(filled[weight.group] if weight.trainable else 0)
                if weight.trainable:
                    members[weight.group].append(len(numel))
                    filled[weight.group] += weight.numel
                numel.append(weight.numel)
                itemsize.append(weight.itemsize)
                trainable.append(weight.trainable)
                group.append(weight.group)
    groups = [tuple(numbers) for numbers in members]
    if not groups[0]:
        group = [0] * len(group)
    return Instances(
        numel=tuple(numel),
        itemsize=tuple(itemsize),
        trainable=tuple(trainable),
        group=tuple(group),
        offset=tuple(offset),
        base=tuple(base),
        groups=tuple(numbers for numbers in groups if numbers),
    )
