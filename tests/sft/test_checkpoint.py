"""Which checkpoint is whole: judged on files as a killed run leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sft.checkpoint import MARK, Mark, find_damage, is_whole_safetensors, list_checkpoints, newest_whole, require_whole
from zplan import files
from zplan.errors import ConfigError


def make_checkpoint(output_dir: Path, step: int, *, world_size: int = 2) -> Path:
    """The files that transformers and DeepSpeed leave at ZeRO-2."""
    folder = output_dir / f"checkpoint-{step}"
    engine = folder / f"global_step{step}"
    engine.mkdir(parents=True)
    for rank in range(world_size):
        torch.save({"step": step}, engine / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save({"step": step}, engine / "mp_rank_00_model_states.pt")
    save_file({"weight": torch.ones(64)}, folder / "model.safetensors")
    (folder / "latest").write_text(engine.name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    files.save(Mark(step=step, world_size=world_size, zero_stage=2, fingerprint="f"), folder / MARK)
    return folder


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_finished_checkpoint_is_whole(tmp_path: Path) -> None:
    assert find_damage(make_checkpoint(tmp_path, 4)) is None


@pytest.mark.parametrize(
    ("victim", "reason"),
    [
        (MARK, "does not exist"),
        ("trainer_state.json", "does not exist"),
        ("latest", "latest"),
        ("global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt", "1 of 2 optimizer shards"),
    ],
)
def test_a_missing_file_is_damage(tmp_path: Path, victim: str, reason: str) -> None:
    checkpoint = make_checkpoint(tmp_path, 4)
    (checkpoint / victim).unlink()
    assert reason in str(find_damage(checkpoint))


@pytest.mark.parametrize(
    "victim", ["global_step4/mp_rank_00_model_states.pt", "model.safetensors", "trainer_state.json"]
)
def test_a_file_that_was_cut_short_is_damage(tmp_path: Path, victim: str) -> None:
    checkpoint = make_checkpoint(tmp_path, 4)
    cut(checkpoint / victim)
    assert find_damage(checkpoint) is not None


def test_resume_falls_back_to_the_previous_whole_checkpoint(tmp_path: Path) -> None:
    older, newer = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    cut(newer / "model.safetensors")
    found, skipped = newest_whole(tmp_path)
    assert found == older
    assert skipped == ["checkpoint-10: cut short: model.safetensors"]


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    assert [item.name for item in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]


def test_a_named_checkpoint_that_is_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        require_whole(tmp_path / "checkpoint-3")
    checkpoint = make_checkpoint(tmp_path, 4)
    (checkpoint / MARK).unlink()
    with pytest.raises(ConfigError, match="is not whole"):
        require_whole(checkpoint)


def test_a_safetensors_file_is_as_long_as_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.ones(8)}, path)
    assert is_whole_safetensors(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_whole_safetensors(path)
    path.write_bytes(b"\0")
    assert not is_whole_safetensors(path)
