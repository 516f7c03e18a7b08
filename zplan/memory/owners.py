"""Which module owns, reads or keeps which parameters, for the replays of ZeRO-3's hooks."""

from __future__ import annotations

from collections.abc import Mapping

from zplan.memory.events import Event
from zplan.memory.experts import LEAF, LEAF_FAMILIES, READ_AS_STORED, wrappers
from zplan.memory.operations import MAGNITUDE
from zplan.memory.timeline import Recorded, Recording, module_bases, output_numbers, root_module
from zplan.memory.trainable import EXPERT_ADAPTERS, Weight, is_expert_adapter
from zplan.model_shape import ModelShape


def module_parameters(recording: Recording) -> dict[int, tuple[int, ...]]:
    """Module number -> the parameters it owns."""
    owned: dict[int, list[int]] = {}
    for index, base in enumerate(module_bases(recording)):
        block = recording.blocks[index]
        names = block.modules.numbers
        per_layer = max(len(names), 1)
        around = wrappers(block.laid.weights)
        for layer in range(block.laid.repeat):
            first = recording.items.base[index] + layer * len(block.laid.weights)
            for local, weight in enumerate(block.laid.weights):
                local_module = _owner(weight, recording.shape, names, around)
                if local_module is None and block.tape is not None:
                    continue  # the head's own module never runs
                for module in (local_module or 0, *_readers(weight, names)):
                    owned.setdefault(base + layer * per_layer + module, []).append(first + local)
        if block.laid.block.role == "layer" and recording.shape.model_type in LEAF_FAMILIES:
            _adapters_last(owned, recording, index)
    owned[root_module(recording) + recording.runs_head] = list(output_numbers(recording))
    return {module: tuple(numbers) for module, numbers in owned.items()}


def _adapters_last(owned: dict[int, list[int]], recording: Recording, index: int) -> None:
    """A leaf module is traced by the numbers that its parameters were given: adapters were made after the model.

    Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (trace_prologue, record_parameters: sorted
    by ds_id).
    """
    block, base = recording.blocks[index], module_bases(recording)[index]
    leaf, weights = block.modules.numbers[LEAF], block.laid.weights
    first = recording.items.base[index]

    def is_adapter(number: int) -> bool:
        name = weights[(number - first) % len(weights)].name
        return ".lora_" in name or ".expert_lora_" in name

    for layer in range(block.laid.repeat):
        owned[base + layer * max(len(block.modules.numbers), 1) + leaf].sort(key=is_adapter)


def _readers(weight: Weight, names: Mapping[str, int]) -> tuple[int, ...]:
    """Modules that read a weight that is not theirs: an adapted module looks at the dtype of its lora_A, DoRA's module
    at the weight itself, and DeepSpeed gathers it there from then on.

    Source: peft 0.21.2, tuners/lora/layer.py (Linear.forward: lora_A.weight.dtype), dora.py; deepspeed 0.19.8,
    runtime/zero/parameter_offload.py (ZeROOrderedDict.__getitem__).
    """
    around, found, _ = weight.module.partition(".lora_A.")
    if found and around in names:
        return (names[around],)
    magnitude = names.get(f"{weight.module}.{MAGNITUDE}")
    return () if magnitude is None else (magnitude,)


def _owner(weight: Weight, shape: ModelShape, names: Mapping[str, int], around: Mapping[str, str]) -> int | None:
    """The module that gathers the weight: the leaf module in which it lies, the wrapper of a stacked weight (`around`),
    or its own."""
    if shape.model_type in LEAF_FAMILIES and weight.module.startswith(f"{LEAF}."):
        return names.get(LEAF)
    if is_expert_adapter(weight) or weight.name in around:
        return names[around[weight.name.rpartition(".expert_lora")[0] or weight.name]]
    return _own_module(weight, names)


def _own_module(weight: Weight, names: Mapping[str, int]) -> int | None:
    """The module that the weight is named after; PEFT puts the adapted one into `base_layer`."""
    return names.get(f"{weight.module}.base_layer", names.get(weight.module))


