"""What torch may load from a checkpoint."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from sft.safe_load import ALLOWED


class ByGetattr:
    """Pickled as `getattr(owner, name)`."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (self.owner, self.name)


def loaded(path: Path, value: object) -> object:
    torch.save({"stage": value}, path)
    with torch.serialization.safe_globals(ALLOWED):
        return torch.load(path, weights_only=True)["stage"]


def test_a_stage_that_python_3_11_2_has_written_is_read(tmp_path: Path) -> None:
    assert loaded(tmp_path / "state.pt", ByGetattr(ZeroStageEnum, "gradients")) is ZeroStageEnum.gradients


@pytest.mark.parametrize("name", ["__class__", "mro", "from_bytes", "_member_map_"])
def test_nothing_else_of_the_stage_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="getattr"):
        loaded(tmp_path / "state.pt", ByGetattr(ZeroStageEnum, name))


def test_nothing_of_another_object_is_read(tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="getattr"):
        loaded(tmp_path / "state.pt", ByGetattr(torch.device("cpu"), "type"))
