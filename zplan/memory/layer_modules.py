"""A decoder layer's modules by what they do, recognised by name and shape."""

from __future__ import annotations

from functools import cached_property

from zplan.memory.trainable import LaidBlock, is_adapter
from zplan.model_shape import ModelShape
from zplan.values import dataclass

_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "W_pack_out", "out")

_DROPOUTS = {
    "gpt_neox": ("post_attention_dropout", "post_mlp_dropout"),
    "phi": ("resid_dropout", "resid_dropout"),
    "phi3": ("resid_attn_dropout", "resid_mlp_dropout"),
    "stablelm": ("", "dropout"),
}
"""Modules that drop out the attention's result and the MLP's, outside both (transformers 5.23.0, models/*); of other
families they are functions, or within (GPT-2)."""
_INNER_DROPOUTS = {"gpt2": ("attn.resid_dropout", "mlp.dropout")}
_NONE = ("", "")


@dataclass(frozen=True)
class LayerModules:
    """A layer's modules by what they do, in the order they run."""

    laid: LaidBlock
    shape: ModelShape

    @cached_property
    def _linears(self) -> list[str]:
        names = []
        for weight in self.laid.weights:
            is_matrix = len(weight.shape) == 2 and not is_adapter(weight)
            if is_matrix and weight.group == 0 and weight.module not in names:
                names.append(weight.module)
        return names

    @cached_property
    def attention(self) -> list[str]:
        return [name for name in self._linears if "attn" in name or "attention" in name.lower()]

    @cached_property
    def mlp(self) -> list[str]:
        return [name for name in self._linears if name not in self.attention]

    @cached_property
    def output(self) -> str | None:
        named = [name for name in self.attention if name.rpartition(".")[2] in _OUTPUTS]
        return named[-1] if named else (self.attention[-1] if self.attention else None)

    @cached_property
    def projections(self) -> list[str]:
        return [name for name in self.attention if name != self.output]

    @cached_property
    def norms(self) -> list[str]:
        """Norms over the hidden size, outside the attention."""
        names: list[str] = []
        for weight in self.laid.weights:
            if weight.group == 1 and len(weight.shape) == 1 and weight.shape[0] == self.shape.hidden_size:
                inside = weight.module in self._linears or "attn." in weight.module or "attention." in weight.module
                if not inside and weight.module not in names and weight.name.endswith("weight"):
                    names.append(weight.module)
        return names

    @cached_property
    def latent_norms(self) -> list[str]:
        """q_a_layernorm and kv_a_layernorm of multi-head latent attention."""
        names = [weight.module for weight in self.laid.weights if weight.module.endswith("_a_layernorm")]
        return list(dict.fromkeys(names))

    @cached_property
    def head_norms(self) -> list[str]:
        """q_norm and k_norm, or under Hunyuan's names."""
        last = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")
        names = [weight.module for weight in self.laid.weights if weight.module.endswith(last)]
        return list(dict.fromkeys(names))

    @property
    def dropouts(self) -> tuple[str, str]:
        """Dropout modules behind attention and MLP; empty for none."""
        return _DROPOUTS.get(self.shape.model_type, _NONE)

    @property
    def inner_dropouts(self) -> tuple[str, str]:
        """Dropout modules that end attention and MLP; empty for none."""
        return _INNER_DROPOUTS.get(self.shape.model_type, _NONE)

    @cached_property
    def experts(self) -> int:
        """Elements of the expert tensors of this layer; 0 in a dense layer."""
        return sum(weight.numel for weight in self.laid.weights if len(weight.shape) == 3)

    @cached_property
    def experts_module(self) -> str:
        """The module of the stacked weights: `mlp.experts`."""
        return next(weight.module for weight in self.laid.weights if len(weight.shape) == 3)

    @cached_property
    def is_conv1d(self) -> bool:
        return self.shape.model_type == "gpt2"
