"""DeepSpeed JSON as other projects publish it: read or refused exactly as the installed DeepSpeed does.

tests/golden/wild.json holds the keys and values of each project's file, with its repository and path beside it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime import config as runtime

from tests.shapes import described_cluster, llama_like
from zplan.ds_config import DsConfigReading, read_ds_config
from zplan.ds_keys import SECTION_KEYS
from zplan.errors import ConfigError
from zplan.recipe import Recipe

WILD = json.loads((Path(__file__).parent / "golden" / "wild.json").read_text(encoding="utf-8"))
HIDDEN, WORLD = 4096, 8
RECIPE = Recipe(model="m", train_batch_size=16)
MENDS = ("also: ", "; delete it", "; delete the section", "; did you mean ", "; write ")
"""How a problem says what to type."""
REFUSED: tuple[type[Exception], ...] = (ValueError, AssertionError, runtime.DeepSpeedConfigError)


def ours(config: dict[str, Any]) -> DsConfigReading:
    cluster = described_cluster(gpus_per_node=WORLD, nvme=True)
    return read_ds_config(config, recipe=RECIPE, shape=llama_like(hidden_size=HIDDEN), cluster=cluster)


def theirs(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *, micro: int, accumulation: int) -> Any:
    """The configuration as the Trainer resolves it, read by DeepSpeed as one of eight ranks."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    class Lenient(HfTrainerDeepSpeedConfig):  # type: ignore[misc]
        """The file decides and the Trainer follows, as zplan reads it."""

        def fill_match(self, key: str, value: Any, *_: Any, **__: Any) -> None:
            super().fill_match(key, value, must_match=False)

    resolved = Lenient(copy.deepcopy(config))
    arguments = SimpleNamespace(
        world_size=WORLD, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0, learning_rate=2e-5, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.0,
        save_on_each_node=False, fp16=False, bf16=True, fp16_full_eval=False, bf16_full_eval=False,
        get_warmup_steps=lambda steps: 0,
    )  # fmt: skip
    resolved.trainer_config_process(arguments)
    resolved.trainer_config_finalize(arguments, SimpleNamespace(config=SimpleNamespace(hidden_size=HIDDEN)), 100)
    values = resolved.config
    if values.get("train_batch_size") is None and values.get("train_micro_batch_size_per_gpu") is None:
        values["train_micro_batch_size_per_gpu"] = micro
    if not {"bf16", "fp16"} & set(config):  # a file without either gets the Trainer's
        plugin = SimpleNamespace(deepspeed_config=values, enable_msamp=False, fill_match=lambda *_, **__: None)
        DeepSpeedPlugin.set_mixed_precision(plugin, "bf16")
    elif "bf16" not in config and config["fp16"].get("enabled") == "auto":
        values["bf16"] = {"enabled": True}
    monkeypatch.setattr(runtime.dist, "get_rank", lambda: 0)
    return runtime.DeepSpeedConfig(values, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: WORLD))


def read_or_refuse(config: dict[str, Any]) -> tuple[tuple[str, ...], DsConfigReading | None]:
    """The problems of a refused file, or what was read."""
    try:
        return (), ours(config)
    except ConfigError as error:
        return error.problems, None


@pytest.mark.parametrize("entry", WILD, ids=lambda entry: entry["source"].split(" (")[0].replace(" ", ":"))
def test_a_file_of_the_wild_is_read_or_refused_as_deepspeed_does(
    entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = entry["config"]
    refusal, reading = read_or_refuse(config)
    if reading is None:
        assert all(any(mend in problem for mend in MENDS) for problem in refusal), refusal
        if any("is not modelled" in problem for problem in refusal):
            return  # ours to refuse: DeepSpeed splits the model, and plans are data-parallel
        with pytest.raises(REFUSED):
            theirs(config, monkeypatch, micro=1, accumulation=1)
        return
    batch, zero = reading.choice.batch, reading.choice.zero
    read = theirs(
        config, monkeypatch, micro=batch.train_micro_batch_size_per_gpu, accumulation=batch.gradient_accumulation_steps
    )
    assert read.train_micro_batch_size_per_gpu == batch.train_micro_batch_size_per_gpu
    if {"train_batch_size", "gradient_accumulation_steps"} & set(config):
        assert read.train_batch_size == batch.train_batch_size * batch.autotp_size  # it counts every rank
    assert (
        reading.recipe.dtype
        == {(True, False): "bf16", (False, True): "fp16", (False, False): "fp32"}[
            read.bfloat16_config.enabled, read.float16_config.enabled
        ]
    )
    for name in zero.__dataclass_fields__:
        value = getattr(read.zero_config, name.removeprefix("stage3_"))
        mine = zero.overlaps_comm if name == "overlap_comm" else getattr(zero, name)
        if name.startswith("offload"):
            assert mine.device == (value.device if value else "none"), name
        else:
            assert mine == value, name


def test_the_wild_has_read_and_refused_files_of_many_projects() -> None:
    assert len({entry["source"].split()[0] for entry in WILD}) >= 12
    refused = sum(read_or_refuse(entry["config"])[1] is None for entry in WILD)
    assert 5 <= refused <= len(WILD) - 20


def test_the_sections_that_deepspeed_checks_have_the_keys_of_its_own_models() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    models = {
        "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config, "compile": CompileConfig,
        "comms_logger": CommsLoggerConfig, "tensorboard": TensorBoardConfig, "wandb": WandbConfig,
        "csv_monitor": CSVConfig, "comet": CometConfig, "hybrid_engine": HybridEngineConfig,
    }  # fmt: skip
    assert {name: set(model.model_fields) for name, model in models.items()} == {
        name: set(keys) for name, keys in SECTION_KEYS.items()
    }


CASES: list[tuple[dict[str, Any], str]] = [
    ({"fp16": {"enabled": True, "loss_scal": 0}}, "did you mean loss_scale?"),
    ({"bf16": True}, "bf16 is True, not a section"),
    ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "refuses it at stage 0"),
    ({"bf16": {"enabled": True, "bf16_optimizer_states": True}, "zero_optimization": {"stage": 1}}, "set both"),
    ({"wandb": {"enabled": True, "name": "x"}}, "wandb.name: DeepSpeed has no such key"),
    ({"fp16": {"enabled": True, "hysteresis": "two"}}, "fp16.hysteresis is 'two', not a number"),
    ({"compile": {"deepcompile": 3}}, "compile.deepcompile is 3, not true or false"),
    ({"tensorboard": {"job_name": 7}}, "tensorboard.job_name is 7, not a text"),
    ({"comms_logger": {"prof_ops": "all"}}, "comms_logger.prof_ops is 'all', not a list"),
    ({"fp16": None}, "fp16 is None, not a section"),
    ({"tensorboard": None}, "tensorboard is None, not a section"),
    ({"aio": 3}, "aio is 3, not a section"),
    ({"scheduler": "WarmupLR"}, "scheduler is 'WarmupLR', not a section"),
    ({"wall_clock_breakdown": "often"}, "wall_clock_breakdown is 'often'"),
    ({"train_batch_size": "16"}, "write 16 without quotes"),
    ({"zero_optimization": {"stage": 2, "zenflow": "on"}}, "zenflow is 'on', not a section"),
    ({"communication_data_type": "fp8"}, "not fp32, fp16 or bf16"),
    ({"gradient_allreduce_op": "max"}, "not mean or sum"),
    ({"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}}, '"sum" at stage 3'),
    ({"zero_optimization": {"stage": 5}}, "ZeRO has the stages"),
    (
        {"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": True}}}},
        "curriculum_learning is enabled without curriculum_metrics",
    ),
]


