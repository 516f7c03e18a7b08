"""What the finished trials teach about the others: a Gaussian process over measured / predicted, and where memory ends.

The formula is the prior mean, so one trial already corrects the speed of all configurations; the process learns what
the formula gets wrong about a stage, an offload or a batch size. Speeds are logarithms: 3 % is 3 % anywhere.

Source: Rasmussen & Williams 2006, algorithm 2.1 (exact regression); Jones et al. 1998 (expected improvement).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import erf, exp, log, pi, sqrt

import numpy as np
import numpy.typing as npt

from zplan.space import Draft, Elements, Knob, Options, Share, Value

Vector = npt.NDArray[np.float64]
_NOISE = 0.02
"""Standard deviation of log tokens/s between two equal trials, at the least; short trials repeat to about 2 %."""
_PRIOR_SPREAD = 0.35
"""Standard deviation of log(measured / predicted) between configurations, before trials say otherwise."""
_FIT_WIDTH = 0.04
"""Width, in log bytes, of the boundary between fitting and not fitting."""
_LENGTH = {
    "world_size": 1.0,
    "stage": 1.0,
    "train_micro_batch_size_per_gpu": 0.5,
    "gradient_checkpointing": 1.0,
    "offload_optimizer.device": 0.8,
    "offload_param.device": 0.8,
}
_OTHER_LENGTH = 2.5
"""Knobs of second order (buckets, limits): neighbours in them are nearly alike (field measurements: a few percent)."""


def features(knobs: Sequence[Knob], draft: Draft) -> Vector:
    """A configuration as a point: ordered knobs on [0, 1], unordered ones one-hot; a knob that does not act is -0.5."""
    point: list[float] = []
    for knob in knobs:
        length = _LENGTH.get(knob.name, _OTHER_LENGTH)
        point += [value / length for value in _coordinates(knob, draft.get(knob.name))]
    return np.array(point)


def _coordinates(knob: Knob, value: Value | None) -> list[float]:
    match knob.range:
        case Options(values):
            return [1.0 if value == option and value is not None else 0.0 for option in values]
        case Elements(low, high):
            if value is None or high == low:
                return [-0.5]
            return [log(max(float(value), 1.0) / low) / log(high / low)]
        case Share(low, high):
            return [-0.5 if value is None else (float(value) - low) / max(high - low, 1e-9)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One finished or running trial, as the model sees it."""

    point: Vector
    log_predicted: float
    """0 where the formula knows no speed."""
    log_measured: float | None
    """None: it did not run to the end, or is still running."""
    log_share: float
    """log(predicted bytes / capacity), GPU or host, whichever is nearer to its end."""
    out_of_memory: bool = False


class Surrogate:
    """Fitted to the trials so far; predicts speed and fit of any configuration."""

    def __init__(self, observations: Sequence[Observation]) -> None:
        ran = [(item, item.log_measured - item.log_predicted) for item in observations if item.log_measured is not None]
        residuals = np.array([residual for _, residual in ran])
        self._points = np.array([item.point for item, _ in ran])
        self._mean = float(residuals.mean()) if len(residuals) else 0.0
        spread = float(residuals.std()) if len(residuals) > 2 else _PRIOR_SPREAD
        self._variance = max(spread, 0.08) ** 2
        if len(residuals):
            covariance = self._kernel(self._points, self._points) + _NOISE**2 * np.eye(len(residuals))
            self._inverse = np.linalg.inv(covariance)
            self._weights = self._inverse @ (residuals - self._mean)
        self.best = max((item.log_measured for item, _ in ran if item.log_measured is not None), default=None)
        self._fit_limit = _fit_limit(observations)

    def _kernel(self, left: Vector, right: Vector) -> Vector:
        distances = ((left[:, None, :] - right[None, :, :]) ** 2).sum(axis=-1)
        kernel: Vector = self._variance * np.exp(-0.5 * distances)
        return kernel

    def speed(self, point: Vector, log_predicted: float) -> tuple[float, float]:
        """Mean and standard deviation of log tokens/s."""
        if not len(self._points):
            return log_predicted + self._mean, sqrt(self._variance)
        near = self._kernel(point[None, :], self._points)[0]
        mean = log_predicted + self._mean + float(near @ self._weights)
        variance = self._variance - float(near @ self._inverse @ near)
        return mean, sqrt(max(variance, 1e-8))

    def fits(self, log_share: float) -> float:
        """Probability that memory suffices: a step at the learned limit, softened."""
        return 1.0 / (1.0 + exp(min(50.0, max(-50.0, (log_share - self._fit_limit) / _FIT_WIDTH))))

    def gain(self, point: Vector, log_predicted: float, log_share: float) -> float:
        """Expected improvement over the best trial, in log tokens/s (0.01 is one percent), weighed by the fit."""
        mean, deviation = self.speed(point, log_predicted)
        if self.best is None:
            return mean * self.fits(log_share)
        z = (mean - self.best) / deviation
        density, below = exp(-0.5 * z * z) / sqrt(2 * pi), 0.5 * (1 + erf(z / sqrt(2)))
        return self.fits(log_share) * deviation * (z * below + density)


def _fit_limit(observations: Sequence[Observation]) -> float:
    """log(share of memory) where trials stop fitting: between the largest that ran and the smallest that did not."""
    failed = [item.log_share for item in observations if item.out_of_memory]
    ran = [item.log_share for item in observations if item.log_measured is not None]
    if not failed:
        return max([0.15, *(share + _FIT_WIDTH for share in ran)])
    return min(failed) - _FIT_WIDTH if not ran else (min(failed) + min(max(ran), min(failed))) / 2


def share_of(bytes_by_capacity: Mapping[int, int]) -> float:
    """log of the fullest share: capacity -> bytes."""
    return max((log(max(used, 1) / capacity) for capacity, used in bytes_by_capacity.items() if capacity), default=-3.0)
