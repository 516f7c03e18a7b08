"""The recording of a model: tapes of its blocks, cost of its loss, and the order in which modules run and are fetched.

Nothing here depends on the ZeRO configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zplan.memory.around import (
    LATE_NORM,
    arguments_bytes,
    dropout_rate,
    embedded_bytes,
    returned_bytes,
)
from zplan.memory.attention import uses_rotary
from zplan.memory.block_tape import BlockTape, FirstTape, record_block, record_first
from zplan.memory.blocks import build_layer
from zplan.memory.events import Event, Step
from zplan.memory.instances import Instances, instances
from zplan.memory.loss import LossCost, loss_cost
from zplan.memory.norms import norm
from zplan.memory.operations import Modules, Sizes
from zplan.memory.tape import Tape, Value
from zplan.memory.trainable import LaidBlock, Layout, Weight
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.values import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A block with its tape and the numbers of its modules."""

    laid: LaidBlock
    tape: BlockTape | None
    modules: Modules
    first: FirstTape | None = None
    """Forward and backward of the model's first layer where its input needs no gradient: with adapters on a frozen
    embedding, without recomputation. Nothing before the first adapter is in the graph."""
    late: BlockTape | None = None
    """A norm among the embeddings' parameters that runs after the layers (OPT)."""

    @property
    def embeddings(self) -> tuple[tuple[str, ...], ...]:
        """Modules of an embedding block that run before the layers, with the kind of each: tables, then a norm."""
        found: dict[str, str] = {}
        for weight in self.laid.weights:
            if weight.module.rpartition(".")[2] != LATE_NORM:
                found.setdefault(weight.module, "norm" if weight.group else "table")
        return tuple(found.items())


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
    adds_to_embedding: bool
    """The first layer's input is not the embedding's output: positions are added (GPT-2, OPT), or it is scaled outside
    the embedding's module (Granite)."""
    embedded_bytes: int
    """Kept between the embeddings and their backward besides the first layer's input: a dropout's mask, a norm's input
    and statistics."""
    arguments_bytes: int
    """Masks and positions that every layer is given."""
    returned_bytes: int
    """Attention weights that a layer returns besides its output (eager Falcon and Bloom)."""
    head_bytes: int
    """Output weight in the training dtype."""
    head_trains: bool
    embedding_trains: bool
    reentrant: bool
    """Adapters under ZeRO-3 force reentrant checkpointing (trl 1.16.0, sft_trainer.py:872)."""
    runs_head: bool
    """Full logits come from the head's own module (number root + 1); TRL's loss reads the head's weight instead."""
    head_is_embedding: bool
    """Tied: one weight, two gradients that are added before the engine sees them."""


_RECORDINGS: dict[tuple[Any, ...], Recording] = {}


