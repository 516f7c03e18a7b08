"""Tape: which tensors of a block are alive between which gradients, as autograd keeps them.

A block is written down once as the operations its forward runs. The tape counts references the way PyTorch does: a
Python local, a saved tensor and a pending gradient each hold one, and bytes are freed with the last. Played backwards
it yields the live bytes around every parameter's gradient.

Source: torch 2.13.0, torch/csrc/autograd/engine.cpp (call_function: saved variables and incoming gradients are released
after the node ran), input_buffer.cpp (can_accumulate_inplace: nobody else holds the gradient or its storage).
"""

from __future__ import annotations

from dataclasses import field

from zplan.memory.events import Event, Step
from zplan.values import dataclass


class Tensor:
    """One storage."""

    __slots__ = ("bytes", "foreign", "refs", "viewed")

    def __init__(self, num_bytes: int, *, foreign: bool = False, viewed: bool = False) -> None:
        self.bytes = num_bytes
        self.refs = 1
        self.foreign = foreign
        """Allocated outside the tape (the block's input)."""
        self.viewed = viewed
        """A gradient that is a view of what its node made: a second one is not added into it."""


class Value:
    """One node's output in the graph: its storage and, during backward, its gradient."""

    __slots__ = ("gradient", "needs_gradient", "storage")

    def __init__(self, storage: Tensor, *, needs_gradient: bool = True) -> None:
        self.storage = storage
        self.needs_gradient = needs_gradient
        self.gradient: Tensor | None = None


def kept_factors(one: Value, other: Value) -> tuple[Value, ...]:
    """What a product of two keeps: each for the gradient of the other.

    Source: torch 2.13.0, derivatives.yaml (mul, bmm, _grouped_mm: should_compute_output of the other).
    """
    return (*((one,) if other.needs_gradient else ()), *((other,) if one.needs_gradient else ()))


@dataclass(slots=True)
class Operation:
    """One autograd node."""

    out: Value
    inputs: list[tuple[Value, int | None]]
    """Each input that needs a gradient with the bytes of a fresh one; None: the incoming gradient is passed on."""
    saved: list[Tensor]
    weights: tuple[tuple[int, int], ...]
    """(weight index, gradient bytes)."""
    temporary: int
    """Bytes that the node's backward needs besides its results."""
    viewed: bool
    """Its results are views."""
    delayed: bool
    """Gradients of its weights wait for the end of the module in which they lie."""


@dataclass(slots=True)
class Division:
    """One tensor seen as several views by one node, whose backward joins their gradients (SplitBackward)."""

    outs: tuple[Value, ...]
    source: Value
    num_bytes: int


@dataclass(slots=True)
class Marker:
    """Start or end of a module's forward."""

    module: int
    enters: bool
    hands_over: bool = False


