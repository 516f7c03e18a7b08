"""Speed, GPU bytes and host bytes at once: which trials nothing beats, and how much one more may add to them.

What trials are worth together is the volume that they dominate, in log tokens/s x log GPU bytes x log host bytes: a
tenth less memory counts like a tenth more speed. The corner is a quarter of the fastest speed, a full GPU and a full
host.

Source: Emmerich et al. 2006 (expected hypervolume improvement); exact here, because only the speed is uncertain.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import erf, exp, log, pi, sqrt

from zplan.hardware import Cluster
from zplan.trial import Outcome, TrialResult
from zplan.values import dataclass

_SLOWEST_SHARE = 0.25
"""What is slower than this share of the fastest is of no interest, however little memory it needs."""


def gpu_bytes(result: TrialResult) -> int | None:
    """Peak GPU bytes of the fullest rank: used where the device tells, else allocated."""
    return result.gpu_used_bytes if result.gpu_used_bytes is not None else result.gpu_allocated_bytes


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration in the space of the three objectives; logarithms, so that a tenth is a tenth anywhere."""

    log_speed: float
    log_gpu: float
    log_host: float

    def beats(self, other: Point) -> bool:
        """At least as good in all three, better in one."""
        no_worse = self.needs_no_more(other) and self.log_speed >= other.log_speed
        return no_worse and self != other

    def needs_no_more(self, other: Point) -> bool:
        """At most the other's memory, on the GPU and on the host."""
        return self.log_gpu <= other.log_gpu and self.log_host <= other.log_host


def point(result: TrialResult) -> Point | None:
    """A trial's objectives; None if it did not run to its end, or did not tell one of them."""
    gpu = gpu_bytes(result)
    if result.outcome is not Outcome.OK or not result.tokens_per_second or not gpu or not result.host_resident_bytes:
        return None
    return Point(log(result.tokens_per_second), log(gpu), log(result.host_resident_bytes))


def unbeaten(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other beats; of equal ones the first."""
    return [
        index
        for index, one in enumerate(points)
        if not any(other.beats(one) for other in points) and one not in points[:index]
    ]


@dataclass(frozen=True, slots=True)
class Front:
    """What the trials so far reach, and the corner that the volume is measured from."""

    points: tuple[Point, ...]
    corner: Point

    def volume(self) -> float:
        """What the points dominate together."""
        cells = self._cells(min(p.log_gpu for p in self.points), min(p.log_host for p in self.points))
        return sum(area * (fastest - self.corner.log_speed) for area, fastest in cells)

    def expected_gain(self, mean: float, deviation: float, log_gpu: float, log_host: float) -> float:
        """Expected growth of the volume, as a fraction of it, by a configuration of these bytes and log tokens/s."""
        cells = self._cells(log_gpu, log_host)
        grown = sum(area * _expected_excess(mean, deviation, fastest) for area, fastest in cells)
        return grown / max(self.volume(), 1e-9)

    def _cells(self, log_gpu: float, log_host: float) -> list[tuple[float, float]]:
        """Memory from these bytes up, cut where a trial's need is: area of each part, fastest trial that fits in it."""
        gpus = _edges([p.log_gpu for p in self.points], log_gpu, self.corner.log_gpu)
        hosts = _edges([p.log_host for p in self.points], log_host, self.corner.log_host)
        areas: dict[float, float] = {}
        for low_gpu, high_gpu in pairwise(gpus):
            for low_host, high_host in pairwise(hosts):
                fitting = [p.log_speed for p in self.points if p.log_gpu <= low_gpu and p.log_host <= low_host]
                fastest = max([self.corner.log_speed, *fitting])
                areas[fastest] = areas.get(fastest, 0.0) + (high_gpu - low_gpu) * (high_host - low_host)
        return [(area, fastest) for fastest, area in areas.items()]


def _edges(values: Sequence[float], low: float, high: float) -> list[float]:
    """From low to high by way of the values between; fewer than two if nothing is between."""
    return sorted({low, high, *(value for value in values if low < value < high)}) if low < high else []


def _expected_excess(mean: float, deviation: float, floor: float) -> float:
    """Of a normal variable over `floor`."""
    z = (mean - floor) / deviation
    return deviation * (z * 0.5 * (1 + erf(z / sqrt(2))) + exp(-0.5 * z * z) / sqrt(2 * pi))


def make_front(points: Sequence[Point], cluster: Cluster) -> Front:
    """The front of some trials on a cluster; at least one must have run."""
    fastest = max(p.log_speed for p in points)
    corner = Point(fastest + log(_SLOWEST_SHARE), log(cluster.gpu.total_bytes), log(cluster.host.total_bytes))
    return Front(tuple(points[index] for index in unbeaten(points)), corner)
