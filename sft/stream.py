"""Data that are read while the training goes on: never all of them in memory, statistics from the first ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from datasets import IterableDataset

from sft.data import (
    Data,
    DataOptions,
    Example,
    length_statistics,
    parse_or_refuse,
    to_dataset,
    tokenise,
    truncate,
)
from sft.render import Renderer
from sft.rows import BadRow, read_rows
from zplan.errors import ConfigError

SAMPLE_EXAMPLES = 1000
"""Looked at before the start: length statistics and held-out examples come from them."""
SHUFFLE_BUFFER = 1000
"""Examples among which the next one is drawn."""
_CHUNK = 64
_HASH_BITS = 64


def open_stream(source: str, tokenizer: Any, options: DataOptions, *, shuffled: bool) -> Data:
    """The data as a stream without end: after the last row it begins again, so that no rank ever runs out alone.

    Raises:
        ConfigError: nothing usable, or a bad row among the first ones while `bad_rows` is "refuse".
    """
    bad: list[BadRow] = []
    num_truncated = 0
    sample: list[Example] = []
    for example, was_cut in islice(_examples(source, tokenizer, options, bad.append), SAMPLE_EXAMPLES):
        sample.append(example)
        num_truncated += was_cut
    if not sample:
        raise ConfigError(
            f"{source} has no example with an answer within max_length {options.max_length}",
            problems=tuple(str(item) for item in bad[:5]),
            fix="check --dataset, --prompt-key, --response-key, or a plan with a larger --max-length",
        )
    held_out = tuple(item for item in sample if is_held_out(item, options))
    if options.eval_fraction and not held_out:
        raise ConfigError(
            f"none of the first {len(sample)} examples is held out by --eval-fraction {options.eval_fraction}",
            because="a stream's held-out examples are taken from the first ones",
            fix="a larger --eval-fraction, or no --streaming",
        )

    stream = IterableDataset.from_generator(
        partial(_without_end, source, tokenizer, options), features=to_dataset(sample[:1]).features
    )
    return Data(
        train=(),
        held_out=held_out,
        lengths=length_statistics(sample),
        num_truncated=num_truncated,
        bad_rows=tuple(bad),
        stream=stream.shuffle(seed=options.seed, buffer_size=SHUFFLE_BUFFER) if shuffled else stream,
    )


def _without_end(source: str, tokenizer: Any, options: DataOptions) -> Iterator[dict[str, list[int]]]:
    """Rows to train on, again and again. Raises ConfigError if there is none."""
    while True:
        num_given = 0
        for example, _ in _examples(source, tokenizer, options, None):
            if not is_held_out(example, options):
                num_given += 1
                yield {"input_ids": example.input_ids, "labels": example.labels}
        if not num_given:
            raise ConfigError(f"{source} has no example to train on", fix="a smaller --eval-fraction")


def _examples(
    source: str, tokenizer: Any, options: DataOptions, note: Callable[[BadRow], None] | None
) -> Iterator[tuple[Example, bool]]:
    """Usable examples in the order of the file, and whether each was cut.

    Raises:
        ConfigError: at a bad row, while `bad_rows` is "refuse".
    """
    renderer = Renderer(tokenizer, response_template=options.response_template)
    rows = read_rows(source, streaming=True)
    while chunk := list(islice(rows, _CHUNK)):
        parsed = []
        for row in chunk:
            result = parse_or_refuse(row, renderer, options, source)
            if not isinstance(result, BadRow):
                parsed.append(result)
            elif note is not None:
                note(result)
        for whole in tokenise(parsed, tokenizer, options):
            example = truncate(whole, options.max_length)
            if example.num_label_tokens:
                yield example, example is not whole


def is_held_out(example: Example, options: DataOptions) -> bool:
    """By a hash of what is asked, so that the choice needs no list and equal questions stay on one side."""
    digest = hashlib.sha256(f"{options.seed}\n{example.key}".encode()).digest()
    number = int.from_bytes(digest[: _HASH_BITS // 8], "big")
    return number < int(options.eval_fraction * 2**_HASH_BITS)
