"""Data that are read while training: the first ones are looked at, the rest come in turn and without end."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from sft.data import DataOptions
from sft.session import with_resume
from sft.stream import open_stream
from tests.sft.test_options import parsed
from tests.sft.test_training import losses, make_session, train
from tests.sft.warm import WarmServer, make_plan, make_recipe
from zplan import files
from zplan.errors import ConfigError

OPTIONS = DataOptions(max_length=64)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"wall {index}", "response": f"brick {index}"} for index in range(count)]


def test_a_stream_begins_again_after_its_last_row(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", *pairs(3))
    loaded = open_stream(source, tokenizer, OPTIONS, shuffled=False)
    assert loaded.stream is not None
    ids = [row["input_ids"] for row in islice(loaded.stream, 7)]
    assert ids[:3] == ids[3:6]
    assert ids[6] == ids[0] != ids[1]
    assert loaded.lengths.num_examples == 3


def test_held_out_examples_are_in_no_batch(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", *pairs(200))
    loaded = open_stream(source, tokenizer, replace(OPTIONS, eval_fraction=0.2), shuffled=True)
    assert loaded.stream is not None
    trained = [row["input_ids"] for row in islice(loaded.stream, 400)]
    assert 20 < len(loaded.held_out) < 60  # a fifth, by a hash
    assert not any(item.input_ids in trained for item in loaded.held_out)


def test_bad_rows_are_refused_or_skipped_wherever_they_are(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", *pairs(2), {"question": "?"}, *pairs(1))
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        open_stream(source, tokenizer, OPTIONS, shuffled=False)
    assert "rows.jsonl:3" in str(caught.value)
    loaded = open_stream(source, tokenizer, replace(OPTIONS, bad_rows="skip"), shuffled=False)
    assert [item.where for item in loaded.bad_rows] == ["rows.jsonl:3"]
    assert loaded.lengths.num_examples == 3


def test_a_stream_without_a_usable_row_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"question": "?"})
    with pytest.raises(ConfigError, match="has no example"):
        open_stream(source, tokenizer, replace(OPTIONS, bad_rows="skip"), shuffled=False)


def test_a_stream_needs_a_number_of_steps(tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--streaming without --max-steps"):
        parsed(tiny_model_dir, tiny_dataset, tmp_path, "--streaming")
    assert parsed(tiny_model_dir, tiny_dataset, tmp_path, "--streaming", "--max-steps", "4").streaming


def test_a_streamed_training_of_dora_adapters_resumes_like_an_unbroken_one(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset, method="lora", use_dora=True), ranks=2)
    session = make_session(plan, tmp_path, streaming=True, eval_fraction=0.1, max_steps=8, save_steps=4)
    unbroken = train(warm, session)
    (tmp_path / "training_report.json").unlink()
    (tmp_path / "checkpoint-8" / "zplan_checkpoint.json").unlink()  # as if killed while it was written
    resumed, _ = with_resume(session, None)
    assert str(resumed.resume).endswith("checkpoint-4")
    again = train(warm, resumed)
    assert losses(again) == losses(unbroken)
    assert losses(again)[-1] < losses(again)[0]
    config = files.load_json(tmp_path / "adapter_config.json")
    assert config["use_dora"]
    assert again["data"]["streaming"]
