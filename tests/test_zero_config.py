"""The DeepSpeed configuration that the trainer hands over."""

from __future__ import annotations

import pytest

from zplan.combinations import offload_refused
from zplan.memory.states import offloaded_state_bytes
from zplan.recipe import Optimizer, Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, ZeroConfig, deepspeed_config

BATCH = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=1)
OFFLOADED = ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(device="cpu"))


@pytest.mark.parametrize(
    ("optimizer", "forced"),
    [("adamw", True), ("adamw_8bit", True), ("lion", True), ("sgd", False), ("adafactor", False)],
)
def test_no_optimizer_turns_into_another_by_offload(optimizer: Optimizer, forced: bool) -> None:
    """accelerate's map_pytorch_optim_to_deepspeed puts DeepSpeedCPUAdam in the place of all that it does not know."""
    recipe = Recipe(model="m", train_batch_size=1, optimizer=optimizer)
    config = deepspeed_config(recipe, Choice(zero=OFFLOADED, batch=BATCH), cpu_adam=True)
    assert config["zero_force_ds_cpu_optimizer"] is forced


def test_states_on_the_host_are_those_of_cpu_adam() -> None:
    assert offloaded_state_bytes("adamw_8bit", 1000) == offloaded_state_bytes("adamw", 1000) == 8 * 1000 + 4
    assert offloaded_state_bytes("sgd", 1000) == 0


def test_only_adam_is_offloaded_in_part() -> None:
    zero = ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(device="cpu", ratio=0.5))
    assert offload_refused(zero, "adamw_8bit", on_cpu=False) is None
    for optimizer in ("sgd", "adafactor", "lion", "muon"):
        assert "DeepSpeedCPUAdam" in (offload_refused(zero, optimizer, on_cpu=False) or "")
