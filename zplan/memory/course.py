"""The course of a step: which calls the engine of the stage gets, and the bytes of activations and loss around them.

A course knows nothing of buckets, partitions or offload. It depends on the model, the micro-batch and recomputation;
what the engine holds at each of its calls depends on the ZeRO configuration alone. Two tables of bytes over the same
calls, added, are the step: `zplan.memory.replay` adds them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from zplan.memory.coordinator import Fetches
from zplan.memory.instances import Instances
from zplan.memory.meter import Kind, Meter
from zplan.memory.tape import Event, Step
from zplan.memory.timeline import (
    Recorded,
    Recording,
    external_numbers,
    fetch_order,
    leaf_modules,
    module_bases,
    module_parameters,
    output_numbers,
    recomputation,
    root_module,
    viewed_numbers,
)

StepPhase = Literal["forward", "backward", "step"]
STEP_PHASES: tuple[StepPhase, ...] = ("forward", "backward", "step")
Kinds = tuple[int, ...]
"""Bytes by Kind."""


class Op(IntEnum):
    """What the engine is asked to do."""

    NOTHING = 0
    """End of a phase: closes the last stretch of bytes."""
    BEGIN = 1
    PRE_MODULE = 2
    POST_MODULE = 3
    GRADIENT = 4
    END_BACKWARD = 5
    STEP = 6
    RECOMPUTED_MODULE = 7
    """PRE_MODULE within a reentrant recomputation."""
    END_RECOMPUTED = 8
    """The layer that was recomputed has had its backward."""
    READ_HEAD = 9
    """The loss reads the head's weight, or is done with it."""
    KEPT_MODULE = 10
    """POST_MODULE within a non-reentrant recomputation."""
    VIEWED_MODULE = 12
    """POST_MODULE of experts whose weights the graph keeps a view of."""
    END_STEP = 11
    """The update is done."""


Call = tuple[int, int]
"""(Op, number of the module or of the parameter)."""


HOOKS = frozenset(
    {
        Op.PRE_MODULE, Op.POST_MODULE, Op.RECOMPUTED_MODULE, Op.END_RECOMPUTED, Op.READ_HEAD, Op.KEPT_MODULE,
        Op.VIEWED_MODULE, Op.END_STEP,
    }
)  # fmt: skip
"""Calls that gather and release parameters; no gradient comes or goes in them."""


@dataclass(frozen=True, eq=False)
class Reduction:
    """The calls of a step without the hooks of its modules. One object per distinct sequence."""

    calls: tuple[Call, ...]
    phases: tuple[int, ...]
    """Number of the first call of each phase."""


