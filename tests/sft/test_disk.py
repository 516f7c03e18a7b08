"""Room on the disk: what a training is expected to write, against what it writes."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from sft.checkpoint import MARK, Mark, conversion_bytes, make_universal
from sft.disk import adapter_numel, check_adapter, check_disk, expected_writes, weight_shapes
from tests.sft.warm import make_plan, make_recipe
from zplan import files
from zplan.errors import ConfigError, DoesNotFitError

USAGE = namedtuple("USAGE", "total used free")


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10 * num_bytes, 9 * num_bytes, num_bytes))


def test_a_full_disk_is_refused_with_the_bytes_that_lack(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, None))
    writes = expected_writes(plan, merge=False)
    assert writes is not None
    assert writes.peak_bytes == 3 * writes.checkpoint_bytes
    free(monkeypatch, writes.peak_bytes - (1 << 20))
    with pytest.raises(DoesNotFitError, match=r"1\.00 MiB too little"):
        check_disk(plan, tmp_path)
    free(monkeypatch, writes.peak_bytes)
    check_disk(plan, tmp_path)


def test_checkpoints_that_are_there_need_no_room_again(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, None))
    writes = expected_writes(plan, merge=False)
    assert writes is not None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "states.pt").write_bytes(bytes(writes.checkpoint_bytes))
    free(monkeypatch, 2 * writes.checkpoint_bytes)
    check_disk(plan, tmp_path)
    free(monkeypatch, 2 * writes.checkpoint_bytes - 1)
    with pytest.raises(DoesNotFitError):
        check_disk(plan, tmp_path)


def test_converting_for_other_ranks_is_refused_before_it_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    engine = checkpoint / "global_step3"
    engine.mkdir(parents=True)
    files.save(Mark(step=3, world_size=2, zero_stage=2, fingerprint="x"), checkpoint / MARK)
    (checkpoint / "latest").write_text("global_step3")
    for rank in (0, 1):
        (engine / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(bytes(1000))
    (engine / "mp_rank_00_model_states.pt").write_bytes(bytes(300))
    assert conversion_bytes(engine) == 2 * (1000 + 1000) + 300  # slices, merged, and the model states again
    free(monkeypatch, 4299)
    with pytest.raises(DoesNotFitError, match="1 B too little"):
        make_universal(checkpoint, zero_stage=2)


def test_merging_needs_room_for_the_whole_model_and_leaving_it_out_is_offered(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, None, method="lora"))
    alone, merged = expected_writes(plan, merge=False), expected_writes(plan, merge=True)
    assert alone is not None
    assert merged is not None
    num_elements = sum(prod(shape) for shape in weight_shapes(tiny_model_dir).values())
    assert merged.merged_bytes >= num_elements * 4  # fp32
    assert alone.merged_bytes == 0
    free(monkeypatch, merged.peak_bytes - 1)
    with pytest.raises(DoesNotFitError, match="no --merge"):
        check_disk(plan, tmp_path, merge=True)
    check_disk(plan, tmp_path)


def test_dora_and_modules_trained_whole_make_checkpoints_larger(tiny_model_dir: Path) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, None, method="lora"))
    sizes = []
    for changes in ({}, {"use_dora": True}, {"use_dora": True, "modules_to_save": ("lm_head",)}):
        writes = expected_writes(replace(plan, recipe=replace(plan.recipe, **changes)), merge=False)
        assert writes is not None
        sizes.append(writes.checkpoint_bytes)
    assert sizes[0] < sizes[1] < sizes[2]


def test_weights_that_are_no_safetensors_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(ConfigError, match="not a readable safetensors"):
        weight_shapes(tmp_path)


def test_a_module_that_the_model_has_not_is_refused_with_those_it_has(tiny_model_dir: Path) -> None:
    shapes = weight_shapes(tiny_model_dir)
    for changes in ({"lora_target": ("c_attn",)}, {"modules_to_save": ("c_attn",)}):
        with pytest.raises(ConfigError, match="no module c_attn") as caught:
            check_adapter(make_recipe(tiny_model_dir, None, method="lora", **changes), shapes)
        assert "q_proj" in str(caught.value.because)
    check_adapter(make_recipe(tiny_model_dir, None, method="lora", modules_to_save=("lm_head", "norm")), shapes)


def test_a_target_may_be_the_end_of_a_path(tiny_model_dir: Path) -> None:
    shapes = weight_shapes(tiny_model_dir)
    recipe = make_recipe(tiny_model_dir, None, method="lora", lora_target=("self_attn.q_proj",))
    assert adapter_numel(shapes, recipe) == 2 * 4 * (64 + 64)  # layers * rank * (in + out)
