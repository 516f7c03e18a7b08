"""Ulysses sequence parallelism: which models and recipes DeepSpeed shares sequences of, and what to type otherwise."""

from __future__ import annotations

from collections.abc import Iterator

from zplan.errors import ConfigError
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.values import dataclass

WITHOUT_KV_HEADS = ("gpt2", "gpt_neox", "opt", "bloom", "falcon", "mpt")
"""Families whose configuration has no num_key_value_heads, which DeepSpeed reads
(transformers 5.23.0, models/*/configuration_*.py)."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason, and the mend."""

    what: str
    mend: str


def refusals(shape: ModelShape, recipe: Recipe, ranks: int) -> Iterator[Refusal]:
    """Why DeepSpeed would not let `ranks` ranks share the sequences of a run.

    Source: deepspeed 0.19.8, runtime/sequence_parallel/ulysses_sp.py (UlyssesSPAttentionHF.__init__, forward and
    register_with_transformers, UlyssesSPDataLoaderAdapter.refill).
    """
    if ranks == 1:
        return
    if shape.model_type in WITHOUT_KV_HEADS:
        yield Refusal(f"{shape.model_type} has no num_key_value_heads in its configuration", _one())
    elif shape.kv_lora_rank:
        yield Refusal(f"latent attention of {shape.model_type}: keys are wider than values", _one())
    elif shape.num_attention_heads % ranks or not _share(shape.num_key_value_heads, ranks):
        yield Refusal(
            f"{shape.num_attention_heads} attention heads and {shape.num_key_value_heads} of keys and values are not"
            f" divisible by sequence_parallel_size {ranks}",
            _one(max(n for n in range(1, ranks) if _divides_heads(shape, n))),
        )
    if recipe.attention == "eager":
        yield Refusal("eager attention, which makes a mask of the whole length squared", "--attention sdpa")
    if recipe.max_length % ranks:
        length = max(recipe.max_length // ranks, 1) * ranks
        yield Refusal(f"max_length {recipe.max_length} is not divisible by {ranks}", f"--max-length {length}")


def _one(ranks: int = 1) -> str:
    return f"--set sequence_parallel_size={ranks}"


def _share(num_heads: int, ranks: int) -> bool:
    """Heads of keys and values are cut, or repeated."""
    return num_heads % ranks == 0 or ranks % num_heads == 0


def _divides_heads(shape: ModelShape, ranks: int) -> bool:
    return shape.num_attention_heads % ranks == 0 and _share(shape.num_key_value_heads, ranks)


def refuse_unshareable(shape: ModelShape, recipe: Recipe, ranks: int) -> None:
    """Raises ConfigError for a sequence_parallel_size that DeepSpeed refuses with this model or recipe."""
    found = list(refusals(shape, recipe, ranks))
    if found:
        raise ConfigError(
            f"sequence_parallel_size is {ranks}: {found[0].what}",
            because="DeepSpeed refuses it (runtime/sequence_parallel/ulysses_sp.py)",
            problems=tuple(f"{item.what}; {item.mend}" for item in found[1:]),
            fix=found[0].mend,
        )


def lost_masks(shape: ModelShape, recipe: Recipe, ranks: int) -> Iterator[str]:
    """What training does otherwise than alone; one line each.

    Source: deepspeed 0.19.8, runtime/sequence_parallel/ulysses_sp.py (uattn_wrapper: attention_mask = None).
    """
    if ranks > 1 and recipe.attention == "sdpa" and shape.sliding_window and shape.sliding_window < recipe.max_length:
        yield (
            f"Ulysses drops every mask: with sdpa the window of {shape.sliding_window} is not applied, and the model"
            " trains on full attention; --attention flash_attention_2 keeps it"
        )
