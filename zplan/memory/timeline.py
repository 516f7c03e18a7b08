"""One optimizer step of one rank, replayed: forward, loss, backward, reduction, update.

Activations come from the tapes of the blocks, gradients and parameters go through the engine of the stage; the meter
sees both, so that what is live at the same time is counted at the same time and nothing else is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from zplan.memory.blocks import build_layer
from zplan.memory.instances import Instances, instances
from zplan.memory.loss import INT64, LossCost, loss_cost
from zplan.memory.meter import Kind, Meter
from zplan.memory.operations import Modules, Sizes, norm
from zplan.memory.stage0 import Stage0Engine
from zplan.memory.stage3 import Shards, Stage3Engine
from zplan.memory.stage12 import Partitions, Stage12Engine
from zplan.memory.tape import BlockTape, Event, Step, Tape, Value, record_block
from zplan.memory.trainable import LaidBlock, Layout, Weight
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import Choice


class Engine(Protocol):
    """What the replay asks of a stage."""

    def begin_micro_step(self) -> None: ...
    def gradient(self, number: int) -> None: ...
    def end_backward(self) -> None: ...
    def step(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A block with its tape and the numbers of its modules."""

    laid: LaidBlock
    tape: BlockTape | None
    modules: Modules


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Everything about a step that does not depend on the ZeRO configuration."""

    shape: ModelShape
    layout: Layout
    items: Instances
    sizes: Sizes
    blocks: tuple[Recorded, ...]
    loss: LossCost
    hidden_bytes: int
    batch_bytes: int
    head_bytes: int
    """Output weight in the training dtype."""
    head_trains: bool
    reentrant: bool
    """Adapters under ZeRO-3 force reentrant checkpointing (trl 1.16.0, sft_trainer.py:872)."""
    head_is_embedding: bool
    """Tied: one weight, two gradients that are added before the engine sees them."""


_RECORDINGS: dict[tuple[Any, ...], Recording] = {}


def record(shape: ModelShape, recipe: Recipe, layout: Layout, *, micro_batch: int, on_cpu: bool) -> Recording:
    """Tapes of all blocks for one micro-batch; kept per (layout, recipe, micro-batch)."""
    key = (id(layout), recipe.attention, recipe.loss, recipe.max_length, recipe.dtype, micro_batch, on_cpu)
    known = _RECORDINGS.get(key)
    if known is not None and known.layout is layout:
        return known
    sizes = Sizes(
        micro_batch=micro_batch,
        length=recipe.max_length,
        itemsize=recipe.weight_bytes,
        attention=recipe.attention,
        on_cpu=on_cpu,
    )
    made = _record(shape, recipe, layout, sizes)
    if len(_RECORDINGS) > 4096:
        _RECORDINGS.clear()
    _RECORDINGS[key] = made
    return made


def _record(shape: ModelShape, recipe: Recipe, layout: Layout, sizes: Sizes) -> Recording:
    hidden = sizes.bytes(shape.hidden_size)
    heads = [
        weight for laid in layout.blocks if laid.block.role == "head" for weight in laid.weights if is_output(weight)
    ]
    embeddings = [laid for laid in layout.blocks if laid.block.role == "embedding"]
    outputs = heads or [laid.weights[0] for laid in embeddings]
    head_trains = any(weight.trainable for weight in outputs)
    return Recording(
        shape=shape,
        layout=layout,
        items=instances(layout),
        sizes=sizes,
        blocks=tuple(_record_one(laid, shape, sizes, hidden) for laid in layout.blocks),
        loss=loss_cost(
            recipe.loss,
            shape,
            micro_batch=sizes.micro_batch,
            length=sizes.length,
            itemsize=sizes.itemsize,
            head_trains=head_trains,
            on_cpu=sizes.on_cpu,
        ),
        hidden_bytes=hidden,
        batch_bytes=_batch_bytes(shape, sizes),
        head_bytes=shape.vocab_size * shape.hidden_size * sizes.itemsize,
        head_trains=head_trains,
        reentrant=recipe.method != "full",
        head_is_embedding=not heads,
    )


def is_output(weight: Weight) -> bool:
    """The output projection's weight or bias, in the block that also holds the final norm."""
    return weight.group == 0 or (
        weight.name.endswith("bias") and "norm" not in weight.module and "ln_" not in weight.name
    )


