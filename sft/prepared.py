"""Tokenizer and examples of a trial: made once by the warm server, whose forks have them already.

Of a large dataset they take longer than everything else in a trial, and all trials of a study want the same ones.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft import build, data
from zplan.trial import TrialSpec

_THREADLESS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
"""Files that are read by Python alone. Arrow's readers start threads, which a fork would not inherit."""

_kept: dict[str, tuple[object, Any]] = {}
"""What was made last: name -> (what it was made of, value)."""


def load_tokenizer(spec: TrialSpec) -> Any:
    """The tokenizer of the spec's model folder."""
    return _once("tokenizer", _state(spec.model_path), lambda: build.load_tokenizer(spec.model_path))


def load_examples(spec: TrialSpec, tokenizer: Any) -> tuple[data.Example, ...]:
    """The training examples of the spec's dataset; none without one."""
    recipe = spec.recipe
    source = recipe.dataset
    if source is None:
        return ()
    options = data.DataOptions(max_length=recipe.max_length, seed=recipe.seed)
    made_of = (_state(spec.model_path), _state(source), options)
    found: tuple[data.Example, ...] = _once(
        "examples", made_of, lambda: data.load_data(source, tokenizer, options).train
    )
    return found


def prepare_for_forks(spec: TrialSpec) -> None:
    """Make both here, if that starts no thread. What fails here fails again in the ranks, and they say why."""
    if spec.recipe.optimizer == "muon":
        import torch._inductor.compile_fx  # noqa: F401  (what compiles its update)
    source = spec.recipe.dataset
    if os.environ.get("TOKENIZERS_PARALLELISM") != "false" or (source is not None and not _reads_alone(Path(source))):
        return
    with contextlib.suppress(Exception):  # the process boundary: nothing that a trial asks for may end the server
        load_examples(spec, load_tokenizer(spec))
    gc.freeze()


def _reads_alone(source: Path) -> bool:
    return source.suffix in _THREADLESS and source.is_file()


def _once(name: str, made_of: object, make: Callable[[], Any]) -> Any:
    kept = _kept.get(name)
    if kept is None or kept[0] != made_of:
        kept = _kept[name] = (made_of, make())
    return kept[1]


def _state(path: str) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of the file, or of the files of the folder: other ones are other data."""
    root = Path(path)
    files = sorted(root.iterdir()) if root.is_dir() else [root] if root.exists() else []
    return tuple((str(item), item.stat().st_size, item.stat().st_mtime_ns) for item in files)
