"""Flags -> the question: what is typed wins over a file, and what cannot be meant is refused with the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.shapes import described_cluster
from zplan import files
from zplan.answer import estimate_data
from zplan.errors import ConfigError
from zplan.job import Job, make_job
from zplan.options import WHOLE, Flags
from zplan.plan import Plan
from zplan.planner import evaluate, rank_candidates
from zplan.settings import gives_one_value
from zplan.zero_config import BatchSizes

GOLDEN = Path(__file__).parent / "golden"
CARD = {"model": "mistral-7b", "gpu": "h100-80gb", "gpus_per_node": 8}


def ask(**flags: Any) -> Job:
    return make_job(Flags(**{**CARD, **flags}), probe_shape=_never, probe_cluster=described_cluster)


def _never(*_: Any) -> Any:
    raise AssertionError("a catalogue model is not probed")


def refused(**flags: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        ask(**flags)
    assert caught.value.fix, "one thing to type"
    return caught.value


@pytest.mark.parametrize(
    ("flags", "what", "fix"),
    [
        ({"micro_batch": 0, "stage": 2}, "--micro-batch is 0", "--micro-batch 8"),
        ({"micro_batch": -3, "stage": 2}, "--micro-batch is -3", "--micro-batch 8"),
        ({"gpus_per_node": 0}, "--gpus-per-node is 0", "--gpus-per-node 8"),
        ({"gpu": None, "gpus_per_node": 0}, "--gpus-per-node is 0", "--gpus-per-node 8"),
        ({"nodes": -1}, "--nodes is -1", "--nodes 8"),
        ({"host_ram": "0"}, "--host-ram is 0", "--host-ram 64GiB"),
        ({"host_ram": "64"}, "--host-ram is 64, below 1 GiB", "--host-ram 64GiB"),
        ({"offload_optimizer": "gpu"}, "--offload-optimizer is 'gpu'", "--offload-optimizer cpu"),
        ({"offload_param": "gpu", "stage": 0}, "--offload-param is 'gpu'", "--offload-param cpu"),
        ({"offload_param": "nvme", "stage": 3}, "no NVMe drive", "--nvme 2TiB"),
        ({"offload_optimizer": "nvme", "nvme": "0"}, "no NVMe drive", "--nvme 2TiB"),
        ({"set_": ["offload_optimizer.device=nvme"]}, "no NVMe drive", "--nvme 2TiB"),
        (
            {
                "stage": 3, "offload_optimizer": "cpu", "optimizer": "sgd",
                "set_": ["offload_optimizer.super_offload=true"],
            },
            "super_offload of sgd",
            "--set offload_optimizer.super_offload=false",
        ),
        (
            {"stage": 2, "model": "qwen3-30b-a3b", "method": "lora", "use_dora": True},
            "DoRA on the stacked weights of experts",
            "--lora-target q_proj --lora-target v_proj",
        ),
        (
            {"stage": 2, "model": "qwen3-30b-a3b", "method": "lora", "lora_dropout": 0.05},
            "lora_dropout on the stacked weights of experts",
            "--lora-target q_proj --lora-target v_proj",
        ),
        (
            {"stage": 3, "offload_optimizer": "cpu", "optimizer": "muon", "set_": ["offload_optimizer.ratio=0.5"]},
            "offload_optimizer.ratio of muon",
            "--set offload_optimizer.ratio=1",
        ),
        (
            {"stage": 2, "set_": ["allgather_bucket_size=100_000_001"]},
            "write 100000002",
            "mend the lines above with --set KEY=VALUE",
        ),
        (
            {"stage": 3, "set_": ["zero_quantized_gradients=true", "reduce_scatter=false"]},
            "needs reduce_scatter",
            "mend the lines above with --set KEY=VALUE",
        ),
        (
            {"stage": 2, "set_": ["gradient_checkpointing=maybe"]},
            "not true or false",
            "--set gradient_checkpointing=true",
        ),
        ({"plan": "plan.json", "ds_config": "ds.json"}, "--plan and --ds-config", "leave one out"),
        ({"learning_rate": float("nan")}, "learning_rate is nan", "--learning-rate 2e-5"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0", "--learning-rate 2e-5"),
        ({"lora_dropout": 7.0}, "lora_dropout is 7.0", "--lora-dropout 0.05"),
        ({"stage": 2, "set_": ["reduce_bucket_size=-1"]}, "'-1', not a size", "--set reduce_bucket_size=1e8"),
        ({"stage": 2, "set_": ["autotp_size=x"]}, "autotp_size is 'x', not a whole number", "--set autotp_size=2"),
        ({"stage": 2, "set_": ["reduce_bucket_size=5.5"]}, "not a whole number", "--set reduce_bucket_size=1e8"),
        (
            {"stage": 2, "set_": ["reduce_bucket_size=1e12"]},
            "mistral-7b has 7241732096 parameters",
            "--set reduce_bucket_size=7241732096",
        ),
        ({"stage": 2, "set_": ["wonder=1"]}, "no such key", "--set reduce_bucket_size=1"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_refused_with_the_mend(flags: dict[str, Any], what: str, fix: str) -> None:
    error = refused(**flags)
    assert what in str(error)
    assert error.fix == fix


@pytest.mark.parametrize(("text", "number"), [("4096", 4096), ("4_096", 4096), ("1e6", 10**6), ("5E3", 5000), (7, 7)])
def test_whole_numbers_are_read_as_people_write_them(text: Any, number: int) -> None:
    assert WHOLE.convert(text, None, None) == number


@pytest.mark.parametrize("text", ["4k", "1.5", "nan", "inf", "", "two", "1e99"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a whole number"):
        WHOLE.convert(text, None, None)


def test_flags_win_over_a_deepspeed_json_and_are_checked_with_it() -> None:
    file = str(GOLDEN / "transformers_zero3_offload.json")
    job = ask(
        ds_config=file, stage=2, set_=["reduce_bucket_size=2e8"], micro_batch=2, train_batch_size=64, dtype="fp16"
    )
    choice = job.choice_or_refuse()
    assert (choice.zero.stage, choice.zero.reduce_bucket_size) == (2, 200_000_000)
    assert choice.batch == BatchSizes(
        train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=64 // (2 * 8), world_size=8
    )
    assert job.recipe.dtype == "fp16"
    assert job.origins["reduce_bucket_size"] == "user"
    assert any("offload_param.device has no effect at stage 2" in line for line in job.warnings)
    assert ask(ds_config=file, offload_param="none").choice_or_refuse().zero.offload_param.device == "none"
    assert ask(ds_config=file).choice_or_refuse().zero.stage == 3


def test_a_learning_rate_that_is_typed_wins_over_a_deepspeed_json(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": 5e-5}}}))
    assert ask(ds_config=str(file)).recipe.learning_rate == 5e-5
    assert ask(ds_config=str(file), learning_rate=1e-3).recipe.learning_rate == 1e-3


def test_a_search_keeps_what_a_deepspeed_json_writes_and_tunes_the_rest() -> None:
    fixed = ask(ds_config=str(GOLDEN / "transformers_zero3_offload.json")).fixed
    assert (fixed.stage, fixed.offload_optimizer, fixed.offload_param) == (3, "cpu", "cpu")
    assert "sub_group_size=1000000000" in fixed.settings
    assert not any(setting.startswith("reduce_bucket_size") for setting in fixed.settings), "it is auto in the file"
    assert fixed.micro_batch is None
    assert ask(ds_config=str(GOLDEN / "accelerate_zero2_plain.json")).fixed.micro_batch == 1


def test_a_batch_flag_that_contradicts_the_file_is_a_mismatch(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 16, "gradient_accumulation_steps": 2}))
    assert "train_batch_size is 16, but" in str(refused(ds_config=str(file), micro_batch=4))


def test_one_and_zero_are_true_and_false_for_recomputation_too() -> None:
    for text, on in (("1", True), ("0", False), ("True", True)):
        asked = ask(stage=2, set_=[f"gradient_checkpointing={text}"])
        assert asked.choice_or_refuse().gradient_checkpointing is on


def test_a_key_that_a_file_has_twice_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3, "stage": 2}}')
    job = ask(ds_config=str(file))
    assert job.choice_or_refuse().zero.stage == 2
    assert "stage is written twice: the last one counts" in job.warnings


def plan_file(folder: Path) -> str:
    job = ask(stage=2, micro_batch=1)
    plan = Plan(
        model_path="mistral-7b", recipe=job.recipe, choice=job.choice_or_refuse(), deepspeed={}, cluster=job.cluster
    )
    files.save(plan, folder / "plan.json")
    return str(folder / "plan.json")


def test_flags_win_over_a_plan(tmp_path: Path) -> None:
    path = plan_file(tmp_path)
    same = ask(model=None, plan=path)
    assert same.choice_or_refuse().zero.stage == 2
    assert same.warnings == ()
    changed = ask(model=None, plan=path, stage=3, micro_batch=2, set_=["sub_group_size=1e7"]).choice_or_refuse()
    assert (changed.zero.stage, changed.zero.sub_group_size) == (3, 10**7)
    assert changed.batch.train_micro_batch_size_per_gpu == 2
    assert changed.batch.train_batch_size == 16


def test_a_model_and_data_that_are_typed_win_over_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    job = ask(model="smollm2-135m", plan=plan_file(tmp_path), dataset="rows.jsonl")
    assert (job.shape.name, job.recipe.model) == ("smollm2-135m", "smollm2-135m")
    assert job.recipe.dataset == str(tmp_path / "rows.jsonl")
    assert ask(model=None, plan=plan_file(tmp_path)).recipe.model == "mistral-7b"


def test_a_number_of_ranks_that_is_typed_wins_over_a_plan(tmp_path: Path) -> None:
    batch = ask(model=None, plan=plan_file(tmp_path), set_=["world_size=4"]).choice_or_refuse().batch
    assert (batch.world_size, batch.train_batch_size) == (4, 16)


@pytest.mark.parametrize("setting", ["world_size=16", "world_size=0", "world_size=4,16", "world_size=1..9"])
def test_more_ranks_than_gpus_are_refused(tmp_path: Path, setting: str) -> None:
    one = {"stage": 2}, {"model": None, "plan": plan_file(tmp_path)}
    for flags in ({}, *(one if gives_one_value(setting) else ())):
        assert "and the cluster has 8 ranks" in refused(set_=[setting], **flags).what


def test_a_plan_of_another_machine_says_what_differs(tmp_path: Path) -> None:
    moved = ask(model=None, plan=plan_file(tmp_path), gpu="a100-40gb", gpus_per_node=4)
    assert moved.warnings == (
        "the plan was made for another machine: GPU h100-80gb there, a100-40gb here",
        "the plan was made for another machine: ranks 8 there, 4 here",
    )


def origins(job: Job) -> dict[str, str]:
    found = evaluate(job.shape, job.recipe, job.choice_or_refuse(), job.cluster)
    data = estimate_data(found, shape=job.shape, recipe=job.recipe, cluster=job.cluster, origins=job.origins)
    return {key: value["origin"] for key, value in data["zero"].items()}


def test_every_zero_value_tells_where_it_comes_from() -> None:
    found = origins(ask(stage=2, offload_optimizer="cpu", set_=["offload_optimizer.pin_memory=false"]))
    assert found["stage"] == found["offload_optimizer.device"] == found["offload_optimizer.pin_memory"] == "user"
    assert found["reduce_bucket_size"] == "auto"
    assert found["stage3_prefetch_bucket_size"] == found["offload_optimizer.buffer_count"] == "default"
    assert origins(ask(stage=3))["stage3_prefetch_bucket_size"] == "auto"


def test_what_the_table_chose_is_not_called_a_default_of_deepspeed() -> None:
    job = ask()
    for item in rank_candidates(job.shape, job.recipe, job.cluster):
        data = estimate_data(item, shape=job.shape, recipe=job.recipe, cluster=job.cluster, origins=job.origins)
        zero, stage = data["zero"], item.choice.zero.stage
        assert zero["stage"]["origin"] == ("tuned" if stage else "default")
        assert zero["overlap_comm"]["origin"] == ("tuned" if item.choice.zero.overlap_comm else "default")
        assert zero["sub_group_size"]["origin"] == "default"
        assert zero.get("offload_optimizer.device", {"origin": "tuned"})["origin"] == "tuned"


def test_sizes_that_are_probably_a_mistake_are_warnings(tmp_path: Path) -> None:
    assert any("beyond the model's 32768 positions" in line for line in ask(stage=2, max_length=40_000).warnings)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e9}}))
    job = ask(model="smollm2-135m", ds_config=str(file))
    assert any("reduce_bucket_size 1000000000 is larger than the model" in line for line in job.warnings)
