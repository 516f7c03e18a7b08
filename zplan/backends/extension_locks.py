"""Locks that a killed build of a compiled op left behind: every later trial would wait for them, silently and for ever.

Source: torch 2.13, utils/cpp_extension.py (_jit_compile) and utils/file_baton.py (wait: polls until the file is gone).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

_YOUNG_SECONDS = 60.0
"""A builder writes its sources before ninja runs in the folder; a lock this young may be at that point."""


def remove_stale_locks(root: Path | None = None) -> list[Path]:
    """Delete the locks of ops that no process builds any more; the deleted paths."""
    removed = []
    for lock in _root(root).glob("**/lock"):
        if _age_seconds(lock) > _YOUNG_SECONDS and not _is_built_now(lock.parent):
            lock.unlink(missing_ok=True)
            removed.append(lock)
    return removed


def _root(root: Path | None) -> Path:
    if root is not None:
        return root
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "torch_extensions"


def _age_seconds(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_built_now(folder: Path) -> bool:
    """ninja and its compilers run with the op's folder as working directory."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder.resolve():
                return True
        except (psutil.Error, OSError):
            continue
    return False
