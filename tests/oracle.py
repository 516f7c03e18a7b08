"""A small known world for tests of the search: a shape, a cluster, a formula, and a noisy truth."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log

from zplan.hardware import Cluster, Gpu, Host
from zplan.model_shape import Block, ModelShape, ParameterShape
from zplan.recipe import Recipe
from zplan.trial import Evidence, Outcome, TrialResult, TrialSpec
from zplan.units import GIB
from zplan.zero_config import Choice


def toy_shape(hidden: int = 1024, layers: int = 8, vocab: int = 32000) -> ModelShape:
    """Attention and MLP as one matrix each: enough for a parameter count and a largest tensor."""
    layer = (
        ParameterShape(name="self_attn.weight", shape=(4 * hidden, hidden), kind="linear"),
        ParameterShape(name="mlp.weight", shape=(8 * hidden, hidden), kind="linear"),
    )
    embedding = ParameterShape(name="embed_tokens.weight", shape=(vocab, hidden), kind="embedding")
    return ModelShape(
        name="toy",
        model_type="llama",
        architecture="LlamaForCausalLM",
        blocks=(
            Block(role="embedding", path="", parameters=(embedding,)),
            Block(role="layer", path="model.layers.{}", parameters=layer, repeat=layers),
        ),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=hidden // 16,
        intermediate_size=4 * hidden,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def toy_cluster(*, gpu_gib: float = 24, gpus: int = 4, kind: str = "cuda", nvme: str | None = None) -> Cluster:
    """`gpus` equal devices in one host of 256 GiB."""
    gpu = Gpu(
        name="toy",
        kind="cpu" if kind == "cpu" else "cuda",
        total_bytes=int(gpu_gib * GIB),
        free_bytes=int(gpu_gib * GIB),
        dense_flops=100e12,
        memory_bytes_per_second=1e12,
        compute_capability="8.0",
    )
    host = Host(total_bytes=256 * GIB, available_bytes=240 * GIB, num_cpus=16, nvme_path=nvme)
    return Cluster(
        gpu=gpu,
        host=host,
        gpus_per_node=gpus,
        intra_node_bytes_per_second=25e9,
        host_link_bytes_per_second=20e9,
        described=True,
    )


TOY_RECIPE = Recipe(model="toy", train_batch_size=64, max_length=1024)


@dataclass
class Oracle:
    """A backend in arithmetic: `error` is how far a kind of configuration is from the formula, `noise` the scatter."""

    shape: ModelShape
    evidence: Evidence = "measured"
    error: float = 0.0
    noise: float = 0.0
    memory_error: float = 1.0
    seed: int = 0
    calls: int = 0

    def run(self, spec: TrialSpec) -> TrialResult:
        self.calls += 1
        gpu_bytes = int(self.memory_error * toy_gpu_bytes(self.shape, spec))
        if gpu_bytes > spec.cluster.gpu.free_bytes:
            return TrialResult(outcome=Outcome.GPU_OOM, evidence=self.evidence, gpu_used_bytes=gpu_bytes)
        seconds = toy_seconds(self.shape, spec) * exp(self._bias(spec.choice) + self._scatter())
        tokens = spec.recipe.train_batch_size * spec.recipe.max_length
        return TrialResult(
            outcome=Outcome.OK,
            evidence=self.evidence,
            gpu_used_bytes=gpu_bytes,
            gpu_allocated_bytes=gpu_bytes,
            host_resident_bytes=GIB,
            step_seconds=seconds,
            tokens_per_second=tokens / seconds,
        )

    def run_all(self, spec: TrialSpec, choices: Sequence[Choice]) -> list[TrialResult]:
        return [self.run(replace(spec, choice=choice)) for choice in choices]

    def _bias(self, choice: Choice) -> float:
        zero = choice.zero
        kind = f"{self.seed}{zero.stage}{zero.offload_optimizer.device}{zero.offload_param.device}"
        return self.error * (int(hashlib.sha256(kind.encode()).hexdigest()[:8], 16) / 2**31 - 1)

    def _scatter(self) -> float:
        return random.Random(f"{self.seed}-{self.calls}").gauss(0, self.noise) if self.noise else 0.0


def toy_gpu_bytes(shape: ModelShape, spec: TrialSpec) -> float:
    """2 + 2 + 12 bytes per parameter, sharded by stage, moved by offload; activations by micro-batch."""
    zero, batch, count = spec.choice.zero, spec.choice.batch, shape.num_parameters
    ranks = batch.world_size
    states = 0.0 if zero.offloads_optimizer else 12 * count / (ranks if zero.stage >= 1 else 1)
    gradients = 2 * count / (ranks if zero.stage >= 2 else 1)
    weights = 0.0 if zero.offloads_param else 2 * count / (ranks if zero.stage == 3 else 1)
    buckets = 0.0 if zero.stage == 0 else 2 * zero.reduce_bucket_size * (2 if zero.overlaps_comm else 1)
    live = 2 * min(zero.stage3_max_live_parameters, count) if zero.stage == 3 else 0
    per_token = shape.hidden_size * shape.num_hidden_layers * (2 if spec.choice.gradient_checkpointing else 34)
    activations = batch.train_micro_batch_size_per_gpu * spec.recipe.max_length * per_token
    return states + gradients + weights + buckets + live + activations


def toy_seconds(shape: ModelShape, spec: TrialSpec) -> float:
    """Compute with an occupancy that grows with the micro-batch, communication and host traffic, partly overlapped."""
    zero, batch, cluster = spec.choice.zero, spec.choice.batch, spec.cluster
    tokens = spec.recipe.train_batch_size * spec.recipe.max_length
    flops = (8 if spec.choice.gradient_checkpointing else 6) * shape.num_parameters * tokens
    occupancy = 0.55 * batch.train_micro_batch_size_per_gpu / (batch.train_micro_batch_size_per_gpu + 1.0)
    compute = flops / (cluster.gpu.dense_flops or 1e14) / batch.world_size / occupancy
    gathers = 2 * batch.gradient_accumulation_steps if zero.stage == 3 else 1
    traffic = 2 * shape.num_parameters * (gathers + 1) * (batch.world_size > 1)
    communication = traffic / (cluster.intra_node_bytes_per_second or 1e10)
    communication *= 1 + 0.1 * abs(log(max(zero.reduce_bucket_size, 1) / 5e7)) / 5
    host = 16 * shape.num_parameters / batch.world_size / (cluster.host_link_bytes_per_second or 1e10)
    moved = host * zero.offloads_optimizer + host / 4 * gathers * zero.offloads_param
    return compute + communication * (0.4 if zero.overlaps_comm else 1.0) + moved


def with_free_gpu(cluster: Cluster, free_bytes: int) -> Cluster:
    """The same cluster with another program on its GPUs."""
    return replace(cluster, gpu=replace(cluster.gpu, free_bytes=free_bytes))
