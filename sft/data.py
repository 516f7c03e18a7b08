"""Rows -> tokenised examples with labels, split, counted and reported.

The examples carry `input_ids` and `labels` (-100 where nothing is learnt), which TRL 1.16 takes as they are.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset, IterableDataset

from sft.render import Rendered, Renderer
from sft.rows import BadRow, Row, read_rows
from sft.schema import Conversation, PlainText, SchemaError, parse_row
from zplan.errors import ConfigError

IGNORED = -100
"""torch.nn.CrossEntropyLoss.ignore_index."""
_SHOWN = 10
_SHORT_TOKENS = 8
"""Matrices are read and written whatever a step is fed."""
_BATCH = 512

BadRows = Literal["refuse", "skip"]
LossOn = Literal["answers", "everything"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """How a source becomes examples."""

    max_length: int
    seed: int = 42
    eval_fraction: float = 0.0
    bad_rows: BadRows = "refuse"
    loss_on: LossOn = "answers"
    prompt_key: str | None = None
    response_key: str | None = None
    response_template: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example."""

    input_ids: list[int]
    labels: list[int]
    key: str

    @property
    def num_label_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStatistics:
    """Tokens per example, after truncation."""

    num_examples: int
    total_tokens: int
    label_tokens: int
    min_tokens: int
    median_tokens: int
    p95_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What the trainer trains and evaluates on, and what was left out."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    lengths: LengthStatistics
    num_truncated: int
    """Examples longer than max_length, cut at the end."""
    bad_rows: tuple[BadRow, ...] = field(default=())
    stream: IterableDataset | None = None
    """Instead of `train`, which is empty then: examples without end; the counts are of the first ones."""
    without_labels: tuple[str, ...] = ()
    """Places whose answer lay beyond max_length altogether."""


def load_data(source: str, tokenizer: Any, options: DataOptions) -> Data:
    """Read, recognise, render, tokenise, mask, truncate and split.

    Raises:
        ConfigError: nothing usable, or bad rows while `bad_rows` is "refuse".
    """
    if not 0 <= options.eval_fraction < 1:
        raise ConfigError(f"eval_fraction is {options.eval_fraction}, not in [0, 1)", fix="--eval-fraction 0.05")
    places, parsed, bad = _parse_all(source, Renderer(tokenizer, response_template=options.response_template), options)
    _refuse(source, bad, num_good=len(parsed), policy=options.bad_rows)
    examples = tokenise(parsed, tokenizer, options)
    num_truncated = sum(len(item.input_ids) > options.max_length for item in examples)
    cut = [truncate(item, options.max_length) for item in examples]
    kept = tuple(item for item in cut if item.num_label_tokens)
    lost = tuple(place for place, item in zip(places, cut, strict=True) if not item.num_label_tokens)
    if not kept:
        longest = max(len(item.input_ids) for item in examples)
        raise ConfigError(
            f"no example of {source} has an answer within max_length {options.max_length}",
            because=f"the prompts alone fill it (the longest example has {longest} tokens)",
            fix=f"a plan with --max-length {longest}",
        )
    train, held_out = split(kept, fraction=options.eval_fraction, seed=options.seed)
    if options.eval_fraction and not held_out:
        raise ConfigError(
            f"nothing can be held out of {source}",
            because="all its examples ask the same, and equal questions stay on one side",
            fix="leave --eval-fraction out",
        )
    return Data(
        train=train,
        held_out=held_out,
        lengths=length_statistics(kept),
        num_truncated=num_truncated,
        bad_rows=tuple(bad),
        without_labels=lost,
    )


def _parse_all(
    source: str, renderer: Renderer, options: DataOptions
) -> tuple[list[str], list[tuple[Conversation | PlainText, Rendered]], list[BadRow]]:
    """Where the good rows are, these rows, and the bad ones."""
    places: list[str] = []
    parsed: list[tuple[Conversation | PlainText, Rendered]] = []
    bad: list[BadRow] = []
    for row in read_rows(source):
        result = _parse(row, renderer, options)
        if isinstance(result, BadRow):
            bad.append(result)
        else:
            places.append(row.where)
            parsed.append(result)
    return places, parsed, bad


def _parse(
    row: Row | BadRow, renderer: Renderer, options: DataOptions
) -> tuple[Conversation | PlainText, Rendered] | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        example = parse_row(row.value, prompt_key=options.prompt_key, response_key=options.response_key)
        return example, renderer.render(example)
    except SchemaError as error:
        return BadRow(row.where, str(error))


def parse_or_refuse(
    row: Row | BadRow, renderer: Renderer, options: DataOptions, source: str
) -> tuple[Conversation | PlainText, Rendered] | BadRow:
    """One row of a stream. Raises ConfigError at a bad one, unless bad ones are skipped."""
    result = _parse(row, renderer, options)
    if isinstance(result, BadRow) and options.bad_rows == "refuse":
        raise ConfigError(
            f"a row of {source} cannot be used", problems=(str(result),), fix="--bad-rows skip trains on the others"
        )
    return result


