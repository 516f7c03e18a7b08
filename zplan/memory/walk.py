"""Walk: goes through a recording of a step and notes every call and the bytes of activations and loss around it."""

from __future__ import annotations

from collections.abc import Sequence

from zplan.memory.events import Event, Step
from zplan.memory.meter import Kind, Meter
from zplan.memory.owners import module_parameters, viewed_numbers
from zplan.memory.script import Call, Kinds, Op
from zplan.memory.strip import Strip, strip
from zplan.memory.timeline import (
    INNER,
    Recorded,
    Recording,
    embedding_has_backward,
    entered_modules,
    local_embedding_bytes,
    module_bases,
    output_numbers,
    plain_steps,
    recomputation,
    root_module,
    rotary_modules,
)


class Walk:
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
        self.spans: list[int] = []
        self.others: list[Kinds] = []
        self.phases = [0]
        self.starts: dict[tuple[int, int], list[int]] = {}
        self.strips: dict[tuple[int, int, bool, bool], Strip] = {}
        self.returned = self.locals = 0
        owned = module_parameters(recording) if fetches else {}
        self.viewed = viewed_numbers(recording, checkpointing=checkpointing) if fetches else frozenset()
        self.viewing = {module for module, numbers in owned.items() if not self.viewed.isdisjoint(numbers)}

    def run(self) -> None:
        """One micro-step and the update."""
        meter, r = self.meter, self.recording
        self.call(Op.BEGIN)
        meter.add(Kind.ACTIVATIONS, r.arguments_bytes)
        self._enter_model()
        self.pre(self.root + INNER)
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

    def _enter_model(self) -> None:
        for module in entered_modules(self.recording):
            self.pre(module)

    def _input_bytes(self) -> int:
        """Adapters under checkpointing make the embedding's output a leaf: it and its gradient stay with the loss,
        which lives until the engine has stepped; so do mask and positions, arguments of the checkpointed layers. Where
        the embedding itself trains, its output is no leaf.

        Source: transformers 5.23.0, modeling_utils.py (enable_input_require_grads); accelerate 1.15.0,
        utils/deepspeed.py (DeepSpeedEngineWrapper.backward: backward and step in one call).
        """
        r = self.recording
        arguments = r.arguments_bytes if self.fetches else 0
        leaf = 0 if r.embedding_trains else 2 * r.hidden_bytes
        return leaf + arguments if r.reentrant and self.checkpointing else 0

    def call(self, op: int, number: int = 0) -> None:
        """Note the bytes up to here; the engine acts here."""
        meter = self.meter
        self.calls.append((op, number))
        self._note(meter.peak_bytes, meter.peak_by_kind)
        meter.mark()
        self._note(meter.total_bytes, meter.peak_by_kind)

    def _note(self, num_bytes: int, kinds: Kinds) -> None:
        if not self.others or self.others[-1] != kinds[1:]:
            self.spans.append(len(self.moments))
            self.others.append(kinds[1:])
        self.moments.append(num_bytes)

    def pre(self, module: int) -> None:
        if self.fetches:
            self.call(Op.PRE_MODULE, module)

    def post(self, module: int) -> None:
        if self.fetches:
            self.call(Op.POST_MODULE, module)

    def _next_phase(self) -> None:
        self.call(Op.NOTHING)
        self.phases.append(len(self.calls))

    def _begin_lap(self, index: int, way: int, layer: int) -> None:
        """A layer of a block begins, on the way forward (1) or back (-1); one that runs apart is in no lap."""
        if layer < self.num_apart(index):
            return
        self.starts.setdefault((index, way), []).append(len(self.calls))

    # -- forward -------------------------------------------------------------------------------------------------
    def _forward(self) -> None:
        for index, block in enumerate(self.recording.blocks):
            if block.tape is None:
                if block.laid.block.role == "embedding":
                    self._embed(index)
                continue
            for layer in range(block.laid.repeat):
                self._begin_lap(index, 1, layer)
                if self._is_checkpointed(block):
                    self._play(block.tape.forward_without_saving, index, layer, loses=True)
                    self._return_scores()
                else:
                    self._play(plain_steps(block, layer)[0], index, layer)
                    if layer == 0:
                        self._keep_embedded(block)
        self.meter.add(Kind.ACTIVATIONS, -self.returned - self.locals)
        self.returned = self.locals = 0
        for index, block in enumerate(self.recording.blocks):
            if block.late:
                self._play(block.late.forward, index, 0)

    def _keep_embedded(self, block: Recorded) -> None:
        """The model's own loop does not let the first layer's input go."""
        embedded = local_embedding_bytes(self.recording, block)
        self.locals += embedded
        self.meter.add(Kind.ACTIVATIONS, embedded)

    def num_apart(self, index: int) -> int:
        """How many of a block's layers run other steps than the rest."""
        return int(not self.checkpointing and self.recording.blocks[index].first is not None)

    def _return_scores(self) -> None:
        """The layer's result with its attention's weights stays with the model's loop until the next layer's is there.

        Source: transformers 5.23.0, models/falcon/modeling_falcon.py (FalconModel.forward: outputs = block(...)).
        """
        self.meter.add(Kind.ACTIVATIONS, self.recording.returned_bytes - self.returned)
        self.returned = self.recording.returned_bytes

    def _is_checkpointed(self, block: Recorded) -> bool:
        return self.checkpointing and block.laid.block.role in ("layer", "encoder_layer")

    def _embed(self, index: int) -> None:
        """Tables one by one, their sum, dropout or a norm. The first table's result is a local of the model until its
        forward ends; with adapters under checkpointing it is the leaf that keeps a gradient."""
        meter, r = self.meter, self.recording
        modules = r.blocks[index].embeddings
        for number, (_, kind) in enumerate(modules):
            self.pre(self.module_base[index] + number)
            meter.touch(Kind.ACTIVATIONS, r.hidden_bytes * (2 if number and kind == "table" else 1))
            meter.add(Kind.ACTIVATIONS, 0 if number else r.hidden_bytes)
            self.post(self.module_base[index] + number)
        for module in rotary_modules(r):
            self.pre(module)  # its post does nothing: it owns nothing
        meter.add(Kind.ACTIVATIONS, r.embedded_bytes)
        if r.adds_to_embedding:
            is_leaf = r.reentrant and self.checkpointing and not r.embedding_trains
            self.locals = 0 if is_leaf else r.hidden_bytes
            meter.add(Kind.ACTIVATIONS, r.hidden_bytes)

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
        self._enter_model()
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
        self.pre(self.root + INNER)

    def _backward(self) -> None:
        meter, r = self.meter, self.recording
        for index, block in enumerate(r.blocks):
            if block.late:
                self._play(block.late.backward, index, 0)
        for index in reversed(range(len(r.blocks))):
            block = r.blocks[index]
            if block.tape is None:
                continue
            checkpointed = self._is_checkpointed(block)
            for layer in reversed(range(block.laid.repeat)):
                self._begin_lap(index, -1, layer)
                if checkpointed:
                    reentrant = r.reentrant and self.fetches
                    again, back = recomputation(block.tape, reentrant=reentrant)
                    returned = r.returned_bytes if reentrant else 0  # autograd's zero gradient for the weights
                    meter.add(Kind.ACTIVATIONS, returned)
                    self._play(again, index, layer, runs_again=True)
                    self._play(back, index, layer)
                    meter.add(Kind.ACTIVATIONS, -returned)
                    if reentrant:
                        self.call(Op.END_RECOMPUTED)
                    # its input; the recomputed output and its gradient
                    meter.add(Kind.ACTIVATIONS, -r.hidden_bytes * (3 if reentrant else 1))
                else:
                    self._play(plain_steps(block, layer)[1], index, layer)
        meter.add(Kind.ACTIVATIONS, self._input_bytes() // 2)
        if embedding_has_backward(r, checkpointing=self.checkpointing):
            self._embedding_backward()

    def _embedding_backward(self) -> None:
        """Neither the model nor its tables are ever released by a hook, since their inputs, numbers, have no gradient:
        they are given back after the last reduction.

        Source: deepspeed 0.19.8, runtime/zero/stage3.py (release_backward_leftovers follows the epilogue).
        """
        r = self.recording
        for index, block in enumerate(r.blocks):
            if block.laid.block.role != "embedding":
                continue
            for number, (module, kind) in reversed(tuple(enumerate(block.embeddings))):
                self.pre(self.module_base[index] + number)
                self._embedding_gradients(index, module)
                if kind != "table":
                    self.post(self.module_base[index] + number)

    def _embedding_gradients(self, index: int, module: str) -> None:
        r = self.recording
        for local, weight in enumerate(r.blocks[index].laid.weights):
            if weight.trainable and weight.module == module:
                if r.head_is_embedding and local == 0:
                    # the head's gradient and the embedding's, which is added into it unless it is a view
                    viewed = r.runs_head and not self.fetches
                    self.meter.touch(Kind.GRADIENTS, (1 + viewed) * weight.numel * weight.itemsize)
                    self.meter.add(Kind.GRADIENTS, -r.head_bytes)
                self.call(Op.GRADIENT, r.items.base[index] + local)

    def _play(
        self, steps: Sequence[Step], index: int, layer: int, *, runs_again: bool = False, loses: bool = False
    ) -> None:
        """Play a block's steps.

        Args:
            runs_again: a recomputation.
            loses: the forward of a checkpointed block, which keeps nothing.
        """
        meter, block = self.meter, self.recording.blocks[index]
        played = self._strip(steps, index, layer, runs_again=runs_again, loses=loses)
        meter.stretch(Kind.ACTIVATIONS, *played.before)
        if not played.calls:
            return
        weights = self.recording.items.base[index] + layer * len(block.laid.weights)
        modules = self.module_base[index] + layer * max(len(block.modules.numbers), 1)
        first, *calls = [(op, (weights, modules)[which] + number) for op, which, number in played.calls]
        self.call(*first)
        live = meter.total_bytes
        self.calls += calls
        self.moments += [live + num_bytes for num_bytes in played.moments]
        meter.add(Kind.ACTIVATIONS, played.net)
        meter.mark()
        meter.stretch(Kind.ACTIVATIONS, *played.after)

    def _strip(self, steps: Sequence[Step], index: int, layer: int, *, runs_again: bool, loses: bool) -> Strip:
        """A way through a block; the layers that run the same steps are all alike."""
        reentrant, block = self.recording.reentrant, self.recording.blocks[index]
        first = self.module_base[index] + layer * max(len(block.modules.numbers), 1)

        def operation(event: int, number: int) -> int | None:
            if event == Event.GRADIENT:
                return Op.GRADIENT
            if event == Event.MADE:
                return Op.MADE
            if not self.fetches:
                return None
            if event == Event.PRE_FORWARD and runs_again and reentrant:
                return Op.RECOMPUTED_MODULE
            if event == Event.POST_FORWARD and runs_again and not reentrant:
                return Op.KEPT_MODULE
            if event == Event.POST_FORWARD and first + number in self.viewing and not loses:
                return Op.VIEWED_MODULE
            return Op.PRE_MODULE if event in (Event.PRE_FORWARD, Event.PRE_BACKWARD) else Op.POST_MODULE

        key = (id(steps), index, runs_again, loses)
        if key not in self.strips:
            self.strips[key] = strip(steps, operation)
        return self.strips[key]
