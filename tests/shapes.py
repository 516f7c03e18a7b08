"""Model shapes and clusters made from a few numbers, for tests that need no catalogue and no torch."""

from __future__ import annotations

from typing import Any

from zplan.hardware import Cluster, DeviceKind, Gpu, Host
from zplan.model_shape import Block, ModelShape, ParameterShape


def llama_like(
    *, hidden_size: int = 64, num_hidden_layers: int = 2, intermediate_size: int | None = None, vocab_size: int = 512,
    num_attention_heads: int = 4, tie_word_embeddings: bool = False, **more: Any,
) -> ModelShape:  # fmt: skip
    """A Llama without grouped queries: 4 h^2 + 3 h f weights and two norms a layer."""
    h, f = hidden_size, intermediate_size or 2 * hidden_size
    layer = (
        *(_linear(f"self_attn.{name}_proj.weight", h, h) for name in "qkvo"),
        _linear("mlp.gate_proj.weight", f, h),
        _linear("mlp.up_proj.weight", f, h),
        _linear("mlp.down_proj.weight", h, f),
        _norm("input_layernorm.weight", h),
        _norm("post_attention_layernorm.weight", h),
    )
    embedding = ParameterShape(name="model.embed_tokens.weight", shape=(vocab_size, h), kind="embedding")
    head = (Block(role="head", path="", parameters=(_linear("lm_head.weight", vocab_size, h),)),)
    return ModelShape(
        name="llama-like", model_type="llama", architecture="LlamaForCausalLM",
        blocks=(
            Block(role="embedding", path="", parameters=(embedding,)),
            Block(role="layer", path="model.layers.{}", parameters=layer, repeat=num_hidden_layers),
            Block(role="final", path="", parameters=(_norm("model.norm.weight", h),)),
            *(() if tie_word_embeddings else head),
        ),
        hidden_size=h, num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads, head_dim=h // num_attention_heads, intermediate_size=f,
        vocab_size=vocab_size, max_position_embeddings=4096, tie_word_embeddings=tie_word_embeddings, **more,
    )  # fmt: skip


def _linear(name: str, rows: int, columns: int) -> ParameterShape:
    return ParameterShape(name=name, shape=(rows, columns), kind="linear")


def _norm(name: str, size: int) -> ParameterShape:
    return ParameterShape(name=name, shape=(size,), kind="norm")


def described_cluster(
    *, kind: DeviceKind = "cuda", gpu_bytes: int = 80 << 30, host_bytes: int = 1 << 40, gpus_per_node: int = 8,
    nodes: int = 1, dense_flops: float | None = 1e15, link: float | None = 400e9, nvme: bool = False,
    described: bool = True, num_cpus: int = 48,
) -> Cluster:  # fmt: skip
    """Round numbers: 1 PFLOP/s, 4 TB/s of device memory, 400 GB/s between GPUs, 50 between nodes and to the host."""
    return Cluster(
        gpu=Gpu(
            name="test", kind=kind, total_bytes=gpu_bytes, free_bytes=gpu_bytes, dense_flops=dense_flops,
            memory_bytes_per_second=4e12,
        ),
        host=Host(
            total_bytes=host_bytes, available_bytes=host_bytes, num_cpus=num_cpus,
            nvme_path="/nvme" if nvme else None, nvme_free_bytes=4 << 40 if nvme else None,
            nvme_bytes_per_second=5e9 if nvme else None,
        ),
        gpus_per_node=gpus_per_node, nodes=nodes, intra_node_bytes_per_second=link, inter_node_bytes_per_second=50e9,
        host_link_bytes_per_second=50e9, described=described,
    )  # fmt: skip
