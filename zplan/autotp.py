"""A model as one GPU holds it under DeepSpeed's AutoTP: its layers' matrices cut over `autotp_size` GPUs.

Only `--explain tensor_parallel` asks for it; plans are data-parallel.

Source: deepspeed 0.19.8, module_inject/auto_tp.py (q, k, v, gate and up by rows, o and down by columns; embeddings,
norms and the head are whole on every GPU).
"""

from __future__ import annotations

from dataclasses import replace

from zplan.model_shape import Block, ModelShape, ParameterShape

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")


def cut_shape(shape: ModelShape, autotp_size: int) -> ModelShape | None:
    """The shape of one GPU's part; None if it is not a Llama-like model whose heads and widths divide."""
    sizes = (shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size)
    if any(size % autotp_size for size in sizes) or shape.kv_lora_rank or shape.num_local_experts:
        return None
    blocks = [_cut_block(block, autotp_size) if block.path else block for block in shape.blocks]
    if any(block is None for block in blocks):
        return None
    return replace(
        shape,
        blocks=tuple(block for block in blocks if block is not None),
        num_attention_heads=shape.num_attention_heads // autotp_size,
        num_key_value_heads=shape.num_key_value_heads // autotp_size,
        intermediate_size=shape.intermediate_size // autotp_size,
    )


def _cut_block(block: Block, autotp_size: int) -> Block | None:
    cut = [_cut(parameter, autotp_size) for parameter in block.parameters]
    known = tuple(parameter for parameter in cut if parameter is not None)
    return replace(block, parameters=known) if len(known) == len(cut) else None


def _cut(parameter: ParameterShape, autotp_size: int) -> ParameterShape | None:
    """A parameter's part; norms are whole; None for a matrix that is cut in no known way."""
    owner = parameter.module.rpartition(".")[2]
    if owner in _BY_ROWS:
        rows, *rest = parameter.shape
        return replace(parameter, shape=(rows // autotp_size, *rest))
    if owner in _BY_COLUMNS and len(parameter.shape) == 2:
        rows, columns = parameter.shape
        return replace(parameter, shape=(rows, columns // autotp_size))
    return None if len(parameter.shape) > 1 else parameter
