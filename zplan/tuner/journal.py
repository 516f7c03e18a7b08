"""The journal file of a study: Optuna's append-only format, mended when a write was cut short or a line was damaged.

Optuna stops at the first line that it cannot read. A line cut short at the end (killed or disk full while writing) is
removed; damage before the end is answered by building a new journal from the `record` lines, the old one is kept.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from zplan import files
from zplan.errors import ConfigError

_BALLAST_BYTES = 256 << 10
"""Disk space held back: the record of a finished trial (~10 kB) still fits when the disk is full."""


def open_journal(path: Path) -> JournalStorage:
    """Open or create, after mending.

    Raises:
        OSError: not writable, disk full.
        ConfigError: the file is something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _mend(path)
    _reserve(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_lock(path)))


def _lock(path: Path) -> JournalFileSymlinkLock:
    # The lock of a tuner that was killed while holding it is broken after this many seconds.
    return JournalFileSymlinkLock(str(path), grace_period=10)


def _mend(path: Path) -> None:
    lock = _lock(path)
    lock.acquire()
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        bad = [number for number, line in enumerate(lines) if not _readable(line)]
        if not bad:
            return
        if not any(_readable(line) for line in lines):
            raise ConfigError(
                f"{path} is not a study", because="no line of it is an Optuna journal entry", fix="--study another-file"
            )
        if bad == [len(lines) - 1]:
            os.truncate(path, sum(len(line) for line in lines[:-1]))
            return
        _rebuild(path, [line for line in lines if _readable(line)])
    finally:
        lock.release()


def _readable(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(json.loads(line), dict) and b"op_code" in line
    except ValueError:
        return False


def _rebuild(path: Path, lines: list[bytes]) -> None:
    """A journal in which trial numbers cannot be trusted: keep it, and set its finished trials aside for a new one."""
    found: dict[str, Any] = {}
    for line in lines:
        entry = json.loads(line)
        found |= {name: value for name, value in entry.get("user_attr", {}).items() if name in _STUDY_ATTRS}
        record = entry.get("user_attr", {}).get("record")
        if record is not None:
            found.setdefault("records", []).append(record)
    kept = path.with_name(f"{path.name}.damaged-{int(time.time())}")
    os.replace(path, kept)
    files.save_json(found, _salvage_path(path))


_STUDY_ATTRS = ("identity", "question", "fingerprint")


def _salvage_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.salvaged.json")


def take_salvaged(path: Path) -> dict[str, Any] | None:
    """What was saved of a damaged journal: study attributes and `records`; None if nothing waits."""
    salvage = _salvage_path(path)
    return dict(files.load_json(salvage)) if salvage.exists() else None


def forget_salvaged(path: Path) -> None:
    """The salvaged trials are in the new journal."""
    _salvage_path(path).unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    ballast = path.with_name(f".{path.name}.ballast")
    if not ballast.exists() or ballast.stat().st_size != _BALLAST_BYTES:
        ballast.write_bytes(os.urandom(_BALLAST_BYTES))


def keep_aside(path: Path, record: dict[str, Any]) -> None:
    """Store a finished trial beside a journal that cannot be written, in the space of the ballast."""
    path.with_name(f".{path.name}.ballast").unlink(missing_ok=True)
    files.save_json(record, path.with_name(f"{path.name}.aside-{record['number']}.json"))


def take_aside(path: Path) -> dict[int, Any]:
    """Trial number -> record that could not be written into the journal."""
    return {
        int(item.stem.rpartition("-")[2]): files.load_json(item)
        for item in path.parent.glob(f"{path.name}.aside-*.json")
    }


def forget_aside(path: Path) -> None:
    """The records are in the journal now."""
    for item in path.parent.glob(f"{path.name}.aside-*.json"):
        item.unlink()
