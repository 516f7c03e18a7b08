"""Only the locks of builds that are over are removed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from zplan.backends.extension_locks import remove_stale_locks


def _lock(root: Path, *, age_seconds: float) -> Path:
    lock = root / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age_seconds,) * 2)
    return lock


def test_the_lock_of_a_dead_build_is_removed(tmp_path: Path) -> None:
    lock = _lock(tmp_path, age_seconds=600)
    assert remove_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_a_young_lock_stays(tmp_path: Path) -> None:
    assert remove_stale_locks(_lock(tmp_path, age_seconds=1).parents[2]) == []


def test_the_lock_of_a_running_build_stays(tmp_path: Path) -> None:
    lock = _lock(tmp_path, age_seconds=600)
    builder = subprocess.Popen([sys.executable, "-S", "-c", "input()"], cwd=lock.parent, stdin=subprocess.PIPE)
    try:
        assert remove_stale_locks(tmp_path) == []
        assert lock.exists()
    finally:
        builder.communicate(b"\n")