def _batch_bytes(shape: ModelShape, sizes: Sizes) -> int:
    """input_ids, labels and attention_mask (int64), positions, and cos and sin of the rotary embedding."""
    rotary = 2 * sizes.length * shape.head_dim * sizes.itemsize
    return 3 * INT64 * sizes.tokens + INT64 * sizes.length + rotary


def _record_one(laid: LaidBlock, shape: ModelShape, sizes: Sizes, hidden: int) -> Recorded:
    modules = Modules.of(laid)
    role = laid.block.role
    if role in ("layer", "encoder_layer"):
        return Recorded(
            laid=laid, tape=record_block(build_layer(laid, shape, sizes, modules), hidden, hidden), modules=modules
        )
    if role in ("final", "head"):
        return Recorded(laid=laid, tape=_record_final(laid, shape, sizes, modules, hidden), modules=modules)
    return Recorded(laid=laid, tape=None, modules=modules)


def _record_final(laid: LaidBlock, shape: ModelShape, sizes: Sizes, modules: Modules, hidden: int) -> BlockTape | None:
    names = [weight.module for weight in laid.weights if weight.group == 1]
    if not names:
        return None

    def forward(tape: Tape, x: Value) -> Value:
        return norm(tape, modules, sizes, names[-1], x, shape.hidden_size)

    return record_block(forward, hidden, hidden)


