"""ModelShape: every parameter of a model by module, shape and role, without a single weight.

Numbers keep the names of config.json. Identical layers are stored once with a repeat count. Produced by `model_probe`
(meta device) or read from the catalogue; consumed by memory/ and speed/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import cached_property
from math import prod
from typing import Any, Literal

from zplan.values import dataclass

ParameterKind = Literal["embedding", "linear", "experts", "norm", "bias", "conv", "other"]
BlockRole = Literal["embedding", "layer", "encoder_layer", "final", "head", "original"]
"""original: of modules that a run has replaced by copies; held, and read by no step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterShape:
    """One parameter tensor."""

    name: str
    """Within its block: `self_attn.q_proj.weight`; whole name outside layers."""
    shape: tuple[int, ...]
    kind: ParameterKind

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def module(self) -> str:
        """The module that owns it, within the block: `self_attn.q_proj`."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Block:
    """`repeat` consecutive layers with equal parameters, or one group outside the layers."""

    role: BlockRole
    path: str
    """Module path with `{}` for the layer number: `model.layers.{}`; "" outside layers."""
    parameters: tuple[ParameterShape, ...]
    """In the order of `module.parameters()`."""
    first: int = 0
    """Number of the first layer of the run."""
    repeat: int = 1

    @cached_property
    def numel(self) -> int:
        """Elements of one of the `repeat` layers."""
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model as the planner sees it. Tied parameters appear once."""

    name: str
    model_type: str
    architecture: str
    """Class name in transformers, or the published one for families that are not in transformers."""
    blocks: tuple[Block, ...]
    """In the order of `model.parameters()`."""
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    """Per layer `full_attention` or `sliding_attention`, as in config.json; empty if all are alike."""
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    num_shared_experts: int = 0
    kv_lora_rank: int = 0
    """Multi-head latent attention (DeepSeek)."""
    hidden_act: str = "silu"
    is_encoder_decoder: bool = False
    beside_numel: int | None = 0
    """Parameters of a wrapper that are loaded beside this, its text tower; None: the trainer cannot load it."""
    source: str = ""
    """Where the shape comes from: file, library version or paper."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json as it was, to build the model again (without weights)."""

    @cached_property
    def num_parameters(self) -> int:
        """Equal to transformers' `model.num_parameters()`."""
        return sum(block.numel * block.repeat for block in self.blocks)

    def parameters(self) -> Iterator[tuple[str, ParameterShape]]:
        """Every parameter with its full name, in the order of `model.named_parameters()`."""
        for block in self.blocks:
            for layer in range(block.first, block.first + block.repeat):
                prefix = block.path.format(layer) + "." if block.path else ""
                for parameter in block.parameters:
                    yield prefix + parameter.name, parameter
