"""PEFT's modules_to_save: a copy of a module trains in its place, and the module itself stays, frozen.

Source: peft 0.21.2, utils/other.py:653 (ModulesToSaveWrapper.update: copy.deepcopy), :1088 (_set_trainable: a module
whose path ends in the name, with or without a dot before it).
"""

from __future__ import annotations

from dataclasses import replace

from zplan.model_shape import Block, ModelShape, ParameterShape
from zplan.recipe import Recipe

HEAD = "lm_head"


def is_saved(parameter: ParameterShape, recipe: Recipe) -> bool:
    """Whether PEFT copies the module of this parameter, alone or within a larger one."""
    return recipe.method != "full" and _is_named(parameter.module, recipe)


def _is_named(module: str, recipe: Recipe) -> bool:
    parts = module.split(".")
    paths = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(path.endswith(name) for path in paths for name in recipe.modules_to_save)


def copied_blocks(shape: ModelShape, recipe: Recipe) -> tuple[Block, ...]:
    """The blocks with what stays of the saved modules, each after the block whose modules they were.

    A copy of one of two tied modules is tied to nothing: there is a head beside the embedding then, and the other one
    of the two still reads the original.
    """
    if recipe.method == "full" or not recipe.modules_to_save:
        return shape.blocks
    tables = [p for block in shape.blocks if block.role == "embedding" for p in block.parameters[:1]]
    both_read = shape.tie_word_embeddings and not shape.is_encoder_decoder and bool(tables)
    parts_ways = both_read and (_is_named(HEAD, recipe) or is_saved(tables[0], recipe))
    still_read = tables if parts_ways and not _is_named(HEAD, recipe) else []
    found: list[Block] = []
    for block in shape.blocks:
        left = tuple(p for p in block.parameters if is_saved(p, recipe) and p not in still_read)
        found += [block, *([replace(block, role="original", parameters=left)] if left else [])]
    if parts_ways:
        head = ParameterShape(name=f"{HEAD}.weight", shape=tables[0].shape, kind="linear")
        found.append(Block(role="head", path="", parameters=(head,)))
    return tuple(found)