class Replay:
    """Runs a recording through an engine."""

    def __init__(self, recording: Recording, choice: Choice, meter: Meter, engine: Engine) -> None:
        self.recording, self.choice, self.meter, self.engine = recording, choice, meter, engine
        self.stage3 = engine if isinstance(engine, Stage3Engine) else None
        self.module_base = module_bases(recording)
        self.root = root_module(recording)

    def run(self) -> None:
        """One micro-step and the update."""
        meter, r = self.meter, self.recording
        meter.start("forward")
        self.engine.begin_micro_step()
        meter.add(Kind.ACTIVATIONS, r.batch_bytes)
        if self.stage3 is not None:
            self.stage3.pre_module(self.root)
        self._forward()
        self._loss_forward()
        meter.start("backward")
        self._loss_backward()
        self._backward()
        self.engine.end_backward()
        meter.add(Kind.ACTIVATIONS, -meter.by_kind[Kind.ACTIVATIONS])
        if self.stage3 is None:
            meter.start("step")
        self.engine.step()
        meter.close()

    # -- forward -------------------------------------------------------------------------------------------------
    def _forward(self) -> None:
        for index, block in enumerate(self.recording.blocks):
            if block.tape is None:
                if block.laid.block.role == "embedding":
                    self._embed(index)
                continue
            checkpointed = self._is_checkpointed(block)
            steps = block.tape.forward_without_saving if checkpointed else block.tape.forward
            for layer in range(block.laid.repeat):
                self._play(steps, index, layer)

    def _is_checkpointed(self, block: Recorded) -> bool:
        return self.choice.gradient_checkpointing and block.laid.block.role in ("layer", "encoder_layer")

    def _embed(self, index: int) -> None:
        if self.stage3 is not None:
            self.stage3.pre_module(self.module_base[index])
        self.meter.add(Kind.ACTIVATIONS, self.recording.hidden_bytes)
        if self.stage3 is not None:
            self.stage3.post_module(self.module_base[index])

    def _loss_forward(self) -> None:
        loss = self.recording.loss
        self.meter.touch(Kind.LOSS, loss.forward)
        self.meter.add(Kind.LOSS, loss.kept)
        if self.stage3 is not None:
            self.stage3.post_module(self.root)

    # -- backward ------------------------------------------------------------------------------------------------
    def _loss_backward(self) -> None:
        meter, r = self.meter, self.recording
        if self.stage3 is not None:
            self.stage3.pre_module(self.root)
        meter.touch(Kind.LOSS, r.loss.backward)
        meter.add(Kind.LOSS, -r.loss.kept)
        if r.head_trains and not r.head_is_embedding:
            for number in output_numbers(r):
                self.engine.gradient(number)
        elif r.head_trains:
            meter.add(Kind.GRADIENTS, r.head_bytes)
        meter.touch(Kind.LOSS, r.loss.hidden_gradient + r.loss.spread)
        meter.add(Kind.ACTIVATIONS, r.loss.hidden_gradient)

    def _backward(self) -> None:
        r = self.recording
        for index in reversed(range(len(r.blocks))):
            block = r.blocks[index]
            if block.tape is None:
                continue
            checkpointed = self._is_checkpointed(block)
            for layer in reversed(range(block.laid.repeat)):
                if checkpointed:
                    again, back = _recomputation(block.tape, reentrant=r.reentrant and self.stage3 is not None)
                    self._play(again, index, layer)
                    self._play(back, index, layer)
                    extra = r.hidden_bytes if back is block.tape.backward_after_whole else 0
                    self.meter.add(Kind.ACTIVATIONS, -r.hidden_bytes - extra)
                else:
                    self._play(block.tape.backward, index, layer)
        self._embedding_backward()
        if self.stage3 is not None:
            self.stage3.post_module(self.root)

    def _embedding_backward(self) -> None:
        r = self.recording
        for index, block in enumerate(r.blocks):
            if block.laid.block.role != "embedding":
                continue
            if self.stage3 is not None:
                self.stage3.pre_module(self.module_base[index])
            for local, weight in enumerate(block.laid.weights):
                if not weight.trainable:
                    continue
                if r.head_is_embedding and local == 0:
                    self.meter.touch(Kind.GRADIENTS, weight.numel * weight.itemsize)
                    self.meter.add(Kind.GRADIENTS, -r.head_bytes)
                self.engine.gradient(r.items.base[index] + local)
            if self.stage3 is not None:
                self.stage3.post_module(self.module_base[index])

    def _play(self, steps: Sequence[Step], index: int, layer: int) -> None:
        meter, stage3 = self.meter, self.stage3
        laid = self.recording.blocks[index].laid
        weights = self.recording.items.base[index] + layer * len(laid.weights)
        modules = self.module_base[index] + layer * max(len(self.recording.blocks[index].modules.numbers), 1)
        for event, a, b in steps:
            if event == Event.BYTES:
                if meter.total_bytes + b > meter.peak_bytes:
                    meter.touch(Kind.ACTIVATIONS, b)
                meter.add(Kind.ACTIVATIONS, a)
            elif event == Event.GRADIENT:
                self.engine.gradient(weights + a)
            elif stage3 is not None:
                if event in (Event.PRE_FORWARD, Event.PRE_BACKWARD):
                    stage3.pre_module(modules + a)
                else:
                    stage3.post_module(modules + a)


def module_bases(recording: Recording) -> tuple[int, ...]:
    """Number of the first module of each block; every layer has as many as the block's tape names."""
    bases, total = [], 0
    for block in recording.blocks:
        bases.append(total)
        total += max(len(block.modules.numbers), 1) * block.laid.repeat
    return tuple(bases)


def root_module(recording: Recording) -> int:
    """The number of the model itself.

    The loss reads the head's weight outside the head's module; DeepSpeed registers it as an external parameter of the
    model, which from the second step on gathers it before everything else.

    Source: deepspeed 0.19.8, runtime/zero/parameter_offload.py (ZeROOrderedDict.__getitem__, iter_params).
    """
    last = len(recording.blocks) - 1
    block = recording.blocks[last]
    return module_bases(recording)[last] + max(len(block.modules.numbers), 1) * block.laid.repeat


