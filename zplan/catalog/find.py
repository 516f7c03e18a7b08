"""A name that a user types -> ModelShape, or the config.json that has to be probed. No torch, no network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from zplan.catalog.cache import cache_dir, load_shape
from zplan.catalog.config_file import check_config, load_config
from zplan.catalog.shapes import from_json
from zplan.errors import ConfigError
from zplan.model_shape import ModelShape

_HERE = Path(__file__).parent
_CUSTOM_TYPE = "llama"
"""Architecture of `--model custom` unless model_type is set."""


@cache
def _index() -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = json.loads((_HERE / "index.json").read_text(encoding="utf-8"))
    return index


def model_names() -> tuple[str, ...]:
    """Every name of the catalogue."""
    return tuple(_index())


def hub_ids(name: str) -> tuple[str, ...]:
    """The Hub ids that a catalogue name stands for; empty for an unknown name."""
    return tuple(_index().get(name, {}).get("hub_ids", ()))


def find_model(name: str, *, overrides: Mapping[str, Any] | None = None) -> ModelShape | Path:
    """Look a model up: catalogue name, Hub id, folder or config.json, `custom` with overrides.

    Returns:
        Its shape, or the path of a config.json that nobody has probed yet.

    Raises:
        ConfigError: unknown name (with the nearest ones), a folder without config.json.
    """
    if name == "custom":
        return _custom(overrides or {})
    if overrides:
        raise ConfigError("--set-model changes only a custom model", fix="--model custom --set-model hidden_size=4096")
    known = _catalogue_name(name)
    if name and os.path.exists(name):  # False, not an error, for a name too long for a path
        return _local(Path(name))
    if known is not None:
        return from_json(json.loads((_HERE / "shapes" / f"{known}.json").read_text(encoding="utf-8")))
    snapshot = hub_snapshot(name)
    if snapshot is not None:
        return _local(snapshot)
    raise _unknown(name)


def _catalogue_name(name: str) -> str | None:
    lowered = name.lower()
    if lowered in _index():
        return lowered
    for known, entry in _index().items():
        if any(lowered == hub_id.lower() for hub_id in entry["hub_ids"]):
            return known
    return None


def _local(path: Path) -> ModelShape | Path:
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"{path} has no config.json", because="the plan starts from it", fix="--model FOLDER")
    shape = load_shape(file)
    if shape is None:
        load_config(file)  # refused here, before anybody waits for torch
    return shape or file


def _custom(overrides: Mapping[str, Any]) -> ModelShape | Path:
    if not overrides:
        raise ConfigError(
            "--model custom needs its sizes",
            fix="--set-model hidden_size=4096 --set-model num_hidden_layers=32 --set-model num_attention_heads=32",
        )
    config = {"model_type": _CUSTOM_TYPE, **overrides}
    check_config(config, name="custom")
    import hashlib  # loads OpenSSL, which catalogue names need not

    text = json.dumps(config, sort_keys=True)
    file = cache_dir() / "custom" / hashlib.sha256(text.encode()).hexdigest()[:16] / "config.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return load_shape(file) or file


def hub_snapshot(name: str) -> Path | None:
    """The newest snapshot folder of a Hub id in the local cache (huggingface_hub's layout); None if there is none."""
    candidates = [hub_id for hub_id in (name, *hub_ids(name.lower())) if "/" in hub_id]
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    root = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    for hub_id in candidates:
        folder = root / f"models--{hub_id.replace('/', '--')}" / "snapshots"
        found = [path for path in folder.glob("*") if (path / "config.json").exists()]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    return None


def _unknown(name: str) -> ConfigError:
    from difflib import get_close_matches  # only a wrong name needs it

    ids = [hub_id for entry in _index().values() for hub_id in entry["hub_ids"]]
    pool = {text.lower(): text for text in (*_index(), *ids)}
    nearest = [pool[text] for text in get_close_matches(name.lower(), list(pool), n=5, cutoff=0.5)]
    return ConfigError(
        f"{name!r} is not in the catalogue, not in the local Hub cache and not a folder",
        because="zplan needs the model's config.json" + (f"; nearest names: {', '.join(nearest)}" if nearest else ""),
        fix=f"--model {nearest[0]}" if nearest else "--model mistral-7b, or --model FOLDER",
    )
