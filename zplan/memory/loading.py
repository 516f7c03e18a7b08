"""What a GPU has beside its partitions while a ZeRO-3 model is loaded: modules that are gathered to be initialised, the
head before it is tied, adapters that no engine has cut yet.

Legend: b bytes of the training dtype, N ranks, n elements of a parameter.
"""

from __future__ import annotations

from collections import defaultdict
from operator import mul

from zplan.memory.instances import Instances
from zplan.memory.memo import Kept
from zplan.memory.shards import Shards
from zplan.memory.states import FP32
from zplan.memory.trainable import EXPERT_ADAPTERS, Layout, is_adapter
from zplan.recipe import Recipe
from zplan.values import dataclass

DORA_COPIES = 3
"""Beside a gathered weight, in its size: B A, the two sums and products of it in its norm (peft 0.21.2,
tuners/lora/dora.py:89, :120)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The largest sets of parameters that are whole at one time while a model is loaded, in elements."""

    together: int
    """Of a module and its direct children, if these are several parameters."""
    alone: int
    """A parameter that is gathered by itself."""
    made: int
    """The largest parameter of a layer, which is there beside its partition when it has been made."""
    after_layers: int
    """Parameters that are made after the layers."""
    head: int
    """A head that is tied only when everything is made; 0 without one."""
    saved: int
    """The largest module that PEFT copies (modules_to_save); 0 without one."""
    adapted: int
    """The largest weight with an adapter; 0 without one."""
    packed: int
    """The largest weight that is quantised; 0 without one."""


_GATHERED: Kept[int, tuple[Layout, Gathered]] = Kept()


def gathered(laid: Layout) -> Gathered:
    """The sets of a layout, kept.

    transformers initialises a module with its direct children, other models aside; a checkpoint is read module by
    module, which gathers less.

    Source: transformers 5.23.0, integrations/deepspeed.py:334 (initialize_weights_zero3), :522
    (_load_state_dict_into_zero3_model).
    """
    known = _GATHERED.get(id(laid))
    if known is None or known[0] is not laid:
        known = _GATHERED.keep(id(laid), (laid, _gathered(laid)))
    return known[1]


def _gathered(laid: Layout) -> Gathered:
    sets: dict[tuple[int, str], list[int]] = defaultdict(list)
    made = after = saved = adapted = packed = 0
    for number, block in enumerate(laid.blocks):
        is_layer = block.block.role in ("layer", "encoder_layer")
        names = {weight.name for weight in block.weights}
        for weight in block.weights:
            if is_adapter(weight):
                continue
            saved = max(saved, weight.numel if weight.trainable else 0)
            packed = max(packed, weight.numel if weight.packed else 0)
            beside = (f"{weight.module}.lora_A.default.weight", f"{weight.name}.{EXPERT_ADAPTERS[0]}")
            adapted = max(adapted, weight.numel if names.intersection(beside) else 0)
            if block.block.role == "original":
                continue
            for module in (weight.module, weight.module.rpartition(".")[0]):
                sets[number if is_layer else -1, module].append(weight.numel)
            made = max(made, weight.numel if is_layer else 0)
            after += 0 if is_layer or number == 0 else weight.numel
    return Gathered(
        together=max((sum(numels) for numels in sets.values() if len(numels) > 1), default=0),
        alone=max(laid.tied_head, *(numels[0] for numels in sets.values() if len(numels) == 1)),
        made=made,
        after_layers=after,
        head=laid.tied_head,
        saved=saved,
        adapted=adapted,
        packed=packed,
    )


def whole_bytes(laid: Layout, b: int, ranks: int, *, offloads_param: bool, secondary_ranks: int = 1) -> int:
    """The set that is whole, and a tied head's own partitions.

        b n + b n / N if the partition comes from the host

    On one rank a parameter among others is its partition, or its copy of the host's; a parameter alone is copied.

    Args:
        secondary_ranks: ranks of hpZ's second copy; 1 without one.

    Source: deepspeed 0.19.8, partition_parameters.py:1738 (_all_gather), :1995 (_allgather_params_coalesced), :2130
    (_allgather_params_sequential), :1100 (_post_init_method).
    """
    sets = gathered(laid)
    kept = 0 if offloads_param else -(-sets.head // ranks)
    if secondary_ranks > 1:
        kept += -(-sets.head // secondary_ranks)
    if ranks == 1:
        most = max(sets.together, 2 * sets.alone) if offloads_param else max(sets.alone, sets.made - sets.after_layers)
        return b * (kept + most)
    most = max(sets.together, sets.alone)
    return b * (kept + most + (-(-most // ranks) if offloads_param else 0))


def uncut_adapters_bytes(laid: Layout, recipe: Recipe, numel: int, *, offloads_param: bool) -> int:
    """Adapters, which are whole until the engine cuts them, less their partition.

    Args:
        numel: elements of this rank's partition of what trains.

    Source: peft 0.21.2, tuners/tuners_utils.py (_move_adapter_to_device_of_base_layer).
    """
    if recipe.method == "full":
        return 0
    return recipe.weight_bytes * (laid.trainable_numel - (0 if offloads_param else numel))


def beside_adapters_bytes(laid: Layout, recipe: Recipe) -> int:
    """What is gathered while adapters are made: a module that PEFT copies, or what DoRA takes the norm of.

        b n, or (1 + 3) b n

    Source: peft 0.21.2, utils/other.py (ModulesToSaveWrapper.update: gather_params_ctx), tuners/lora/dora.py
    (update_layer).
    """
    if recipe.method == "full":
        return 0
    sets = gathered(laid)
    of_dora = (1 + DORA_COPIES) * sets.adapted if recipe.use_dora else 0
    return recipe.weight_bytes * max(sets.saved, of_dora)


def not_yet_cut_bytes(items: Instances, shards: Shards, *, offloads_param: bool) -> tuple[int, int]:
    """What a quantised model has more on a GPU before the engine cuts it, and at most while it is cut, one parameter
    after the other: it is not built under zero.Init.

        sum n_i size_i - cut        max over k of   sum n_i size_i - (n_1 - p_1 + ... + n_k-1 - p_k-1) + p_k - cut

    Source: transformers 5.23.0, modeling_utils.py:1435 (needs_zero3_init); deepspeed 0.19.8,
    runtime/zero/parameter_offload.py (_convert_to_zero_parameters).
    """
    cut = 0 if offloads_param else shards.stored_bytes
    loaded = now = most = sum(map(mul, items.numel, items.itemsize))
    for numel, size, part in zip(items.numel, items.itemsize, shards.partition, strict=True):
        kept = 0 if offloads_param else size * part
        most = max(most, now + kept)
        now += kept - size * numel
    return loaded - cut, most - cut


def quantising_bytes(laid: Layout, b: int) -> int:
    """What a quantised model takes more while it is loaded: a weight before it is packed, with no adapter yet; or all
    adapters, which PEFT keeps in fp32 until TRL casts them.

    Source: peft 0.21.2, tuners/tuners_utils.py:2762 (cast_adapter_dtype); trl 1.16.0, trainer/sft_trainer.py.
    """
    return max((FP32 - b) * laid.trainable_numel, b * (gathered(laid).packed - laid.trainable_numel))