def record(
    shape: ModelShape, recipe: Recipe, layout: Layout, *, micro_batch: int, on_cpu: bool, partitioned: bool = False,
    sequence_parallel_size: int = 1,
) -> Recording:  # fmt: skip
    """Tapes of all blocks for one micro-batch; kept per (layout, recipe, micro-batch).

    Args:
        partitioned: stage 3, whose linear modules keep other tensors.
    """
    key = (
        id(layout), recipe.attention, recipe.loss, recipe.max_length, recipe.dtype, recipe.lora_dropout, micro_batch,
        on_cpu, partitioned, sequence_parallel_size,
    )  # fmt: skip
    known = _RECORDINGS.get(key)
    if known is not None and known.layout is layout:
        return known
    sizes = Sizes(
        micro_batch=micro_batch,
        length=recipe.max_length // sequence_parallel_size,
        itemsize=recipe.weight_bytes,
        attention=recipe.attention,
        on_cpu=on_cpu,
        partitioned=partitioned,
        multiplies_by_hand=shape.model_type == "falcon",
        centred_norm=shape.model_type in ("cohere", "cohere2"),
        fp32_norm_weight=shape.model_type.startswith(("olmo2", "olmo3", "helium", "gemma")),
        residual_dropout=dropout_rate(shape, "resid_pdrop", "dropout", "hidden_dropout", "residual_dropout"),
        attention_dropout=dropout_rate(shape, "attn_pdrop", "attention_dropout"),
        adapter_dropout=recipe.lora_dropout,
        sequence_parallel_size=sequence_parallel_size,
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
    apart = None
    embedding_trains = any(weight.trainable for laid in embeddings for weight in laid.weights)
    if not embedding_trains:
        apart = next((laid for laid in layout.blocks if laid.block.role == "layer"), None)
    return Recording(
        shape=shape,
        layout=layout,
        items=instances(layout),
        sizes=sizes,
        blocks=tuple(_record_one(laid, shape, sizes, hidden, is_apart=laid is apart) for laid in layout.blocks),
        loss=loss_cost(
            recipe.loss,
            shape,
            micro_batch=sizes.micro_batch,
            length=sizes.length,
            itemsize=sizes.itemsize,
            head_trains=head_trains,
            on_cpu=sizes.on_cpu,
            shifted=sizes.sequence_parallel_size == 1,
        ),
        hidden_bytes=hidden,
        adds_to_embedding=shape.model_type.startswith(("gpt2", "opt", "granite")),
        embedded_bytes=embedded_bytes(shape, layout, sizes),
        arguments_bytes=arguments_bytes(shape, sizes),
        returned_bytes=returned_bytes(shape, sizes),
        head_bytes=shape.vocab_size * shape.hidden_size * sizes.itemsize,
        head_trains=head_trains,
        embedding_trains=embedding_trains,
        reentrant=recipe.method != "full",
        runs_head=recipe.loss == "full",
        head_is_embedding=not heads,
    )


def is_output(weight: Weight) -> bool:
    """The output projection's weight or bias, in the block that also holds the final norm."""
    return weight.group == 0 or (
        weight.name.endswith("bias") and "norm" not in weight.module and "ln_" not in weight.name
    )


def _record_one(laid: LaidBlock, shape: ModelShape, sizes: Sizes, hidden: int, *, is_apart: bool) -> Recorded:
    modules = Modules.of(laid)
    role = laid.block.role
    if role in ("layer", "encoder_layer"):
        build, returns = build_layer(laid, shape, sizes, modules), returned_bytes(shape, sizes) > 0
        tape = record_block(build, hidden, hidden, returns_held=returns)
        first = record_first(build, hidden, hidden) if is_apart else None
        return Recorded(laid=laid, tape=tape, modules=modules, first=first)
    if role in ("final", "head"):
        return Recorded(laid=laid, tape=_record_final(laid, shape, sizes, modules, hidden), modules=modules)
    for weight in laid.weights:
        modules.number(weight.module)
    names = [weight.module for weight in laid.weights if weight.module.rpartition(".")[2] == LATE_NORM]
    late = _record_norm(names[0], shape, sizes, modules, hidden) if names else None
    return Recorded(laid=laid, tape=None, modules=modules, late=late)


def _record_final(laid: LaidBlock, shape: ModelShape, sizes: Sizes, modules: Modules, hidden: int) -> BlockTape | None:
    names = [weight.module for weight in laid.weights if weight.group == 1]
    return _record_norm(names[-1], shape, sizes, modules, hidden) if names else None


def _record_norm(name: str, shape: ModelShape, sizes: Sizes, modules: Modules, hidden: int) -> BlockTape:
    def forward(tape: Tape, x: Value) -> Value:
        return norm(tape, modules, sizes, name, x, shape.hidden_size)

    return record_block(forward, hidden, hidden)


def module_bases(recording: Recording) -> tuple[int, ...]:
    """Number of the first module of each block; every layer has as many as the block's tape names."""
    bases, total = [], 0
    for block in recording.blocks:
        bases.append(total)
        total += max(len(block.modules.numbers), 1) * block.laid.repeat
    return tuple(bases)


WRAPPERS = (2, 3)
"""Added to the model's number: PEFT's two modules around it, which own nothing, but whose hooks prefetch before it."""
INNER = 4
"""Added to the model's number: the decoder within it, which owns nothing; its hook prefetches after the model's."""
ROTARY = 5
"""Added to the model's number: cos and sin for all layers, made after the embeddings; owns nothing, and prefetches."""


def entered_modules(recording: Recording) -> list[int]:
    """The modules around the model and the model, in the order in which they are entered.

    Source: peft 0.21.2, peft_model.py (PeftModelForCausalLM), tuners/lora/model.py (LoraModel).
    """
    root = root_module(recording)
    return [*((root + number for number in WRAPPERS) if recording.reentrant else ()), root]


def rotary_modules(recording: Recording) -> list[int]:
    """The module of cos and sin, if the model has one; it runs forward only.

    Source: transformers 5.23.0, models/llama/modeling_llama.py (LlamaModel.forward) and its siblings.
    """
    shape = recording.shape
    each = max(len(set(shape.layer_types)), 1) if shape.model_type.startswith("gemma3") else 1
    return [root_module(recording) + ROTARY] * each if uses_rotary(shape) else []


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


def external_numbers(recording: Recording) -> tuple[int, ...]:
    """Parameters that DeepSpeed registers as external to a module: a head whose weight the loss reads."""
    return () if recording.head_is_embedding or recording.runs_head else output_numbers(recording)


def recomputation(tape: BlockTape, *, reentrant: bool) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """How a checkpointed block runs again in backward, and the backward after it."""
    if reentrant:
        return tape.recompute_whole, tape.backward_after_whole
    return tape.recompute, tape.backward_after_recompute


def plain_steps(block: Recorded, layer: int) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Forward and backward of a block's layer without recomputation."""
    tape = block.first if block.first and layer == 0 else block.tape
    assert tape is not None
    return tape.forward, tape.backward


def local_embedding_bytes(recording: Recording, block: Recorded) -> int:
    """The embedding's output once the block's first layer, without recomputation, has given it up: it stays a local of
    the model until its forward ends. Where more is added to it, or a norm follows, that is counted there.

    Source: transformers 5.23.0, models/llama/modeling_llama.py (LlamaModel.forward: inputs_embeds).
    """
    tables = sum(len(other.embeddings) for other in recording.blocks if _is_embedding(other))
    tape = block.first or block.tape
    is_first = block is next(other for other in recording.blocks if other.tape)
    is_local = is_first and tape is not None and tape.frees_input
    return recording.hidden_bytes if is_local and tables == 1 and not recording.adds_to_embedding else 0


def embedding_has_backward(recording: Recording, *, checkpointing: bool) -> bool:
    """Checkpointing makes the output of a frozen embedding need a gradient.

    Source: transformers 5.23.0, modeling_utils.py (enable_input_require_grads); peft 0.21.2, peft_model.py
    (_prepare_model_for_gradient_checkpointing).
    """
    return checkpointing or not any(block.first for block in recording.blocks)


def _is_embedding(block: Recorded) -> bool:
    return block.tape is None and block.laid.block.role == "embedding"


def fetch_order(recording: Recording, *, checkpointing: bool) -> list[int]:
    """Modules in the order in which a step's trace fetches them."""
    root = root_module(recording)
    start = entered_modules(recording)
    order: list[int] = [*start, root + INNER]
    bases = module_bases(recording)

    def collect(steps: Sequence[Step], index: int, layer: int) -> None:
        first = bases[index] + layer * max(len(recording.blocks[index].modules.numbers), 1)
        order.extend(first + a for event, a, _ in steps if event in (Event.PRE_FORWARD, Event.PRE_BACKWARD))

    for index, block in enumerate(recording.blocks):
        if _is_embedding(block):
            order += [bases[index] + number for number in range(len(block.embeddings))]
            order += rotary_modules(recording)
        for layer in range(block.laid.repeat if block.tape else 0):
            assert block.tape is not None
            collect(block.tape.forward, index, layer)
    for index, block in enumerate(recording.blocks):
        collect(block.late.forward if block.late else (), index, 0)
    if recording.runs_head:
        order += [root + 1, *start, root + 1, root + INNER]
    else:
        order += [*start, root + INNER]
    for index, block in enumerate(recording.blocks):
        collect(block.late.backward if block.late else (), index, 0)
    for index in reversed(range(len(recording.blocks))):
        tape = recording.blocks[index].tape
        layers = recording.blocks[index].laid
        for layer in reversed(range(layers.repeat if tape else 0)):
            assert tape is not None
            if checkpointing and layers.block.role in ("layer", "encoder_layer"):
                for steps in recomputation(tape, reentrant=recording.reentrant):
                    collect(steps, index, layer)
            else:
                collect(plain_steps(recording.blocks[index], layer)[1], index, layer)
    has_backward = embedding_has_backward(recording, checkpointing=checkpointing)
    for base, block in zip(bases, recording.blocks, strict=True):
        if _is_embedding(block) and has_backward:
            order += [base + number for number in reversed(range(len(block.embeddings)))]
    return order
