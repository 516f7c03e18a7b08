"""Fixtures of the trainer's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sft.warm import WarmServer


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmServer]:
    """One warm process for all tests of the room."""
    server = WarmServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> Any:
    """The tiny model's tokenizer: ChatML, pad equals eos."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)
