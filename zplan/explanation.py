"""What an explanation says: an option in words, and its effects in bytes and speed."""

from __future__ import annotations

from zplan.memory.terms import Phase
from zplan.units import format_bytes
from zplan.values import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One value of the option against another, everything else equal. Negative bytes are saved."""

    change: str
    gpu_bytes: int
    """Of a rank's peak, allocated."""
    phase: Phase
    """The phase of the GPU that changes most; an option can matter in one that is not the peak."""
    phase_bytes: int
    host_bytes: int | None
    """Of a node, resident; None where it is not estimated."""
    host_phase: Phase
    host_phase_bytes: int
    """The phase of the host that changes most."""
    tokens_per_second: float | None
    """Ratio; None where the speed is not known."""

    def __str__(self) -> str:
        parts = [f"GPU peak {_signed(self.gpu_bytes)}"]
        if self.phase_bytes != self.gpu_bytes:
            parts.append(f"{self.phase} {_signed(self.phase_bytes)}")
        if self.host_bytes is not None:
            parts.append(f"host {_signed(self.host_bytes)}")
            if self.host_phase_bytes != self.host_bytes:
                parts.append(f"host {self.host_phase} {_signed(self.host_phase_bytes)}")
        if self.tokens_per_second is not None:
            change = self.tokens_per_second - 1
            parts.append(f"tokens/s {change:+.0%}" if abs(change) >= 0.005 else "tokens/s unchanged")
        return f"{self.change}: {', '.join(parts)}"


def _signed(num_bytes: int) -> str:
    return ("+" if num_bytes > 0 else "") + format_bytes(num_bytes) if num_bytes else "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """An option in words and in bytes."""

    key: str
    text: str
    rows: tuple[Effect, ...]
    """Empty where the option changes nothing that zplan counts; the text says why."""
    documented_bound_bytes: int | None = None
    """The 4.5x rule, for the options that the documentation states it for."""

    @property
    def effects(self) -> tuple[str, ...]:
        """The rows as lines of text."""
        lines = [str(row) for row in self.rows]
        if self.documented_bound_bytes is not None:
            bound = format_bytes(self.documented_bound_bytes)
            lines.append(f"documented 4.5x bound of both buckets, at stages 1 and 2 with overlap_comm: {bound}")
        return tuple(lines)
