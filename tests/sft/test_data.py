"""Rows of every schema, masks that keep the stop token, truncation, splits, and data that nobody can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.data import IGNORED, DataOptions, Example, draw_examples, load_data, split
from sft.preflight import check_data
from sft.render import Renderer
from sft.schema import Conversation, Message, PlainText, SchemaError, parse_row
from tests import assets
from zplan.errors import ConfigError

ROWS: dict[str, dict[str, Any]] = {
    "prompt and response": {"prompt": "Which wall?", "response": "A wall of brick."},
    "prompt and completion": {"prompt": "Which wall?", "completion": "A wall of brick."},
    "alpaca": {"instruction": "Which wall?", "input": "", "output": "A wall of brick."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Which wall?"}, {"from": "gpt", "value": "A wall of brick."}]
    },
    "messages": {
        "messages": [{"role": "user", "content": "Which wall?"}, {"role": "assistant", "content": "A wall of brick."}]
    },
}
MULTI_TURN = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Which wall?"},
        {"role": "assistant", "content": "Brick."},
        {"role": "user", "content": "Which roof?"},
        {"role": "assistant", "content": "Clay."},
    ]
}


def load_one(tokenizer: Any, tmp_path: Path, row: dict[str, Any], **options: Any) -> Example:
    path = assets.write_jsonl([row], tmp_path / "one.jsonl")
    (example,) = load_data(str(path), tokenizer, DataOptions(**{"max_length": 128, **options})).train
    return example


def learnt_text(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))


@pytest.mark.parametrize("schema", ROWS)
def test_every_schema_gives_the_same_example(tokenizer: Any, tmp_path: Path, schema: str) -> None:
    example = load_one(tokenizer, tmp_path, ROWS[schema])
    assert example == load_one(tokenizer, tmp_path, ROWS["messages"])


@pytest.mark.parametrize("schema", ROWS)
def test_only_the_answer_and_its_stop_token_are_learnt(tokenizer: Any, tmp_path: Path, schema: str) -> None:
    assert learnt_text(tokenizer, load_one(tokenizer, tmp_path, ROWS[schema])) == "A wall of brick.<|im_end|>"


def test_the_stop_token_stays_in_the_loss_although_it_is_the_pad_token(tokenizer: Any, tmp_path: Path) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    short = load_one(tokenizer, tmp_path, ROWS["messages"])
    long = load_one(tokenizer, tmp_path, MULTI_TURN)
    rows = [{"input_ids": item.input_ids, "labels": item.labels} for item in (short, long)]
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    learnt = batch["labels"][0][batch["labels"][0] != IGNORED]
    assert learnt[-1] == tokenizer.eos_token_id
    assert (batch["labels"][0][len(short.labels) :] == IGNORED).all()


def test_every_assistant_turn_is_learnt_without_generation_marks(tokenizer: Any, tmp_path: Path) -> None:
    assert "generation %}" not in tokenizer.chat_template
    assert learnt_text(tokenizer, load_one(tokenizer, tmp_path, MULTI_TURN)) == "Brick.<|im_end|>Clay.<|im_end|>"


def test_loss_on_everything_learns_the_question_too(tokenizer: Any, tmp_path: Path) -> None:
    example = load_one(tokenizer, tmp_path, ROWS["alpaca"], loss_on="everything")
    assert "Which wall?" in learnt_text(tokenizer, example)


def test_plain_text_is_learnt_to_its_end(tokenizer: Any, tmp_path: Path) -> None:
    example = load_one(tokenizer, tmp_path, {"text": "A wall of brick."})
    assert learnt_text(tokenizer, example) == "A wall of brick.<|im_end|>"


def test_a_response_template_stands_in_for_a_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    example = load_one(tokenizer, tmp_path, ROWS["alpaca"], response_template="\n\n### Response:\n")
    assert learnt_text(tokenizer, example) == "A wall of brick.<|im_end|>"
    assert "### Response:" in tokenizer.decode(example.input_ids)


def test_a_template_that_rewrites_earlier_turns_still_finds_the_answers(tokenizer: Any) -> None:
    class Reasoning:
        """A tokenizer whose template shows reasoning in the last turn only, as Qwen3's does."""

        eos_token = "<|im_end|>"
        chat_template = "x"
        all_special_tokens = ("<|im_end|>",)

        def apply_chat_template(
            self, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
        ) -> str:
            text = ""
            for index, turn in enumerate(turns):
                thought = "<think></think>" if turn["role"] == "assistant" and index == len(turns) - 1 else ""
                text += f"<{turn['role']}>{thought}{turn['content']}<|im_end|>\n"
            return text + ("<assistant>" if add_generation_prompt else "")

    example = parse_row(MULTI_TURN)
    rendered = Renderer(Reasoning()).render(example)
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["Brick.<|im_end|>", "<think></think>Clay.<|im_end|>"]


