"""A tiny real model and dataset, made from nothing: random Llama weights, a byte-level BPE, a ChatML template.

No network, no download, under a second to build; small enough that a CPU rank takes a step in a tenth of a second.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a {% generation %} block, as most published chat models have it."""

_MATERIALS = ("concrete", "timber", "brick", "steel", "glass", "clay", "stone", "straw")
_PARTS = ("wall", "roof", "floor", "beam", "window", "door", "stair", "foundation")
_PLACES = ("a cold climate", "a wet valley", "a dry plain", "a windy coast", "a small town", "a large city")


def tiny_rows(num_rows: int = 64, *, seed: int = 0) -> list[dict[str, str]]:
    """Prompt and response pairs of differing lengths; the same ones for the same seed."""
    generator = random.Random(seed)
    rows = []
    for index in range(num_rows):
        material, part = generator.choice(_MATERIALS), generator.choice(_PARTS)
        places = generator.sample(_PLACES, 1 + index % 4)
        rows.append(
            {
                "prompt": f"Which material is good for a {part} in {places[0]}?",
                "response": " ".join(f"In {place} a {part} of {material} lasts long." for place in places),
            }
        )
    return rows


def write_jsonl(rows: list[dict[str, object]] | list[dict[str, str]], path: Path) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build_tiny_dataset(folder: Path, num_rows: int = 64) -> Path:
    """`train.jsonl` with `prompt` and `response`."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_jsonl(tiny_rows(num_rows), folder / "train.jsonl")


def build_tiny_model(
    folder: Path, *, hidden_size: int = 64, num_hidden_layers: int = 2, chat_template: bool = True
) -> Path:
    """A folder that `from_pretrained` opens: config, safetensors, tokenizer; pad equals eos, as in SmolLM2."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((f"{row['prompt']}\n{row['response']}" for row in tiny_rows(256)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    if chat_template:
        tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
