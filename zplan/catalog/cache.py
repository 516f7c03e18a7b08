"""Probed shapes of the user's own models, so that a second estimate needs no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from zplan.catalog.shapes import from_json, to_json
from zplan.model_shape import ModelShape
from zplan.versions import installed_version


def cache_dir() -> Path:
    """XDG_CACHE_HOME/zplan, by default ~/.cache/zplan."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zplan"


def _entry(config_path: Path) -> Path | None:
    import hashlib  # loads OpenSSL, which catalogue names need not

    file = config_path / "config.json" if config_path.is_dir() else config_path
    try:
        content = file.read_bytes()
    except OSError:
        return None
    stack = installed_version("transformers")
    if stack is None:
        return None
    return cache_dir() / "shapes" / f"{hashlib.sha256(content + stack.encode()).hexdigest()}.json"


def load_shape(config_path: Path) -> ModelShape | None:
    """The shape probed earlier for exactly this config.json and this transformers; None if there is none."""
    entry = _entry(config_path)
    if entry is None or not entry.exists():
        return None
    try:
        return from_json(json.loads(entry.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # written by another version of zplan: probe again


def save_shape(config_path: Path, shape: ModelShape) -> None:
    """Keep a probed shape; a cache that cannot be written costs time, not the answer."""
    entry = _entry(config_path)
    if entry is None:
        return
    temporary = entry.with_suffix(f".{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(to_json(shape)), encoding="utf-8")
        temporary.replace(entry)
    except OSError:
        temporary.unlink(missing_ok=True)
