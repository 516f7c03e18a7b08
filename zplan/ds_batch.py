"""The batch sizes of a DeepSpeed JSON: the triangle that DeepSpeed asserts, and the ranks that share sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from zplan.ds_keys import Accepts, read_value
from zplan.ds_zero import Findings
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.sequence import refusals
from zplan.zero_config import BatchSizes, ranks_in_words

_POSITIVE, _COUNT = Accepts("int", low=1), Accepts("int")
_OWN_CUTS = ("partition_config", "preset_model", "injection_policy_tuple", "vocab_parallel_lm_head")
"""Keys of tensor_parallel that cut other matrices, or otherwise."""
_LARGEST_BATCH = 1 << 30
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read_sharing(data: Mapping[str, Any], shape: ModelShape, recipe: Recipe, world_size: int, found: Findings) -> int:
    """`sequence_parallel_size`; 1 where it cannot be used.

    Under transformers it is accelerate that shares sequences, and the Trainer counts train_batch_size over all ranks.

    Source: deepspeed 0.19.8, runtime/config.py:467; transformers 5.23.0, integrations/deepspeed.py:143
    (trainer_config_process); accelerate 1.15.0, accelerator.py:2362 (_prepare_deepspeed).
    """
    given = data.get("sequence_parallel_size")
    if given is None or given == "auto":
        return 1
    ranks, complaint = read_value(_POSITIVE, given)
    if not complaint and world_size % ranks:
        complaint = f"is {ranks}, which does not divide world_size {world_size}; write 1"
    if complaint:
        found.problems.append(f"sequence_parallel_size {complaint}")
        return 1
    if ranks == 1:
        return 1
    found.origins["sequence_parallel_size"] = "user"
    found.problems += [
        f"sequence_parallel_size {ranks}: {item.what}; {item.mend}" for item in refusals(shape, recipe, ranks)
    ]
    found.warnings.append(
        "sequence_parallel_size: the Trainer shares sequences by accelerate's ParallelismConfig(sp_size, sp_backend);"
        ' it wants "auto" for train_batch_size, and at stage 3 the key left out (zero.Init divides by it)'
    )
    return int(ranks)


def read_cutting(data: Mapping[str, Any], shape: ModelShape, world_size: int, found: Findings) -> int:
    """`tensor_parallel.autotp_size`; 1 where it cannot be used.

    Source: deepspeed 0.19.8, runtime/tensor_parallel/config.py (TPTrainingConfig), runtime/engine.py:1118
    (auto_vocab_parallel_lm_head); accelerate 1.15.0, accelerator.py:2154.
    """
    section = data.get("tensor_parallel")
    section = section if isinstance(section, Mapping) else {}
    ranks, complaint = read_value(_COUNT, section.get("autotp_size", 1))
    if not complaint and world_size % max(ranks, 1):
        complaint = f"is {ranks}, which does not divide world_size {world_size}; write 1"
    if complaint:
        found.problems.append(f"tensor_parallel.autotp_size {complaint}")
        return 1
    if ranks < 2:
        return 1
    found.origins["tensor_parallel.autotp_size"] = "user"
    found.problems += _own_cuts(section, shape)
    return int(ranks)


def _own_cuts(section: Mapping[str, Any], shape: ModelShape) -> Iterator[str]:
    for key in _OWN_CUTS:
        if section.get(key):
            yield f"tensor_parallel.{key} is not modelled, only the family's own plan is; delete it"
    if shape.tie_word_embeddings and section.get("vocab_parallel_lm_head") is not False:
        yield "tensor_parallel cuts tied embeddings by words: not modelled; set its vocab_parallel_lm_head to false"


def read_batch(data: Mapping[str, Any], recipe: Recipe, one: BatchSizes, found: Findings) -> BatchSizes | None:
    """The batch triangle: what the file gives, the rest from the recipe.

    DeepSpeed counts ranks of AutoTP, which train the same sequences, as if each had its own.

    Args:
        one: the ranks, and the micro-batch where the file leaves it open.

    Source: deepspeed 0.19.8, runtime/config.py (_set_batch_related_parameters, _batch_assertion).
    """
    given = _given_sizes(data, found)
    if given is None:
        return None
    parallel, asked = one.data_parallel_size * one.autotp_size, recipe.train_batch_size * one.autotp_size
    total, micro, steps = (given.get(key) for key in _BATCH_KEYS)
    if micro is None and total is not None and steps is not None:
        micro = max(total // (steps * parallel), 1)
    micro = micro or one.train_micro_batch_size_per_gpu
    if steps is None:
        steps = max((total or asked) // (micro * parallel), 1)
        total = total or (asked if "train_micro_batch_size_per_gpu" not in given else None)
    product = micro * steps * parallel
    if product > _LARGEST_BATCH:
        found.problems.append(f"{product} sequences a step are no batch that fits anywhere; write a smaller one")
        return None
    if total is not None and total != product:
        ranks = ranks_in_words(one.world_size, one.sequence_parallel_size)
        found.problems.append(
            f"train_batch_size is {total}, but train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps"
            f' {steps} x {ranks} = {product}; write {product}, or "auto" for one of them'
        )
        return None
    return replace(one, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=steps)


def _given_sizes(data: Mapping[str, Any], found: Findings) -> dict[str, int] | None:
    """The sizes that the file writes as numbers; None if one of them is none."""
    given: dict[str, int] = {}
    before = len(found.problems)
    for key in _BATCH_KEYS:
        value = data.get(key)
        if value == "auto" or value is None:
            found.origins[key] = "auto"
            continue
        read, complaint = read_value(_POSITIVE, value)
        if isinstance(value, str) and not complaint:
            complaint = f"is {value!r}, not a whole number; write {read} without quotes"
        if complaint:
            found.problems.append(f"{key} {complaint}")
        else:
            given[key] = read
            found.origins[key] = "user"
    return given if len(found.problems) == before else None
