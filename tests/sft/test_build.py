"""zplan's names become those of transformers, TRL and PEFT; DeepSpeed's configuration stays as it is."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from accelerate.state import AcceleratorState
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from deepspeed.utils import numa
from transformers.integrations import deepspeed as integration

from sft import build, partitioned_weights
from sft.ranks import Rank, rank_variables
from tests.sft.warm import make_plan, make_recipe
from zplan.errors import ConfigError
from zplan.plan import Plan
from zplan.processes import free_port


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A process group of one: transformers asks DeepSpeed for it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank_variables(rank=0, world_size=1, port=free_port()).items():
            patch.setenv(name, value)
        patch.setenv("LOCAL_SIZE", "")  # what a rank sets goes with the world
        threads = torch.get_num_threads()
        build.init_process_group("cpu", Rank(), timeout_seconds=60)
        yield
        torch.set_num_threads(threads)
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def config(plan: Plan, out: Path, **run: Any) -> Any:
    given = {"output_dir": out, "max_steps": 1, "learning_rate": 1e-3, "seed": 1, **run}
    return build.sft_config(plan.recipe, plan.choice, plan.deepspeed, build.Run(**given), "cpu")


def test_a_rank_that_is_alone_computes_with_all_cores() -> None:
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))


def test_deepspeed_knows_the_ranks_of_a_node_without_asking_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(numa.subprocess, "check_output", lambda *args, **kwargs: asked.append(args))
    assert get_accelerator().device_count() == Rank().local_world_size
    assert not asked


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_plan_s_deepspeed_configuration_is_handed_over_as_it_is(tmp_path: Path, stage: int) -> None:
    plan = make_plan(make_recipe(tmp_path, None), stage=stage)
    args = config(plan, tmp_path)
    added = {"steps_per_print": math.inf}  # transformers silences the engine's own progress lines
    assert args.hf_deepspeed_config.config == {**plan.deepspeed, **added}


def test_batch_clipping_and_length_are_the_recipe_s(tmp_path: Path) -> None:
    plan = make_plan(make_recipe(tmp_path, None, max_grad_norm=0.3))
    args = config(plan, tmp_path)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
    assert args.max_grad_norm == plan.deepspeed["gradient_clipping"] == 0.3
    assert args.max_length == 64
    assert not args.bf16


def test_checkpointing_is_reentrant_only_where_peft_and_zero3_need_it(tmp_path: Path) -> None:
    def reentrant(method: str, stage: int) -> object:
        plan = make_plan(make_recipe(tmp_path, None, method=method), stage=stage)
        args = config(plan, tmp_path)
        return args.activation_checkpointing_kwargs["use_reentrant"]

    assert [reentrant("full", 2), reentrant("lora", 2), reentrant("full", 3), reentrant("lora", 3)] == [
        False,
        False,
        False,
        True,
    ]


def test_every_optimizer_of_the_table_is_one_of_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert set(build.OPTIM.values()) <= {item.value for item in OptimizerNames}


def test_muon_is_deepspeed_s_and_needs_no_optimizer_of_transformers(tmp_path: Path) -> None:
    plan = make_plan(make_recipe(tmp_path, None, optimizer="muon"), stage=2)
    args = config(plan, tmp_path)
    assert args.hf_deepspeed_config.config["optimizer"] == {"type": "Muon", "params": {"lr": 1e-3}}
    assert (
        make_plan(plan.recipe, stage=3).deepspeed["zero_optimization"]["reduce_scatter"] is False
    )  # stage3.py refuses


def test_lora_targets_are_all_linear_or_names() -> None:
    recipe = make_recipe(Path("m"), None, method="lora", lora_target=("q_proj", "v_proj"), modules_to_save=("lm_head",))
    lora = build.peft_config(recipe)
    assert lora is not None
    assert set(lora.target_modules) == {"q_proj", "v_proj"}
    assert lora.modules_to_save == ["lm_head"]
    every = build.peft_config(make_recipe(Path("m"), None, method="lora"))
    assert every is not None
    assert every.target_modules == "all-linear"
    assert build.peft_config(make_recipe(Path("m"), None)) is None


def test_a_model_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model can be loaded"):
        build.load_model(str(tmp_path), make_recipe(tmp_path, None), weights="real")
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        build.load_tokenizer(str(tmp_path))


def test_code_of_the_model_folder_runs_only_when_asked(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n"
    )
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as caught:
        build.load_model(str(folder), make_recipe(folder, None), weights="real")
    assert "--trust-remote-code" in str(caught.value.fix)
    assert not (tmp_path / "ran").exists()
    build.load_model(str(folder), make_recipe(folder, None), weights="real", trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_random_weights_under_zero_3_are_made_where_they_stay(tiny_model_dir: Path, tmp_path: Path) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, None), stage=3)
    args = config(plan, tmp_path)
    before = deepspeed.zero.Init._zero_init_param, integration.initialize_weights_zero3
    gathers: list[int] = []

    class Counted(deepspeed.zero.GatheredParameters):  # type: ignore[misc]
        def __init__(self, params: Any, **kwargs: Any) -> None:
            gathers.append(sum(parameter.ds_numel for parameter in params))
            super().__init__(params, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.zero, "GatheredParameters", Counted)
        model = build.load_model(str(tiny_model_dir), plan.recipe, weights="random")
    assert args.hf_deepspeed_config.is_zero3()
    assert (deepspeed.zero.Init._zero_init_param, integration.initialize_weights_zero3) == before
    for name, parameter in model.named_parameters():
        part = parameter.ds_tensor
        if "norm" in name:
            assert torch.equal(part, torch.ones_like(part))
        else:  # within five standard errors of a deviation
            assert float(part.std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * part.numel()))
    largest = max(parameter.ds_numel for parameter in model.parameters())
    assert sum(numel >= largest for numel in gathers) == 1  # for the peak of the load phase
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


def test_a_model_that_makes_its_weights_in_its_own_way_is_left_to_transformers(tiny_model_dir: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(tiny_model_dir))
    for parameter in model.parameters():
        parameter.ds_tensor, parameter.ds_secondary_tensor = torch.zeros(1), None
        parameter.ds_tensor.status = PartitionedParamStatus.AVAILABLE
    assert partitioned_weights._can_be_filled(model)
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "_init_weights", lambda self, module: None)
        partitioned_weights.filling(asked.append)(model)
    assert asked == [model]
    next(iter(model.parameters())).ds_tensor.status = PartitionedParamStatus.NOT_AVAILABLE  # it lies on NVMe
    assert not partitioned_weights._can_be_filled(model)