def _refuse(source: str, bad: Sequence[BadRow], *, num_good: int, policy: BadRows) -> None:
    if num_good and (policy == "skip" or not bad):
        return
    if not num_good and not bad:
        raise ConfigError(f"{source} is empty", because="training needs at least one example", fix="check --dataset")
    problems = tuple(str(item) for item in bad[:_SHOWN])
    more = (f"and {len(bad) - _SHOWN} more",) if len(bad) > _SHOWN else ()
    raise ConfigError(
        f"{len(bad)} of {len(bad) + num_good} rows of {source} cannot be used",
        problems=problems + more,
        fix="--bad-rows skip trains on the others" if num_good else "check --dataset, --prompt-key and --response-key",
    )


def tokenise(
    parsed: Sequence[tuple[Conversation | PlainText, Rendered]], tokenizer: Any, options: DataOptions
) -> list[Example]:
    """Examples with their labels, in order. Raises ConfigError for a tokenizer that cannot place its tokens."""
    if not tokenizer.is_fast:
        raise ConfigError(
            "the tokenizer is not a fast one",
            because="the loss mask needs each token's place in the text, which only fast tokenizers report",
            fix="save it with tokenizer.json (AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained)",
        )
    examples: list[Example] = []
    for start in range(0, len(parsed), _BATCH):
        batch = parsed[start : start + _BATCH]
        special = batch[0][1].add_special_tokens
        if any(rendered.add_special_tokens != special for _, rendered in batch):
            groups = [[item] for item in batch]
        else:
            groups = [batch]  # type: ignore[list-item]
        for group in groups:
            texts = [rendered.text for _, rendered in group]
            encoded = tokenizer(
                texts, add_special_tokens=group[0][1].add_special_tokens, return_offsets_mapping=True, truncation=False
            )
            for index, (example, rendered) in enumerate(group):
                ids, offsets = encoded["input_ids"][index], encoded["offset_mapping"][index]
                examples.append(_masked(list(ids), offsets, example, rendered, tokenizer, options.loss_on))
    return examples


def _masked(
    ids: list[int],
    offsets: Sequence[tuple[int, int]],
    example: Conversation | PlainText,
    rendered: Rendered,
    tokenizer: Any,
    loss_on: LossOn,
) -> Example:
    """Labels where a token begins inside a learnt span; the end of the text is learnt as a stop token too."""
    spans = rendered.spans if loss_on == "answers" else ((0, len(rendered.text)),)
    labels = [
        token if end > start and any(first <= start < last for first, last in spans) else IGNORED
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]
    text = rendered.text.rstrip()
    ends_with_answer = bool(rendered.spans) and rendered.spans[-1][1] >= len(text)
    stops = text.endswith(tuple(tokenizer.all_special_tokens))
    if ends_with_answer and not stops and tokenizer.eos_token_id is not None:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return Example(ids, labels, example.key)


def truncate(example: Example, max_length: int) -> Example:
    """Cut at the end; the same value if it is short enough."""
    if len(example.input_ids) <= max_length:
        return example
    return Example(example.input_ids[:max_length], example.labels[:max_length], example.key)


def split(
    examples: Sequence[Example], *, fraction: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(train, held out): the same for the same seed; examples that ask the same stay on one side."""
    keys = sorted({item.key for item in examples})
    num_held_out = min(round(fraction * len(keys)), len(keys) - 1)
    if fraction > 0 and len(keys) > 1:
        num_held_out = max(num_held_out, 1)
    held_out = set(random.Random(seed).sample(keys, num_held_out))
    return (
        tuple(item for item in examples if item.key not in held_out),
        tuple(item for item in examples if item.key in held_out),
    )


def length_statistics(examples: Sequence[Example]) -> LengthStatistics:
    """Counts over examples; at least one is needed."""
    lengths = sorted(len(item.input_ids) for item in examples)
    return LengthStatistics(
        num_examples=len(lengths),
        total_tokens=sum(lengths),
        label_tokens=sum(item.num_label_tokens for item in examples),
        min_tokens=lengths[0],
        median_tokens=int(statistics.median(lengths)),
        p95_tokens=lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
        max_tokens=lengths[-1],
    )


def to_dataset(examples: Sequence[Example]) -> Dataset:
    """The columns that SFTTrainer takes as already prepared."""
    return Dataset.from_dict(
        {"input_ids": [item.input_ids for item in examples], "labels": [item.labels for item in examples]}
    )


def worst_case(num_examples: int, *, max_length: int, vocab_size: int, seed: int) -> tuple[Example, ...]:
    """Examples of exactly max_length tokens, all of them learnt: what a batch can need at most."""
    generator = random.Random(seed)
    rows = []
    for index in range(num_examples):
        ids = [generator.randrange(vocab_size) for _ in range(max_length)]
        rows.append(Example(ids, list(ids), str(index)))
    return tuple(rows)


def shortened(example: Example) -> Example:
    """A few tokens of it, for a step whose activations nobody measures or times."""
    return truncate(example, _SHORT_TOKENS)


def draw_examples(
    examples: Sequence[Example], count: int, *, max_length: int, seed: int, packing: bool
) -> tuple[Example, ...]:
    """`count` of them in random order, again and again if they are fewer; none of none.

    With packing, `count` counts packed sequences: enough examples to fill so many.
    """
    if not examples:
        return ()
    generator = random.Random(seed)
    order: list[Example] = []
    while len(order) < count or (packing and sum(len(item.input_ids) for item in order) < count * max_length):
        order += generator.sample(list(examples), len(examples))
    return tuple(order if packing else order[:count])