def unread_numbers(recording: Recording) -> frozenset[int]:
    """Stacked weights with an adapter, and these adapters: their wrappers own none of them. The lora_A that other
    modules read is small, and left out.

    Source: deepspeed 0.19.8, runtime/zero/parameter_offload.py (ZeROOrderedDict.__getitem__).
    """
    found = []
    for index, block in enumerate(recording.blocks):
        around = {} if recording.shape.model_type in LEAF_FAMILIES else wrappers(block.laid.weights)
        places = [
            local
            for local, weight in enumerate(block.laid.weights)
            if around and (weight.name in around or is_expert_adapter(weight))
        ]
        for layer in range(block.laid.repeat):
            first = recording.items.base[index] + layer * len(block.laid.weights)
            found += [first + local for local in places]
    return frozenset(found)


def viewed_numbers(recording: Recording, *, checkpointing: bool) -> frozenset[int]:
    """Weights of which autograd keeps a view, and with it the gathered storage that ZeRO-3 means to free: stacked
    weights of experts without adapters and else these adapters, Falcon's linear layers, which do without the function
    that ZeRO-3 replaces, and 4-bit ones.

    Source: transformers 5.23.0, integrations/moe.py (_grouped_linear: weight.transpose), models/falcon/
    modeling_falcon.py (FalconLinear: input @ weight.T); peft 0.21.2, tuners/lora/layer.py (get_delta_factors);
    torch 2.13.0, derivatives.yaml (_grouped_mm and mm save it); deepspeed 0.19.8, runtime/zero/linear.py
    (zero3_linear_wrap keeps the parameter itself).
    """
    found = []
    for index, block in enumerate(recording.blocks):
        names = {weight.name for weight in block.laid.weights}
        plain = [
            local
            for local, weight in enumerate(block.laid.weights)
            if is_expert_adapter(weight)
            or (
                len(weight.shape) == 3
                and f"{weight.name}.{EXPERT_ADAPTERS[0]}" not in names
                and recording.shape.model_type not in READ_AS_STORED
            )
        ]
        for layer in range(block.laid.repeat):
            first = recording.items.base[index] + layer * len(block.laid.weights)
            found += [first + local for local in (*plain, *_transposed(recording, block, layer, checkpointing))]
    return frozenset(found)


def _transposed(recording: Recording, block: Recorded, layer: int, checkpointing: bool) -> list[int]:
    """Places of Falcon's linear weights and of quantised ones in a layer. One whose input needs no gradient keeps
    nothing: no hook follows its backward. Under recomputation a layer's quantised weights stay gathered as long."""
    is_falcon = recording.shape.model_type == "falcon" and block.laid.block.role == "layer"
    apart = block.first if layer == 0 and not checkpointing else None
    followed = {module for event, module, _ in apart.backward if event == Event.POST_BACKWARD} if apart else None
    names = block.modules.numbers
    return [
        local
        for local, weight in enumerate(block.laid.weights)
        if (weight.packed and not checkpointing)
        or (is_falcon and len(weight.shape) == 2 and ".lora_" not in weight.name)
        if followed is None or _own_module(weight, names) in followed
    ]


def leaf_modules(recording: Recording) -> tuple[frozenset[int], dict[int, tuple[int, ...]]]:
    """Modules that are gathered as one, and of every module all parameters within it; nothing without such modules."""
    leaves: set[int] = set()
    inside: dict[int, tuple[int, ...]] = {}
    if recording.shape.model_type not in LEAF_FAMILIES:
        return frozenset(), inside
    for index, base in enumerate(module_bases(recording)):
        block = recording.blocks[index]
        names = block.modules.numbers
        for layer in range(block.laid.repeat):
            first = recording.items.base[index] + layer * len(block.laid.weights)
            for name, number in names.items():
                module = base + layer * max(len(names), 1) + number
                inside[module] = tuple(
                    first + local for local, w in enumerate(block.laid.weights) if f"{w.module}.".startswith(f"{name}.")
                    or not name
                )  # fmt: skip
                if name == LEAF:
                    leaves.add(module)
    root = root_module(recording)
    inside[root] = tuple(range(len(recording.items.numel)))
    if recording.runs_head:
        inside[root + 1] = output_numbers(recording)
    return frozenset(leaves), inside