def output_numbers(recording: Recording) -> tuple[int, ...]:
    """The parameters of the output projection; the embedding's weight if they are tied."""
    found = [
        recording.items.base[index] + local
        for index, block in enumerate(recording.blocks)
        if block.laid.block.role == "head"
        for local, weight in enumerate(block.laid.weights)
        if is_output(weight)
    ]
    return tuple(found) if found else (recording.items.base[0],)


def module_parameters(recording: Recording) -> dict[int, tuple[int, ...]]:
    """Module number -> the parameters it owns."""
    owned: dict[int, list[int]] = {}
    for index, base in enumerate(module_bases(recording)):
        block = recording.blocks[index]
        names = block.modules.numbers
        per_layer = max(len(names), 1)
        for layer in range(block.laid.repeat):
            first = recording.items.base[index] + layer * len(block.laid.weights)
            for local, weight in enumerate(block.laid.weights):
                local_module = names.get(f"{weight.module}.base_layer", names.get(weight.module))
                if local_module is None and block.tape is not None:
                    continue  # the head's own module never runs
                owned.setdefault(base + layer * per_layer + (local_module or 0), []).append(first + local)
    owned[root_module(recording)] = list(output_numbers(recording))
    return {module: tuple(numbers) for module, numbers in owned.items()}


def _recomputation(tape: BlockTape, *, reentrant: bool) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    if reentrant:
        return tape.recompute_whole, tape.backward_after_whole
    return tape.recompute, tape.backward_after_recompute


def _is_embedding(block: Recorded) -> bool:
    return block.tape is None and block.laid.block.role == "embedding"


def fetch_order(recording: Recording, *, checkpointing: bool) -> list[int]:
    """Modules in the order in which a step's trace fetches them."""
    root = root_module(recording)
    order: list[int] = [root]
    bases = module_bases(recording)

    def collect(steps: Sequence[Step], index: int, layer: int) -> None:
        first = bases[index] + layer * max(len(recording.blocks[index].modules.numbers), 1)
        order.extend(first + a for event, a, _ in steps if event in (Event.PRE_FORWARD, Event.PRE_BACKWARD))

    for index, block in enumerate(recording.blocks):
        if _is_embedding(block):
            order.append(bases[index])
        for layer in range(block.laid.repeat if block.tape else 0):
            assert block.tape is not None
            collect(block.tape.forward, index, layer)
    order.append(root)
    for index in reversed(range(len(recording.blocks))):
        tape = recording.blocks[index].tape
        layers = recording.blocks[index].laid
        for layer in reversed(range(layers.repeat if tape else 0)):
            assert tape is not None
            if checkpointing and layers.block.role in ("layer", "encoder_layer"):
                collect(_recomputation(tape, reentrant=recording.reentrant)[0], index, layer)
            collect(tape.backward, index, layer)
    order.extend(base for base, block in zip(bases, recording.blocks, strict=True) if _is_embedding(block))
    return order


def make_engine(
    recording: Recording, choice: Choice, meter: Meter, cut: Partitions | None, shards: Shards | None
) -> Engine:
    """The engine of the configured stage."""
    world, zero = choice.batch.world_size, choice.zero
    partial = choice.batch.gradient_accumulation_steps > 1
    itemsize = recording.sizes.itemsize
    if zero.stage == 0:
        return Stage0Engine(meter, recording.items, itemsize=itemsize, num_ranks=world, partial=partial)
    if shards is not None:
        return Stage3Engine(
            meter,
            recording.items,
            shards,
            zero,
            num_ranks=world,
            itemsize=itemsize,
            modules=module_parameters(recording),
            order=fetch_order(recording, checkpointing=choice.gradient_checkpointing),
            external=() if recording.head_is_embedding else output_numbers(recording),
        )
    assert cut is not None
    return Stage12Engine(meter, recording.items, cut, zero, itemsize=itemsize, partial=partial)
