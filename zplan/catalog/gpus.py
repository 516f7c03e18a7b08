"""GPUs by name: memory, speed and links as published."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from zplan.errors import ConfigError
from zplan.hardware import Gpu
from zplan.units import GIB, MIB
from zplan.values import dataclass

_DRIVER_RESERVE_BYTES = 512 * MIB
"""Of a described card, what driver and firmware keep; nvidia-smi shows 0.3 to 0.6 GiB used on idle cards."""
_NOT_ALNUM = re.compile(r"[^a-z0-9]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Bytes a second, one direction, as published."""

    intra_node_bytes_per_second: float
    host_link_bytes_per_second: float


@cache
def _table() -> dict[str, dict[str, Any]]:
    import tomllib  # 2 ms, and only who has or describes a GPU needs it

    return tomllib.loads((Path(__file__).parent / "gpus.toml").read_text(encoding="utf-8"))


def gpu_names() -> tuple[str, ...]:
    """Every GPU of the catalogue."""
    return tuple(_table())


def find_gpu(name: str) -> str | None:
    """The catalogue's name for a typed name (`h100`, `A100-80GB`, `4090`) or NVML's; None if there is none."""
    plain = _plain(name)
    for known, entry in _table().items():
        if plain in (_plain(known), *(_plain(text) for text in entry["nvml"])):
            return known
    for known in _table():
        if plain and plain in (
            _plain(known.rpartition("-")[0]),
            _plain(known).removeprefix("rtx"),
            _plain(known.rpartition("-")[0]).removeprefix("rtx"),
        ):
            return known
    return None


def _plain(name: str) -> str:
    return _NOT_ALNUM.sub("", name.lower())


def _entry(name: str) -> tuple[str, dict[str, Any]]:
    known = find_gpu(name)
    if known is None:
        from difflib import get_close_matches  # only a wrong name needs it

        nearest = get_close_matches(name.lower(), gpu_names(), n=4, cutoff=0.4) or list(gpu_names())[-4:]
        raise ConfigError(
            f"{name!r} is not a GPU of the catalogue", because=f"near it are {', '.join(nearest)}",
            fix=f"--gpu {nearest[0]}",
        )  # fmt: skip
    return known, _table()[known]


def load_gpu(name: str) -> Gpu:
    """A described card. Raises ConfigError with the nearest names."""
    known, entry = _entry(name)
    total = int(entry["memory_gib"] * GIB)
    return Gpu(
        name=known,
        total_bytes=total,
        free_bytes=total - _DRIVER_RESERVE_BYTES,
        dense_flops=entry["dense_tflops"] * 1e12,
        memory_bytes_per_second=entry["memory_gbps"] * 1e9,
        compute_capability=entry["capability"],
        source=entry["source"],
    )


def load_links(name: str) -> Links:
    """The card's links. Raises ConfigError with the nearest names."""
    _, entry = _entry(name)
    return Links(
        intra_node_bytes_per_second=entry["link_gbps"] * 1e9, host_link_bytes_per_second=entry["host_gbps"] * 1e9
    )