@dataclass(frozen=True, eq=False)
class Script:
    """The calls of a step and what a ZeRO-3 engine must know to follow them. One object per distinct script."""

    calls: tuple[Call, ...]
    """Of the whole step, phase after phase."""
    phases: tuple[int, ...]
    """Number of the first call of each phase."""
    reduction: Reduction
    kept: tuple[int, ...]
    """Number of each call of the reduction among all calls."""
    fetches: Fetches
    """Modules in the order in which a step fetches them; empty below stage 3."""
    external: tuple[int, ...]
    """Parameters that DeepSpeed registers as external; they are not released."""
    head: tuple[int, ...]
    """Parameters of the output projection."""
    viewed: frozenset[int] = frozenset()
    """Stacked weights of experts that are used as they are: their product keeps a view of the gathered tensor."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Course:
    """A script with the bytes outside the engine. Each call has two moments: the largest since the call before it, and
    what is live while it runs. Every table of bytes over calls lists moments in this order."""

    script: Script
    moments: tuple[int, ...]
    kinds: tuple[Kinds, ...]


class _Walk:
    """Goes through a recording and notes every call.

    Args:
        fetches: modules gather their parameters (stage 3); otherwise their calls are left out.
    """

    def __init__(self, recording: Recording, *, checkpointing: bool, fetches: bool) -> None:
        self.recording, self.checkpointing, self.fetches = recording, checkpointing, fetches
        self.meter = Meter()
        self.module_base = module_bases(recording)
        self.root = root_module(recording)
        self.calls: list[Call] = []
        self.moments: list[int] = []
        self.kinds: list[Kinds] = []
        self.phases = [0]
        self.returned = 0
        owned = module_parameters(recording) if fetches else {}
        self.viewed = viewed_numbers(recording) if fetches else frozenset()
        self.viewing = {module for module, numbers in owned.items() if not self.viewed.isdisjoint(numbers)}

    def run(self) -> None:
        """One micro-step and the update."""
        meter, r = self.meter, self.recording
        self.call(Op.BEGIN)
        meter.add(Kind.ACTIVATIONS, r.arguments_bytes)
        self.pre(self.root)
        self._forward()
        self._loss_forward()
        self._next_phase()
        self._loss_backward()
        self._backward()
        self.call(Op.END_BACKWARD)
        meter.add(Kind.ACTIVATIONS, self._input_bytes() - meter.by_kind[Kind.ACTIVATIONS])
        self._next_phase()
        self.call(Op.STEP)
        if self.fetches:
            self.call(Op.END_STEP)
        self.call(Op.NOTHING)

    def _input_bytes(self) -> int:
        """Adapters under checkpointing make the embedding's output a leaf: it and its gradient stay with the loss,
        which lives until the engine has stepped; so do mask and positions, arguments of the checkpointed layers.

        Source: transformers 5.23.0, modeling_utils.py (enable_input_require_grads); accelerate 1.15.0,
        utils/deepspeed.py (DeepSpeedEngineWrapper.backward: backward and step in one call).
        """
        r = self.recording
        arguments = r.arguments_bytes if self.fetches else 0
        return 2 * r.hidden_bytes + arguments if r.reentrant and self.checkpointing else 0

    def call(self, op: Op, number: int = 0) -> None:
        """Note the bytes up to here; the engine acts here."""
        meter, before = self.meter, self.meter.peak_by_kind
        self.calls.append((int(op), number))
        self.moments += (meter.peak_bytes, meter.total_bytes)
        meter.mark()
        self.kinds += (before, meter.peak_by_kind)

    def pre(self, module: int) -> None:
        if self.fetches:
            self.call(Op.PRE_MODULE, module)

    def post(self, module: int) -> None:
        if self.fetches:
            self.call(Op.POST_MODULE, module)

    def _next_phase(self) -> None:
        self.call(Op.NOTHING)
        self.phases.append(len(self.calls))

    # -- forward -------------------------------------------------------------------------------------------------
    def _forward(self) -> None:
        for index, block in enumerate(self.recording.blocks):
            if block.tape is None:
                if block.laid.block.role == "embedding":
                    self._embed(index)
                continue
            steps = block.tape.forward_without_saving if self._is_checkpointed(block) else block.tape.forward
            for layer in range(block.laid.repeat):
                self._play(steps, index, layer, loses=self._is_checkpointed(block))
                if self._is_checkpointed(block):
                    self._return_scores()
        self.meter.add(Kind.ACTIVATIONS, -self.returned)
        self.returned = 0

    def _return_scores(self) -> None:
        """The layer's result with its attention's weights stays with the model's loop until the next layer's is there.

        Source: transformers 5.23.0, models/falcon/modeling_falcon.py (FalconModel.forward: outputs = block(...)).
        """
        self.meter.add(Kind.ACTIVATIONS, self.recording.returned_bytes - self.returned)
        self.returned = self.recording.returned_bytes

    def _is_checkpointed(self, block: Recorded) -> bool:
        return self.checkpointing and block.laid.block.role in ("layer", "encoder_layer")

    def _embed(self, index: int) -> None:
        self.pre(self.module_base[index])
        self.meter.add(Kind.ACTIVATIONS, self.recording.hidden_bytes)
        self.post(self.module_base[index])

    def _loss_forward(self) -> None:
        loss = self.recording.loss
        if self.recording.runs_head:
            self.pre(self.root + 1)
            self.meter.touch(Kind.LOSS, loss.logits)
            self.post(self.root + 1)
        elif self.fetches:
            self.call(Op.READ_HEAD)
        self.meter.touch(Kind.LOSS, loss.forward)
        self.meter.add(Kind.LOSS, loss.kept)
        if self.fetches and not self.recording.runs_head:
            self.call(Op.READ_HEAD)
        self.post(self.root)
        if not loss.reads_hidden:
            self.meter.add(Kind.ACTIVATIONS, -self.recording.hidden_bytes)

    # -- backward ------------------------------------------------------------------------------------------------
    def _loss_backward(self) -> None:
        meter, r = self.meter, self.recording
        self.pre(self.root)
        meter.touch(Kind.LOSS, r.loss.backward)
        meter.add(Kind.LOSS, -r.loss.kept)
        if r.runs_head:
            self.pre(self.root + 1)
            meter.touch(Kind.LOSS, r.loss.head)
        if r.head_trains and not r.head_is_embedding:
            for number in output_numbers(r):
                self.call(Op.GRADIENT, number)
        elif r.head_trains:
            meter.add(Kind.GRADIENTS, r.head_bytes)
        meter.touch(Kind.LOSS, r.loss.hidden_gradient + r.loss.spread)
        meter.add(Kind.ACTIVATIONS, r.loss.hidden_gradient - r.hidden_bytes * r.loss.reads_hidden)
        if r.runs_head:
            self.post(self.root + 1)

    def _backward(self) -> None:
        meter, r = self.meter, self.recording
        for index in reversed(range(len(r.blocks))):
            block = r.blocks[index]
            if block.tape is None:
                continue
            checkpointed = self._is_checkpointed(block)
            for layer in reversed(range(block.laid.repeat)):
                if checkpointed:
                    reentrant = r.reentrant and self.fetches
                    again, back = recomputation(block.tape, reentrant=reentrant)
                    # autograd makes a zero gradient for the returned weights, and holds the recomputed ones
                    returned = r.returned_bytes if reentrant else 0
                    meter.add(Kind.ACTIVATIONS, returned)
                    self._play(again, index, layer, runs_again=True)
                    meter.add(Kind.ACTIVATIONS, returned)
                    self._play(back, index, layer)
                    meter.add(Kind.ACTIVATIONS, -2 * returned)
                    if reentrant:
                        self.call(Op.END_RECOMPUTED)
                    extra = r.hidden_bytes if reentrant else 0
                    meter.add(Kind.ACTIVATIONS, -r.hidden_bytes - extra)
                else:
                    self._play(block.tape.backward, index, layer)
        meter.add(Kind.ACTIVATIONS, self._input_bytes() // 2)
        self._embedding_backward()
        self.post(self.root)

    def _embedding_backward(self) -> None:
        r = self.recording
        for index, block in enumerate(r.blocks):
            if block.laid.block.role != "embedding":
                continue
            self.pre(self.module_base[index])
            for local, weight in enumerate(block.laid.weights):
                if not weight.trainable:
                    continue
                if r.head_is_embedding and local == 0:
                    # the head's gradient, the embedding's and their sum
                    self.meter.touch(Kind.GRADIENTS, 2 * weight.numel * weight.itemsize)
                    self.meter.add(Kind.GRADIENTS, -r.head_bytes)
                self.call(Op.GRADIENT, r.items.base[index] + local)
            self.post(self.module_base[index])

    def _play(
        self, steps: Sequence[Step], index: int, layer: int, *, runs_again: bool = False, loses: bool = False
    ) -> None:
        """Play a block's steps.

        Args:
            runs_again: a recomputation.
            loses: the forward of a checkpointed block, which keeps nothing.
        """
        meter, reentrant = self.meter, self.recording.reentrant
        block = self.recording.blocks[index]
        weights = self.recording.items.base[index] + layer * len(block.laid.weights)
        modules = self.module_base[index] + layer * max(len(block.modules.numbers), 1)
        for event, a, b in steps:
            if event == Event.BYTES:
                meter.touch(Kind.ACTIVATIONS, b)
                meter.add(Kind.ACTIVATIONS, a)
            elif event == Event.GRADIENT:
                self.call(Op.GRADIENT, weights + a)
            elif event == Event.PRE_FORWARD and runs_again and reentrant and self.fetches:
                self.call(Op.RECOMPUTED_MODULE, modules + a)
            elif event == Event.POST_FORWARD and runs_again and not reentrant and self.fetches:
                self.call(Op.KEPT_MODULE, modules + a)
            elif event == Event.POST_FORWARD and self.fetches and modules + a in self.viewing and not loses:
                self.call(Op.VIEWED_MODULE, modules + a)
            elif event in (Event.PRE_FORWARD, Event.PRE_BACKWARD):
                self.pre(modules + a)
            else:
                self.post(modules + a)


_COURSES: dict[tuple[int, bool, bool], tuple[Recording, Course]] = {}
_SCRIPTS: dict[tuple[object, ...], Script] = {}
_REDUCTIONS: dict[tuple[object, ...], Reduction] = {}
MOST_KEPT = 1024


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
    walk = _Walk(recording, checkpointing=checkpointing, fetches=fetches)
    walk.run()
    made = Course(script=_script(walk), moments=tuple(walk.moments), kinds=tuple(walk.kinds))
    if len(_COURSES) >= MOST_KEPT:
        _COURSES.clear()
    _COURSES[key] = (recording, made)
    return made


def _script(walk: _Walk) -> Script:
    """Recordings that differ in bytes only (micro-batch, length, attention, loss) share one script."""
    recording, calls = walk.recording, tuple(walk.calls)
    order = tuple(fetch_order(recording, checkpointing=walk.checkpointing)) if walk.fetches else ()
    key = (recording.items, order, calls)
    known = _SCRIPTS.get(key)
    if known is None:
        if len(_SCRIPTS) >= MOST_KEPT:
            _SCRIPTS.clear()
        modules = module_parameters(recording) if walk.fetches else {}
        kept = tuple(number for number, (op, _) in enumerate(calls) if op not in HOOKS)
        known = _SCRIPTS[key] = Script(
            calls=calls,
            phases=tuple(walk.phases),
            reduction=_reduction(recording.items, calls, kept, walk.phases),
            kept=kept,
            fetches=Fetches.of(order, modules, recording.items.numel, *leaf_modules(recording)),
            external=external_numbers(recording) if walk.fetches else (),
            head=output_numbers(recording),
            viewed=walk.viewed,
        )
    return known


def _reduction(items: Instances, calls: tuple[Call, ...], kept: tuple[int, ...], phases: Sequence[int]) -> Reduction:
    """Scripts with the same gradients in the same order (stages, recomputation) share one."""
    found = Reduction(
        calls=tuple(calls[number] for number in kept), phases=tuple(bisect_left(kept, first) for first in phases)
    )
    key = (items, found.calls)
    if len(_REDUCTIONS) >= MOST_KEPT:
        _REDUCTIONS.clear()
    return _REDUCTIONS.setdefault(key, found)
