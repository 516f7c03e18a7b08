"""The smaller of MemAvailable and the cgroup's room."""

from __future__ import annotations

from pathlib import Path

from zplan.backends.host_memory import available_host_bytes, count_oom_kills
from zplan.units import MIB


def _v2(root: Path, *, limit: str, current: int, cache: int = 0, kills: int = 0) -> Path:
    root.mkdir()
    (root / "memory.max").write_text(f"{limit}\n")
    (root / "memory.current").write_text(f"{current}\n")
    (root / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    (root / "memory.events").write_text(f"max 3\noom_kill {kills}\n")
    return root


def test_a_cgroup_limit_is_respected(tmp_path: Path) -> None:
    root = _v2(tmp_path / "v2", limit=str(100 * MIB), current=90 * MIB, cache=20 * MIB)
    assert available_host_bytes(v2=root, v1=tmp_path / "none") == (100 - 90 + 20) * MIB


def test_max_is_no_limit(tmp_path: Path) -> None:
    root = _v2(tmp_path / "v2", limit="max", current=1)
    assert available_host_bytes(v2=root, v1=tmp_path / "none") > 0


def test_cgroup_v1_is_read_too(tmp_path: Path) -> None:
    root = tmp_path / "v1"
    root.mkdir()
    (root / "memory.limit_in_bytes").write_text(str(50 * MIB))
    (root / "memory.usage_in_bytes").write_text(str(60 * MIB))
    (root / "memory.stat").write_text("total_inactive_file 0\n")
    assert available_host_bytes(v2=tmp_path / "none", v1=root) == 0


def test_kernel_kills_are_counted(tmp_path: Path) -> None:
    root = _v2(tmp_path / "v2", limit="max", current=1, kills=2)
    assert count_oom_kills(v2=root, v1=tmp_path / "none") == 2
    assert count_oom_kills(v2=tmp_path / "none", v1=tmp_path / "none") == 0