def test_columns_of_other_names_are_named_by_flag(tokenizer: Any, tmp_path: Path) -> None:
    example = load_one(
        tokenizer, tmp_path, {"q": "Which wall?", "a": "A wall of brick."}, prompt_key="q", response_key="a"
    )
    assert example == load_one(tokenizer, tmp_path, ROWS["messages"])


def test_an_alpaca_input_follows_the_instruction() -> None:
    row = parse_row({"instruction": "Translate.", "input": "brick", "output": "Ziegel"})
    assert isinstance(row, Conversation)
    assert row.messages[0] == Message("user", "Translate.\n\nbrick")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "reply": "b"}, "columns question, reply are in no known schema"),
        ({"prompt": "a", "response": ""}, "response is empty"),
        ({"prompt": "a", "response": 3}, "response is int, not text"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "turn 0 is by 'wizard'"),
        ({"text": None}, "text is NoneType, not text"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        parse_row(row)


def test_a_row_of_text_is_plain_text() -> None:
    assert parse_row({"text": "a"}) == PlainText("a")


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


GOOD = json.dumps(ROWS["alpaca"]).encode()
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n\n", "is empty"),
    "columns.jsonl": (b'{"a": "b"}\n', "columns a are in no known schema"),
    "latin1.jsonl": (GOOD + b'\n{"prompt": "caf\xe9", "response": "b"}\n', r"latin1.jsonl:2: not UTF-8 .*0xe9"),
    "digits.jsonl": (b'{"prompt": ' + b"1" * 5000 + b"}", "digits.jsonl:1: not JSON"),
    "cut.jsonl": (GOOD + b'\n{"prompt": "a", "resp', "cut.jsonl:2: not JSON"),
    "list.jsonl": (b"[1, 2]\n", "a JSON object is needed, not list"),
    "huge.jsonl": (b'{"text": "' + b"x" * (10 << 20) + b'"}\n', "huge.jsonl:1: 10485773 bytes in one line"),
    "broken.json": (b"{", "is not JSON"),
    "latin1.json": (b'["\xe9"]', "is not UTF-8"),
    "broken.parquet": (b"PAR1 no", "is not a readable Parquet file"),
    "short.csv": (b"prompt,response\na\n", "short.csv:2: 2 columns in the header"),
    "data.xlsx": (b"PK", "has the suffix .xlsx"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_data_that_cannot_be_used_is_refused_by_place(tokenizer: Any, tmp_path: Path, name: str) -> None:
    content, reason = BROKEN[name]
    with pytest.raises(ConfigError, match=reason):
        load_data(write(tmp_path / name, content), tokenizer, DataOptions(max_length=64))


def test_a_missing_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_data(str(tmp_path / "none.jsonl"), tokenizer, DataOptions(max_length=64))


def test_bad_rows_can_be_skipped_and_are_reported(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "mixed.jsonl", GOOD + b"\nnonsense\n" + GOOD + b"\n")
    loaded = load_data(source, tokenizer, DataOptions(max_length=64, bad_rows="skip"))
    assert len(loaded.train) == 2
    assert [row.where for row in loaded.bad_rows] == ["mixed.jsonl:2"]


def test_no_label_left_after_truncation_names_the_length_that_is_needed(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "long.jsonl", GOOD)
    with pytest.raises(ConfigError, match=r"no example .* has an answer within max_length 4") as caught:
        load_data(source, tokenizer, DataOptions(max_length=4))
    needed = int(str(caught.value.fix).split()[-1])
    assert load_data(source, tokenizer, DataOptions(max_length=needed)).num_truncated == 0


def test_truncation_is_counted(tokenizer: Any, tiny_dataset: Path) -> None:
    loaded = load_data(str(tiny_dataset), tokenizer, DataOptions(max_length=48))
    assert loaded.num_truncated > 0
    assert loaded.lengths.max_tokens == 48


def test_json_csv_parquet_and_a_folder_hold_the_same_examples(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = assets.tiny_rows(8)
    folder = tmp_path / "folder"
    folder.mkdir()
    assets.write_jsonl(rows, folder / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text(
        "prompt,response\n" + "".join(f'"{row["prompt"]}","{row["response"]}"\n' for row in rows)
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = load_data(str(folder / "a.jsonl"), tokenizer, DataOptions(max_length=128)).train
    for source in (folder, tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "a.parquet"):
        assert load_data(str(source), tokenizer, DataOptions(max_length=128)).train == expected


def test_a_split_is_the_same_every_time_and_never_shares_a_question() -> None:
    examples = [Example([index], [index], f"question {index % 20}") for index in range(60)]
    train, held_out = split(examples, fraction=0.2, seed=7)
    assert (train, held_out) == split(examples, fraction=0.2, seed=7)
    assert {item.key for item in held_out} & {item.key for item in train} == set()
    assert len({item.key for item in held_out}) == 4  # 20 questions * 0.2
    assert len(train) + len(held_out) == 60


def test_drawn_examples_begin_anew_when_all_are_used() -> None:
    data = [Example([1, 2], [1, 2], "a"), Example([3], [3], "b")]
    drawn = draw_examples(data, 5, max_length=9, seed=0, packing=False)
    assert len(drawn) == 5
    assert {row.key for row in drawn[:2]} == {row.key for row in drawn[2:4]} == {"a", "b"}
    assert draw_examples([], 5, max_length=9, seed=0, packing=False) == ()


def test_drawn_examples_fill_so_many_packed_sequences() -> None:
    data = [Example([1, 2], [1, 2], "a"), Example([3], [3], "b")]
    assert sum(len(row.input_ids) for row in draw_examples(data, 2, max_length=9, seed=0, packing=True)) >= 2 * 9


def test_a_folder_is_read_to_its_depth_and_a_saved_dataset_by_its_train_split(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    rows = assets.tiny_rows(4)
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    assets.write_jsonl(rows[:2], tmp_path / "folder" / "a.jsonl")
    assets.write_jsonl(rows[2:], tmp_path / "folder" / "deeper" / "b.jsonl")
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    first, second = (
        load_data(str(tmp_path / name), tokenizer, DataOptions(max_length=128)).train for name in ("folder", "saved")
    )
    assert first == second
    assert len(first) == 4


def test_a_folder_never_trains_on_its_test_split_unnoticed(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("latest.jsonl", "train.jsonl", "test-00000.jsonl"):
        assets.write_jsonl(assets.tiny_rows(2), tmp_path / name)
    with pytest.raises(ConfigError, match=r"test-00000\.jsonl looks like none to train on"):
        load_data(str(tmp_path), tokenizer, DataOptions(max_length=128))
    (tmp_path / "test-00000.jsonl").unlink()
    assert len(load_data(str(tmp_path), tokenizer, DataOptions(max_length=128)).train) == 2 + 2


def test_everything_is_learnt_without_a_second_stop_token(tokenizer: Any, tmp_path: Path) -> None:
    example = load_one(tokenizer, tmp_path, ROWS["messages"], loss_on="everything")
    assert learnt_text(tokenizer, example).endswith("A wall of brick.<|im_end|>\n")
    text = load_one(tokenizer, tmp_path, {"text": "A wall."})
    assert learnt_text(tokenizer, text) == "A wall.<|im_end|>"


def test_one_question_cannot_be_split(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing can be held out"):
        load_one(tokenizer, tmp_path, ROWS["messages"], eval_fraction=0.5)


@pytest.mark.parametrize(
    ("lines", "skip_bad", "said"),
    [
        (['{"q": "a", "a": "b"}'], True, "1 of the first 1 rows"),
        (['{"prompt": "a", "response": "b"}', "{"], False, "1 of the first 2 rows"),
        ([""], True, "is empty"),
    ],
)
def test_rows_that_nobody_can_use_are_refused_before_a_rank_starts(
    tmp_path: Path, lines: list[str], skip_bad: bool, said: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=said):
        check_data(str(path), skip_bad=skip_bad)


def test_bad_rows_that_are_to_be_skipped_and_other_column_names_pass(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"q": "a", "a": "b"}\n{')
    check_data(str(path), skip_bad=True, prompt_key="q", response_key="a")
