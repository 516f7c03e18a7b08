"""Every parameter of the run by number, for the replays of the engine: size, dtype, group, place in the flat buffer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from zplan.memory.muon import is_updated_by_muon
from zplan.memory.trainable import Layout, Weight
from zplan.values import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Instances:
    """Parallel tuples over all parameters of all layers, in the order of `model.parameters()`."""

    numel: tuple[int, ...]
    """Of a quantised weight as it is packed."""
    itemsize: tuple[int, ...]
    trainable: tuple[bool, ...]
    group: tuple[int, ...]
    base: tuple[int, ...]
    """Number of the first parameter of each block."""
    groups: tuple[tuple[int, ...], ...]
    """Trainable parameters of each non-empty optimizer group, in order: Muon sorts its own by shape, largest first,
    where it sees shapes (below stage 3; original_muon.py:380, MuonWithAuxAdam)."""
    longest: tuple[int, ...] = ()
    """The larger of the first two dimensions of each; 0 for a vector."""
    packed: frozenset[int] = frozenset()
    """Quantised weights."""
    muon: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the parameters of the first group where that is Muon's, in its order."""
    in_fp16: bool = False


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
    weights: list[Weight] = []
    base: list[int] = []
    for laid in layout.blocks:
        base.append(len(weights))
        weights.extend(laid.weights * laid.repeat)
    group = [_group(layout, weight) for weight in weights]
    members = [[n for n, weight in enumerate(weights) if weight.trainable and group[n] == one] for one in (0, 1)]
    if layout.muon:
        members[0].sort(key=lambda number: weights[number].shape, reverse=True)
    return Instances(
        numel=tuple(weight.held[0] for weight in weights),
        itemsize=tuple(weight.held[1] for weight in weights),
        trainable=tuple(weight.trainable for weight in weights),
        group=tuple(group if members[0] else [0] * len(group)),
        base=tuple(base),
        groups=tuple(tuple(numbers) for numbers in members if numbers),
        longest=tuple(max(weight.shape[:2]) if len(weight.shape) > 1 else 0 for weight in weights),
        packed=frozenset(number for number, weight in enumerate(weights) if weight.packed),
        muon={number: weights[number].shape for number in members[0]} if layout.muon else {},
        in_fp16=layout.in_fp16,
    )


def _group(layout: Layout, weight: Weight) -> int:
    """0: weight decay, 1: none; with Muon 0: its own, 1: AdamW's."""
    if layout.muon:
        return 0 if is_updated_by_muon(weight.name, weight.shape) else 1
    return weight.group