@pytest.mark.parametrize(("config", "words"), CASES, ids=str)
def test_what_deepspeed_refuses_is_refused_with_the_mend(
    config: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        ours(config)
    assert words in str(caught.value)
    monkeypatch.setattr(runtime.dist, "get_rank", lambda: 0)
    mpu = SimpleNamespace(get_data_parallel_world_size=lambda: WORLD)
    with pytest.raises((*REFUSED, TypeError, AttributeError)):
        runtime.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **config}, mpu=mpu)


@pytest.mark.parametrize(
    "section",
    [
        {"compile": {"deepcompile": True}},
        {"torch_autocast": {"enabled": True}},
        {"hybrid_engine": {"enabled": True}},
        {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.05}}},
        {"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}},
    ],
    ids=str,
)
def test_what_changes_memory_and_is_not_modelled_is_refused(section: dict[str, Any]) -> None:
    """An engine or an optimizer that is counted as another one would be called `fits` all the same."""
    problems, _ = read_or_refuse({"bf16": {"enabled": True}, **section})
    assert [problem for problem in problems if "is not modelled" in problem]
    for name, value in section.items():
        off = {"compile": {"deepcompile": False}, "zero_optimization": {"stage": 2}}.get(name, {})
        assert read_or_refuse({"bf16": {"enabled": True}, name: off})[0] == (), value


def test_what_deepspeed_ignores_is_read_with_a_warning_and_the_nearest_key() -> None:
    reading = ours({"gradient_cliping": 0.5, "overlap_comm": True, "fp8": {"enabled": True}})
    assert reading.warnings == (
        "gradient_cliping: DeepSpeed has no such key and ignores it; did you mean gradient_clipping?",
        "overlap_comm belongs in zero_optimization; at the top DeepSpeed ignores it",
        "fp8: DeepSpeed has no such key and ignores it",
    )
    assert reading.recipe.max_grad_norm == 1.0


def test_an_auto_that_nobody_fills_in_is_named() -> None:
    section = {"stage": "auto", "sub_group_size": "auto", "offload_optimizer": {"device": "auto"}}
    reading = ours({"zero_optimization": section})
    assert reading.choice.zero.stage == 2
    assert any("accelerate fills in 2" in warning for warning in reading.warnings)
    assert any("sub_group_size" in warning and "accelerate stops at it" in warning for warning in reading.warnings)
    assert not any("offload_optimizer.device" in warning for warning in reading.warnings)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"zero_optimization": True}, 'write {"stage": 1}'),
        ({"optimizer": None}, "optimizer is None, not a section"),
        ({"optimizer": {"type": "AdamW", "params": [1e-4]}}, "optimizer.params is"),
        ({"checkpoint": {"tag_validation": "Maybe"}}, "not Ignore, Warn or Fail"),
        ({"wall_clock_breakdown": "false"}, "wall_clock_breakdown is 'false'"),
    ],
)
def test_what_stops_the_libraries_with_an_error_of_their_own_is_named(
    section: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2, **section}
    problems, _ = read_or_refuse(config)
    assert named in "\n".join(problems)
    with pytest.raises((AttributeError, TypeError, *REFUSED)):
        theirs(config, monkeypatch, micro=2, accumulation=1)


def test_an_odd_all_gather_bucket_is_refused_as_the_engine_of_stages_1_and_2_does() -> None:
    section = {"allgather_bucket_size": 500_000_001}
    for stage, refused in ((1, True), (2, True), (3, False)):
        problems, _ = read_or_refuse({"zero_optimization": {"stage": stage, **section}})
        assert any("write 500000002" in line for line in problems) is refused