@dataclass(slots=True)
class Tape:
    """Records a forward, then plays its backward.

    Args:
        keeps: saved tensors are held (False: the first forward of a checkpointed block).
        stop_at: recomputation ends when the operation of this number has saved its inputs
            (torch.utils.checkpoint, early_stop); the graph goes on, its bytes do not exist.
        returns_held: what the block holds is returned beside its output and stays with who recomputes it, until its
            backward has run; it has a gradient then, zeros that are not counted here.
        keeps_gradient: who recomputes the block holds the gradient of its output, too, until its backward has run:
            nothing is added into it.
    """

    keeps: bool = True
    stop_at: int | None = None
    returns_held: bool = False
    keeps_gradient: bool = False
    steps: list[Step] = field(default_factory=list)
    operations: list[Operation | Division | Marker] = field(default_factory=list)
    num_operations: int = 0
    last_saving: int = 0
    unpacks_at: int = 0
    """Steps of the backward before a saved tensor is asked for the first time."""
    _net: int = 0
    _peak: int = 0
    _stopped: bool = False
    _in_leaf: bool = False
    _delays: bool = False
    _waiting: list[tuple[int, int]] = field(default_factory=list)
    _live: int = 0
    _held: list[Value] = field(default_factory=list)

    # -- bytes ---------------------------------------------------------------------------------------------------
    def _add(self, num_bytes: int) -> None:
        if self._stopped:
            return
        self._live += num_bytes
        self._net += num_bytes
        self._peak = max(self._peak, self._net)

    def touch(self, num_bytes: int) -> None:
        """A temporary that is gone again at once."""
        if self._stopped:
            return
        self._peak = max(self._peak, self._net + num_bytes)

    def flush(self) -> None:
        """Close the running stretch of bytes."""
        if self._net or self._peak:
            self.steps.append((Event.BYTES, self._net, self._peak))
            self._net = self._peak = 0

    def _emit(self, event: int, index: int) -> None:
        if self._stopped:
            return
        self.flush()
        self.steps.append((event, index, 0))

    def new(self, num_bytes: int) -> Value:
        """A fresh tensor held by one Python local."""
        self._add(num_bytes)
        return Value(Tensor(num_bytes))

    def drop(self, *values: Value) -> None:
        """Python locals going away."""
        for value in values:
            self._release(value.storage)

    def hold(self, value: Value) -> None:
        """A local of the block itself: it goes when the block returns."""
        self._held.append(value)

    def leave(self) -> None:
        """The block returns."""
        if not self.returns_held:
            self.drop(*self._held)
            self._held.clear()

    def _release(self, tensor: Tensor) -> None:
        tensor.refs -= 1
        if tensor.refs == 0:
            self._add(-tensor.bytes)

    def enter_leaf(self, module: int, *, delays: bool) -> None:
        """A module's forward begins, of whose parts ZeRO-3 sees nothing.

        Args:
            delays: its gradients are reduced together when its backward is over.

        Source: deepspeed 0.19.8, runtime/zero/stage3.py:1533 (reduce_leaf_module_grads).
        """
        self.operations.append(Marker(module, True, hands_over=delays))
        self._emit(Event.PRE_FORWARD, module)
        self._in_leaf, self._delays = True, delays

    def exit_leaf(self, module: int) -> None:
        """Its forward ends."""
        self._in_leaf = self._delays = False
        self.exit(module)

    def enter(self, module: int, x: Value | None = None) -> None:
        """A module's forward begins.

        Args:
            x: its input, if that may need no gradient: then no hook follows the module's backward.
        """
        if self._in_leaf:
            return
        if x is None or x.needs_gradient:
            self.operations.append(Marker(module, True))
        self._emit(Event.PRE_FORWARD, module)

    def visit(self, module: int) -> None:
        """A module runs on something that needs no gradient: its hooks of the forward alone."""
        if not self._in_leaf:
            self._emit(Event.PRE_FORWARD, module)
            self._emit(Event.POST_FORWARD, module)

    def exit(self, module: int, out: Value | None = None) -> None:
        """A module's forward ends.

        Args:
            out: its output, if that may need no gradient: then no hook precedes the module's backward.

        Source: deepspeed 0.19.8, runtime/zero/parameter_offload.py (PreBackwardFunctionForModule,
        PostBackwardFunctionModule: nodes of the graph, which exist where a gradient passes).
        """
        if self._in_leaf:
            return
        if out is None or out.needs_gradient:
            self.operations.append(Marker(module, False))
        self._emit(Event.POST_FORWARD, module)

    # -- forward -------------------------------------------------------------------------------------------------
    def apply(
        self,
        num_bytes: int | None,
        inputs: list[tuple[Value, int | None]],
        *,
        saves: tuple[Value, ...] = (),
        saves_output: bool = False,
        extra_saved: int = 0,
        weights: tuple[tuple[int, int], ...] = (),
        temporary: int = 0,
        forward_temporary: int = 0,
        viewed: bool = False,
    ) -> Value:
        """Run one operation; one without weights whose inputs need no gradient is none of the graph's.

        Args:
            num_bytes: of the output; None for a view of the first input.
            extra_saved: bytes that the operation keeps for backward and nobody else sees (a logsumexp).
            temporary: bytes its backward needs besides its results.
            viewed: the gradients of its inputs are views.
        """
        if inputs and not weights and not any(value.needs_gradient for value, _ in inputs):
            return self._apply_outside(num_bytes, inputs[0][0], forward_temporary + extra_saved)
        self.num_operations += 1
        saved = [value.storage for value in saves] if self.keeps else []
        for tensor in saved:
            tensor.refs += 1
        if saves or saves_output or extra_saved:
            self.last_saving = self.num_operations
            if self.stop_at == self.num_operations and not (saves_output or extra_saved):
                self._stop(saved)
        out = self._output(num_bytes, inputs)
        self.touch(forward_temporary)
        if extra_saved:
            saved += self._keep_extra(extra_saved)
        if saves_output and self.keeps:
            out.storage.refs += 1
            saved.append(out.storage)
        needing = [(value, fresh) for value, fresh in inputs if value.needs_gradient]
        self.operations.append(Operation(out, needing, saved, weights, temporary, viewed, self._delays))
        if self.stop_at == self.num_operations:
            self._stop(saved)
        return out

    @property
    def unpacks(self) -> bool:
        """What operations saved comes out of the hooks of a recomputation, and goes before their results are cast.

        Source: torch 2.13.0, csrc/autograd/engine.cpp (evaluate_function: release_variables behind validate_outputs).
        """
        return self.stop_at is not None

    def _apply_outside(self, num_bytes: int | None, source: Value, temporary: int) -> Value:
        """Run an operation that the graph knows nothing of: it keeps nothing."""
        out = self._output(num_bytes, [(source, None)])
        out.needs_gradient = False
        self.touch(temporary)
        return out

    def _keep_extra(self, num_bytes: int) -> list[Tensor]:
        """Bytes that only the operation knows; gone at once where nothing is kept."""
        self._add(num_bytes)
        extra = Tensor(num_bytes)
        if self.keeps:
            return [extra]
        self._release(extra)
        return []

    def _stop(self, saved: list[Tensor]) -> None:
        """The frames unwind: what only Python locals held is freed."""
        if self._stopped:
            return
        recorded = [tensor for item in self.operations if isinstance(item, Operation) for tensor in item.saved]
        kept = {id(tensor): tensor.bytes for tensor in (*recorded, *saved) if not tensor.foreign}
        self._add(sum(kept.values()) - self._live)
        self._stopped = True

    def resume(self) -> None:
        """After the forward: bytes count again."""
        self._stopped = False

    def _output(self, num_bytes: int | None, inputs: list[tuple[Value, int | None]]) -> Value:
        if num_bytes is not None:
            return self.new(num_bytes)
        storage = inputs[0][0].storage
        storage.refs += 1
        return Value(storage)

    def split(self, source: Value, count: int, num_bytes: int) -> tuple[Value, ...]:
        """`count` views of a tensor of `num_bytes`, as torch.split and torch.chunk give."""
        source.storage.refs += count
        outs = tuple(Value(source.storage, needs_gradient=source.needs_gradient) for _ in range(count))
        if source.needs_gradient:
            self.operations.append(Division(outs, source, num_bytes))
        return outs

    # -- backward ------------------------------------------------------------------------------------------------
    def backward(self, out: Value, gradient_bytes: int) -> None:
        """Play the recorded operations backwards from a gradient that is already live outside (not counted here)."""
        out.gradient = Tensor(gradient_bytes)
        out.gradient.refs += self.keeps_gradient
        self.unpacks_at = 0
        for value in self._held:
            value.gradient = Tensor(value.storage.bytes)
            value.gradient.refs += 1
        for operation in reversed(self.operations):
            if isinstance(operation, Marker):
                if operation.hands_over:
                    self._hand_over()
                self._emit(Event.POST_BACKWARD if operation.enters else Event.PRE_BACKWARD, operation.module)
            elif isinstance(operation, Division):
                self._join(operation)
            elif operation.out.gradient is not None:
                if operation.saved and not self.unpacks_at:
                    self.flush()
                    self.unpacks_at = len(self.steps)
                self._node(operation)
        self.drop(*self._held)
        self.flush()

    def _node(self, operation: Operation) -> None:
        incoming = operation.out.gradient
        assert incoming is not None
        operation.out.gradient = None
        results: list[Tensor] = []
        for _, num_bytes in operation.inputs:
            if num_bytes is None:
                incoming.refs += 1
                results.append(incoming)
            else:
                self._add(num_bytes)
                results.append(Tensor(num_bytes, viewed=operation.viewed))
        for _, num_bytes in operation.weights:
            self._add(num_bytes)
        self.touch(operation.temporary)
        for tensor in operation.saved:
            self._release(tensor)
        self._release(incoming)
        for (value, _), result in zip(operation.inputs, results, strict=True):
            self._accumulate(value, result)
        if operation.delayed:
            self._waiting += operation.weights
            for index, _ in operation.weights:
                self._emit(Event.MADE, index)
            return
        for index, num_bytes in operation.weights:
            self._add(-num_bytes)
            self._emit(Event.GRADIENT, index)

    def _hand_over(self) -> None:
        """In the order of the parameters."""
        for index, num_bytes in sorted(self._waiting):
            self._add(-num_bytes)
            self._emit(Event.GRADIENT, index)
        self._waiting.clear()

    def _join(self, division: Division) -> None:
        self._add(division.num_bytes)
        for out in division.outs:
            if out.gradient is not None:
                self._release(out.gradient)
                out.gradient = None
        self._accumulate(division.source, Tensor(division.num_bytes))

    def _accumulate(self, value: Value, result: Tensor) -> None:
        known = value.gradient
        if known is None:
            value.gradient = result
        elif known.refs == 1 and not known.viewed:
            self._release(result)
        else:
            self._add(known.bytes)
            value.gradient = Tensor(known.bytes)
            self._release(known)
            self._release(result)
