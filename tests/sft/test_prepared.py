"""What the warm server makes once for all its trials: only of the same files, and never at the price of a fork."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft import prepared
from tests import assets
from tests.sft.warm import make_recipe, make_spec
from zplan.errors import ConfigError
from zplan.trial import TrialSpec


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(prepared, "_kept", {})
    yield
    gc.unfreeze()


def spec_of(model: Path, dataset: Path | None) -> TrialSpec:
    return make_spec(make_recipe(model, dataset))


def test_forks_have_the_tokenizer_and_the_examples_already(tiny_model_dir: Path, tiny_dataset: Path) -> None:
    spec = spec_of(tiny_model_dir, tiny_dataset)
    prepared.prepare_for_forks(spec)
    made = {name: value for name, (_, value) in prepared._kept.items()}
    assert gc.get_freeze_count() > 0
    tokenizer = prepared.load_tokenizer(spec)
    assert tokenizer is made["tokenizer"]
    assert prepared.load_examples(spec, tokenizer) is made["examples"]
    assert len(made["examples"]) == 64  # the rows of the dataset


def test_a_dataset_that_was_changed_is_read_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assets.write_jsonl(assets.tiny_rows(3), path)
    spec = spec_of(tiny_model_dir, path)
    prepared.prepare_for_forks(spec)
    assets.write_jsonl(assets.tiny_rows(5), path)
    assert len(prepared.load_examples(spec, prepared.load_tokenizer(spec))) == 5


def test_a_bad_dataset_is_told_by_the_rank_and_does_not_end_the_server(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("no json\n")
    spec = spec_of(tiny_model_dir, path)
    prepared.prepare_for_forks(spec)
    with pytest.raises(ConfigError, match="cannot be used"):
        prepared.load_examples(spec, prepared.load_tokenizer(spec))


@pytest.mark.parametrize("name", ["rows.parquet", "org/rows.jsonl"])
def test_what_arrow_or_the_hub_would_read_is_left_to_the_ranks(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    """Their readers start threads, and a process that forks must have none."""
    (tmp_path / "rows.parquet").write_bytes(b"")
    source = tmp_path / name if name.endswith("parquet") else Path(name)
    prepared.prepare_for_forks(spec_of(tiny_model_dir, source))
    assert prepared._kept == {}
