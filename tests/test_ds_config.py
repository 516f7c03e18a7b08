"""DeepSpeed JSON from the wild: what is understood, what is refused, and that DeepSpeed itself agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shapes import described_cluster, llama_like
from zplan.ds_config import DsConfigReading, load_ds_config, read_ds_config
from zplan.ds_keys import OFFLOAD_KEYS, REMOVED_KEYS, REMOVED_ZERO_KEYS, TOP_KEYS, ZERO_KEYS
from zplan.errors import ConfigError
from zplan.files import load_json
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes

GOLDEN = Path(__file__).parent / "golden"
SHAPE = llama_like(hidden_size=4096)


def read(data: Any, **more: Any) -> DsConfigReading:
    recipe = more.pop("recipe", Recipe(model="m", train_batch_size=16))
    cluster = described_cluster(kind=more.pop("device_kind", "cuda"))
    return read_ds_config(data, recipe=recipe, shape=SHAPE, cluster=cluster, **more)


def load(name: str, **more: Any) -> DsConfigReading:
    recipe = Recipe(model="m", train_batch_size=16)
    return load_ds_config(GOLDEN / name, recipe=recipe, shape=SHAPE, cluster=described_cluster(), **more)


def problems(data: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(data, **more)
    return "\n".join(caught.value.problems)


def zero(**section: Any) -> dict[str, Any]:
    return {"zero_optimization": section}


def test_the_zero2_example_of_transformers_is_read_as_it_stands() -> None:
    reading = load("transformers_zero2_offload.json", micro_batch=2)
    section = reading.choice.zero
    assert section.stage == 2
    assert section.offload_optimizer.device == "cpu"
    assert section.reduce_bucket_size == 2 * 10**8
    assert section.overlaps_comm
    assert reading.choice.batch == BatchSizes(
        train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1, world_size=8
    )
    assert reading.recipe.dtype == "bf16", "fp16 auto follows the Trainer"
    assert reading.warnings == (
        "allgather_bucket_size has no effect: torch has all_gather_into_tensor (runtime/utils.py)",
    )


def test_auto_is_resolved_as_transformers_resolves_it() -> None:
    reading = load("transformers_zero3_offload.json")
    section = reading.choice.zero
    assert section.reduce_bucket_size == 4096 * 4096
    assert section.stage3_prefetch_bucket_size == int(0.9 * 4096 * 4096)
    assert section.stage3_param_persistence_threshold == 10 * 4096
    assert reading.origins["reduce_bucket_size"] == "auto"
    assert reading.origins["sub_group_size"] == "user"
    assert section.stage3_gather_16bit_weights_on_model_save
    assert reading.warnings == ()


def test_unprefixed_stage3_keys_are_read_with_a_warning() -> None:
    reading = load("axolotl_zero3_unprefixed.json")
    assert reading.choice.zero.stage3_max_live_parameters == 0
    assert reading.choice.zero.stage3_gather_16bit_weights_on_model_save
    assert sum("DeepSpeed reads it as stage3_" in warning for warning in reading.warnings) == 3


def test_explicit_sizes_override_the_recipe() -> None:
    reading = load("accelerate_zero2_plain.json")
    assert reading.choice.batch.train_batch_size == 1 * 2 * 8
    assert reading.recipe.max_grad_norm == 0.5
    assert reading.choice.zero.reduce_bucket_size == 500_000_000
    assert any("offload_param.device has no effect at stage 2" in warning for warning in reading.warnings)


def test_every_mistake_of_a_file_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load("full_of_mistakes.json")
    text = str(caught.value)
    for part in (
        "4 x gradient_accumulation_steps 2 x world_size 8 = 64",
        "bf16 and fp16 are both enabled",
        "did you mean gradient_clipping?",
        "Apex AMP",
        "overlap_comm belongs in zero_optimization",
        "write 500000000 without quotes",
        "did you mean allgather_bucket_size?",
        "did you mean stage3_max_live_parameters?",
        "MiCS has been removed",
        "buffer_count belongs in offload_optimizer",
        "offload_optimizer.device is 'gpu', not none, cpu or nvme",
        "offload_optimizer.ratio is 2, not between 0 and 1",
    ):
        assert part in text, part
    assert caught.value.exit_code == 2


def test_knobs_that_do_nothing_are_named() -> None:
    warnings = read(zero(stage=2, sub_group_size=10**8, stage3_max_live_parameters=1)).warnings
    assert warnings == (
        "sub_group_size has no effect at stage 2",
        "stage3_max_live_parameters has no effect at stage 2",
    )
    nvme = read(zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"})).warnings
    assert "offload_optimizer.device nvme acts as cpu at stage 2: no file is written" in nvme


def test_partial_offload_below_stage_3_is_refused() -> None:
    assert "partial offload is for stage 3" in problems(
        zero(stage=2, offload_optimizer={"device": "cpu", "ratio": 0.5})
    )


def test_dtypes_of_gradients_are_read_and_stage_0_takes_one() -> None:
    types = {"data_types": {"grad_accum_dtype": "torch.float32"}, "communication_data_type": "FP16"}
    found = read({**zero(stage=3), **types}).recipe
    assert (found.grad_accum_dtype, found.communication_data_type) == ("fp32", "fp16")
    with pytest.raises(ConfigError, match=r"grad_accum_dtype is .* at stage 0"):
        read({**zero(stage=0), **types})
    with pytest.raises(ConfigError, match="communication_data_type is 'float16', not fp32, fp16 or bf16"):
        read({**zero(stage=3), "communication_data_type": "float16"})


def test_quantized_gradients_without_reduce_scatter_are_refused() -> None:
    with pytest.raises(ConfigError, match="zero_quantized_gradients needs reduce_scatter"):
        read(zero(stage=3, zero_quantized_gradients=True, reduce_scatter=False))


def test_quantized_communication_is_refused_on_cpu_ranks() -> None:
    section = zero(stage=3, zero_quantized_weights=True)
    assert "CUDA quantizer" in problems(section, device_kind="cpu")
    assert read(section).choice.zero.zero_quantized_weights


def test_deprecated_keys_still_act() -> None:
    reading = read(zero(stage=2, cpu_offload=True))
    assert reading.choice.zero.offload_optimizer.device == "cpu"
    assert any("cpu_offload is deprecated" in warning for warning in reading.warnings)
    assert "refuses it next to" in problems(zero(stage=2, cpu_offload=True, offload_optimizer={"device": "cpu"}))


def test_a_grad_norm_that_is_not_computed_cannot_clip() -> None:
    section = {**zero(stage=2, compute_grad_norm=False), "gradient_clipping": 1.0}
    assert "set gradient_clipping to 0" in problems(section)
    assert read({**section, "gradient_clipping": 0}).recipe.max_grad_norm == 0


@pytest.mark.parametrize("junk", [[], 3, "text", None])
def test_a_file_that_is_no_object_is_refused(junk: Any) -> None:
    with pytest.raises(ConfigError, match="is not a DeepSpeed configuration"):
        read(junk)


ACCEPT_OR_REFUSE: list[dict[str, Any]] = [
    {},
    {"stage": 2},
    {"stage": "2"},
    {"stage": 2.0},
    {"stage": 4},
    {"stage": None},
    {"stage": True},
    {"reduce_bucket_size": 5e8},
    {"reduce_bucket_size": "5e8"},
    {"reduce_bucket_size": "500000000"},
    {"reduce_bucket_size": "5_000"},
    {"reduce_bucket_size": 5.5},
    {"reduce_bucket_size": 0},
    {"reduce_bucket_size": None},
    {"reduce_bucket_size": True},
    {"allgather_bucket_size": 0},
    {"sub_group_size": -1},
    {"sub_group_size": 1e20},
    {"overlap_comm": "yes"},
    {"overlap_comm": 1},
    {"overlap_comm": 2},
    {"overlap_comm": None},
    {"contiguous_gradients": None},
    {"stage": 3, "max_live_parameters": 1e8},
    {"stage": 3, "max_live_parameters": 1e8, "stage3_max_live_parameters": 1e8},
    {"stage": 3, "stage3_max_live_paramters": 1e8},
    {"ratio": 1},
    {"cpu_offload_params": True},
    {"cpu_offload_use_pin_memory": True},
    {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}},
    {"offload_optimizer": None},
    {"offload_optimizer": False},
    {"offload_optimizer": "cpu"},
    {"offload_optimizer": {"device": "auto", "pin_memory": "auto"}},
    {"offload_optimizer": {"device": "cpu", "buffer_size": 1e8}},
    {"offload_optimizer": {"device": "cpu", "ratio": 0.5}, "stage": 2},
    {"offload_optimizer": {"device": "cpu", "ratio": "0.5"}, "stage": 3},
    {"offload_optimizer": {"device": "cpu", "ratio": 1.5}, "stage": 3},
    {"offload_param": {"device": "gpu"}, "stage": 3},
    {"offload_param": {"device": "cpu", "nvme_path": 3}, "stage": 3},
    {"compute_grad_norm": False, "stage": 3},
    {"zero_hpz_partition_size": 0},
]


@pytest.mark.parametrize("section", ACCEPT_OR_REFUSE, ids=str)
def test_deepspeed_accepts_and_refuses_the_same_sections(section: dict[str, Any]) -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    try:
        theirs = config.DeepSpeedZeroConfig(**section)
    except (ValueError, AssertionError):
        assert problems(zero(**section))
        return
    ours = read(zero(**section)).choice.zero
    assert ours.stage == theirs.stage
    assert ours.overlaps_comm == theirs.overlap_comm
    assert ours.reduce_bucket_size == theirs.reduce_bucket_size
    assert ours.stage3_max_live_parameters == theirs.max_live_parameters
    offload = theirs.offload_optimizer
    assert ours.offload_optimizer.device == (offload.device if offload else "none")
    assert ours.offload_optimizer.ratio == (offload.ratio if offload else 1.0)


def test_the_defaults_are_deepspeeds_own() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    theirs, ours = config.DeepSpeedZeroConfig(stage=3), read(zero(stage=3)).choice.zero
    for name in ours.__dataclass_fields__:
        if not name.startswith("offload"):
            value = theirs.overlap_comm if name == "overlap_comm" else getattr(theirs, name.removeprefix("stage3_"))
            assert value == (ours.overlaps_comm if name == "overlap_comm" else getattr(ours, name)), name


def test_deepspeeds_source_reads_every_key_that_is_let_through_at_the_top() -> None:
    runtime = Path(pytest.importorskip("deepspeed").__file__).parent
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("runtime", "comm", "monitor", "profiling", "autotuning", "utils")
        for path in (runtime / folder).rglob("*.py")
    )
    missing = [key for key in TOP_KEYS if f'"{key}"' not in source and f"'{key}'" not in source]
    assert missing == []


def test_the_removed_features_are_those_that_deepspeed_names() -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    assert set(REMOVED_KEYS) == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(REMOVED_ZERO_KEYS) == set(config._REMOVED_ZERO_CONFIG_KEYS)


def test_every_zero_key_of_deepspeed_is_known() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    fields = config.DeepSpeedZeroConfig.model_fields
    assert {field.alias or name for name, field in fields.items()} == set(ZERO_KEYS)
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config")
    assert set(offload.DeepSpeedZeroOffloadOptimizerConfig.model_fields) == set(OFFLOAD_KEYS["offload_optimizer"])
    assert set(offload.DeepSpeedZeroOffloadParamConfig.model_fields) == set(OFFLOAD_KEYS["offload_param"])


def test_a_rate_of_zero_is_read_and_a_batch_of_billions_is_a_problem() -> None:
    assert read({"optimizer": {"type": "Adam", "params": {"lr": 0}}}).recipe.learning_rate == 0
    assert "write a smaller one" in problems({"train_micro_batch_size_per_gpu": 1 << 31})


SPECIAL = st.sampled_from(["auto", "inf", "nan", "5e8", -1, 1e300])
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "inf", "nan"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["device", "enabled", "x"]), inner),
    max_leaves=4,
)


@given(
    st.dictionaries(st.sampled_from([*TOP_KEYS, "zero", ""]), JUNK, max_size=4),
    st.dictionaries(st.sampled_from([*ZERO_KEYS, "stge", ""]), JUNK, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_junk_is_read_or_refused_and_never_crashes(top: dict[str, Any], section: dict[str, Any]) -> None:
    try:
        read({**top, "zero_optimization": section})
    except ConfigError as error:
        refused = error.problems
    else:
        refused = ("nothing",)
    assert refused


def test_ranks_that_share_sequences_divide_the_batch() -> None:
    data = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "sequence_parallel_size": 4}
    reading = read({**data, "train_batch_size": 2 * 3 * 8 // 4})
    assert reading.choice.batch.sequence_parallel_size == 4
    assert reading.choice.batch.data_parallel_size == 2
    assert any("ParallelismConfig" in line for line in reading.warnings)
    assert "world_size 8 / sequence_parallel_size 4 = 12; write 12" in problems({**data, "train_batch_size": 48})


def test_sequences_that_deepspeed_does_not_share_are_refused() -> None:
    assert "does not divide world_size 8" in problems({"sequence_parallel_size": 3})
    assert "attention heads" in problems({"sequence_parallel_size": 8})  # the shape has four
    eager = Recipe(model="m", train_batch_size=16, attention="eager", max_length=1022)
    said = problems({"sequence_parallel_size": 4}, recipe=eager)
    assert "eager attention" in said
    assert "max_length 1022 is not divisible by 4; --max-length 1020" in said


def test_deepspeed_counts_every_rank_of_autotp_and_the_plan_what_is_trained() -> None:
    full = Recipe(model="m", train_batch_size=16, loss="full")
    data = {"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": 4}}
    reading = read({**data, "gradient_accumulation_steps": 3, "train_batch_size": 2 * 3 * 8}, recipe=full)
    assert reading.choice.batch.autotp_size == 4
    assert reading.choice.batch.data_parallel_size == 2
    assert reading.recipe.train_batch_size == 2 * 3 * 2
    assert read({"tensor_parallel": {"autotp_size": 4}}, recipe=full).recipe.train_batch_size == 16


def test_what_autotp_cannot_cut_or_is_not_modelled_is_refused() -> None:
    full = Recipe(model="m", train_batch_size=16, loss="full")
    assert "does not divide world_size 8" in problems({"tensor_parallel": {"autotp_size": 3}}, recipe=full)
    own = {"autotp_size": 2, "preset_model": "llama"}
    assert "tensor_parallel.preset_model is not modelled" in problems({"tensor_parallel": own}, recipe=full)
    both = {"tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 2}
    assert "delete one" in problems(both, recipe=full)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_accelerate_cannot_read_is_refused_with_the_encoding_to_save_it_in(
    encoding: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}}', encoding=encoding)
    with pytest.raises(ConfigError) as caught:
        load_json(path)
    assert caught.value.fix == "save it as UTF-8 without BOM"
    theirs = pytest.importorskip("accelerate.utils.deepspeed").HfDeepSpeedConfig
    with pytest.raises(ValueError, match=r"BOM|codec"):
        theirs(str(path))
