"""A plan that was edited by hand, or whose model folder holds another model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.agreement import check_agreement, check_weights, planned_numel
from tests.sft.warm import make_plan, make_recipe
from zplan.errors import ConfigError
from zplan.zero_config import OffloadOptimizer, deepspeed_config


def check(zero: dict[str, Any] | None = None, **top: Any) -> None:
    plan = make_plan(make_recipe(Path("model"), None))
    section = {**plan.deepspeed["zero_optimization"], **(zero or {})}
    check_agreement(plan.recipe, plan.choice, {**plan.deepspeed, "zero_optimization": section, **top})


@pytest.mark.parametrize(
    ("zero", "top", "said"),
    [
        ({"stage": 3}, {}, "zero_optimization.stage is 3 in the DeepSpeed configuration and 2 in"),
        ({"reduce_bucket_size": 7}, {}, "zero_optimization.reduce_bucket_size is 7"),
        ({"stagee": 3}, {}, "zero_optimization.stagee: unknown key"),
        ({}, {"gradient_clippin": 1.0}, "gradient_clippin: unknown key"),
        ({}, {"train_batch_size": 16}, "train_batch_size is 16"),
    ],
)
def test_what_contradicts_or_is_read_by_nobody_is_named(zero: dict[str, Any], top: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(zero, **top)
    assert any(said in problem for problem in caught.value.problems)


def test_a_plan_that_shares_sequences_is_refused() -> None:
    plan = make_plan(make_recipe(Path("model"), None))
    batch = replace(plan.choice.batch, world_size=2, sequence_parallel_size=2)
    with pytest.raises(ConfigError, match="sequence_parallel_size 2"):
        check_agreement(plan.recipe, replace(plan.choice, batch=batch), plan.deepspeed)


def test_what_zplan_writes_agrees_on_both_kinds_of_machines_and_further_keys_of_deepspeed_pass() -> None:
    check()
    check({"ignore_unused_parameters": False}, wall_clock_breakdown=True)
    plan = make_plan(make_recipe(Path("model"), None), offload_optimizer=OffloadOptimizer(device="cpu"))
    check_agreement(plan.recipe, plan.choice, deepspeed_config(plan.recipe, plan.choice, cpu_adam=True))


def test_another_model_s_weights_are_refused_and_pickled_ones_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, None))
    check_weights(plan)
    other = tmp_path / "other"
    other.mkdir()
    save_file({"weight": torch.ones(64)}, other / "model.safetensors")
    with pytest.raises(ConfigError, match=r"the plan is for .* has 64"):
        check_weights(replace(plan, model_path=str(other)))
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        check_weights(replace(plan, model_path=str(other)))


@pytest.mark.parametrize("beside", ["consolidated.safetensors", "model-00002-of-00002.safetensors"])
def test_the_same_weights_in_another_layout_and_old_buffers_do_not_count(
    tiny_model_dir: Path, tmp_path: Path, beside: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    plan = replace(make_plan(make_recipe(tiny_model_dir, None)), model_path=str(folder))
    save_file({"layers.0.attention.wq.weight": torch.ones(64)}, folder / beside)
    check_weights(plan)
    whole = folder / "model.safetensors"
    tensors = load_file(whole) | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32), "h.0.attn.bias": torch.ones(1, 1, 64, 64),
    }  # fmt: skip
    save_file(tensors, whole)
    check_weights(plan)
    save_file(tensors | {"h.0.attn.c_attn.bias": torch.ones(64)}, whole)
    with pytest.raises(ConfigError, match="parameters"):
        check_weights(plan)
    save_file(tensors, whole)
    whole.rename(folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"any": "shard.safetensors"}}')
    check_weights(plan)


def test_a_damaged_index_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a readable index"):
        check_weights(replace(make_plan(make_recipe(tiny_model_dir, None)), model_path=str(tmp_path)))


def test_a_model_of_the_catalogue_is_known_by_its_parameters() -> None:
    assert planned_numel("mistral-7b") == 7_241_732_096  # as its model card and transformers count
    assert planned_numel("nobody/knows-this") is None
