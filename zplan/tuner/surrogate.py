"""What the finished trials teach about the others: a Gaussian process over measured / predicted, and where memory ends.

The formula is the prior mean, so one trial already corrects the speed of all configurations; the process learns what
the formula gets wrong about a stage, an offload or a batch size. Speeds are logarithms: 3 % is 3 % anywhere.

Source: Rasmussen & Williams 2006, algorithm 2.1 and section 2.7 (exact regression, unknown mean); Jones et al. 1998
(expected improvement).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import erf, exp, log, pi, sqrt
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from zplan.tuner.ranges import Elements, Options, Share, Value
from zplan.tuner.space import Draft, Knob
from zplan.values import dataclass

Vector = npt.NDArray[np.float64]
_NOISE = 0.02
"""Standard deviation of log tokens/s between two equal trials, at the least; short trials repeat to about 2 %."""
_GROUPS = (
    ("stage", "offload_optimizer.device", "offload_param.device"),
    ("train_micro_batch_size_per_gpu",),
    ("gradient_checkpointing",),
    ("world_size",),
)
"""Knobs of first order: where the states live, how large a pass is, what is computed twice, over how many GPUs."""
_FIRST_ORDER, _TOGETHER, _SECOND_ORDER = 0.15, 0.10, 0.03
"""Prior standard deviation of log(measured / predicted) that one group explains, that only all groups together explain,
and that one of the other knobs (buckets, limits, pinning) explains: those move a step by a few percent."""
_LENGTHS = {"train_micro_batch_size_per_gpu": 0.3}
"""On the scale of `features`; 1 where not named: two values of an unordered knob correlate by exp(-1)."""
_SCALES = ((0.5, 1.0, 2.0), (0.1, 0.3, 1.0))
"""Factors on the deviations of first and of second order; the trials choose by their likelihood. Apart from each other:
ten trials in which no bucket mattered say nothing about a stage that was never tried."""
_FIT_WIDTH = 0.04
"""Width, in log bytes, of the boundary between fitting and not fitting."""


def features(knobs: Sequence[Knob], draft: Draft) -> Vector:
    """A configuration as a point: ordered knobs on [0, 1], unordered ones one-hot; a knob that does not act is -0.5."""
    point: list[float] = []
    for knob in knobs:
        length = _LENGTHS.get(knob.name, 1.0)
        point += [value / length for value in _coordinates(knob, draft.get(knob.name))]
    return np.array(point)


@dataclass(frozen=True, slots=True)
class Part:
    """One additive part of the prior: how far apart two points are in these coordinates, and what that may change."""

    columns: tuple[int, ...]
    deviation: float
    order: Literal[1, 2] = 1


Kernel: TypeAlias = tuple[Part, ...]


def make_kernel(knobs: Sequence[Knob]) -> Kernel:
    """Seconds multiply, so what the formula gets wrong about one group of knobs is the same whatever the others are."""
    columns: dict[str, tuple[int, ...]] = {}
    start = 0
    for knob in knobs:
        width = len(_coordinates(knob, None))
        columns[knob.name] = tuple(range(start, start + width))
        start += width
    groups = [tuple(c for name in group for c in columns.get(name, ())) for group in _GROUPS]
    first = {name for group in _GROUPS for name in group}
    return (
        *(Part(group, _FIRST_ORDER) for group in groups),
        Part(tuple(c for group in groups for c in group), _TOGETHER),
        *(Part(own, _SECOND_ORDER, 2) for name, own in columns.items() if name not in first),
    )


def _variances(kernel: Kernel) -> tuple[float, float]:
    """Prior variance of first and of second order."""
    first, second = ([part.deviation**2 for part in kernel if part.order == order] for order in (1, 2))
    return sum(first), sum(second)


def _covariances(kernel: Kernel, left: Vector, right: Vector) -> tuple[Vector, Vector]:
    """Of first and of second order, before they are scaled."""
    totals = {1: np.zeros((len(left), len(right))), 2: np.zeros((len(left), len(right)))}
    for part in kernel:
        own = list(part.columns)
        distances = ((left[:, None, own] - right[None, :, own]) ** 2).sum(axis=-1)
        totals[part.order] += part.deviation**2 * np.exp(-0.5 * distances)
    return totals[1], totals[2]


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


class Process:
    """Exact regression on residuals under one scale of the prior, their unknown mean included (ordinary kriging)."""

    def __init__(self, scales: tuple[float, float], covariances: tuple[Vector, Vector], residuals: Vector) -> None:
        self.scales = scales
        noisy = self._scaled(*covariances) + _NOISE**2 * np.eye(len(residuals))
        self._inverse = np.linalg.inv(noisy)
        self._ones = self._inverse.sum(axis=0)
        self._mean = float(self._ones @ residuals / self._ones.sum())
        self._weights = self._inverse @ (residuals - self._mean)
        fit = (residuals - self._mean) @ self._weights
        self.log_likelihood = float(-0.5 * (fit + np.linalg.slogdet(noisy)[1] + log(self._ones.sum())))
        """The mean integrated out (restricted maximum likelihood), constants aside."""

    def _scaled(self, first: Vector, second: Vector) -> Vector:
        return self.scales[0] ** 2 * first + self.scales[1] ** 2 * second

    def residuals(self, near: tuple[Vector, Vector], prior: tuple[float, float]) -> tuple[Vector, Vector]:
        """Means and standard deviations of points from their covariances with the trials, one row a point."""
        row = self._scaled(*near)
        variances = self._scaled(*map(np.array, prior)) - ((row @ self._inverse) * row).sum(axis=1)
        variances += (1.0 - row @ self._ones) ** 2 / self._ones.sum()  # of the mean itself
        return self._mean + row @ self._weights, np.sqrt(np.maximum(variances, 1e-8))


class Surrogate:
    """Fitted to the trials so far; predicts speed and fit of any configuration.

    The process has an unknown mean (ordinary kriging): the formula's common error costs one trial, not a prior. How far
    the formula may be off is not known either: every scale of the prior counts by its likelihood, so that a few trials
    that agree with the formula do not make it certain about a stage that was never tried.
    """

    def __init__(self, observations: Sequence[Observation], kernel: Kernel) -> None:
        ran = [(item, item.log_measured - item.log_predicted) for item in observations if item.log_measured is not None]
        self._points = np.array([item.point for item, _ in ran])
        self._kernel, self._fit_limit = kernel, _fit_limit(observations)
        self.best: float | None = None
        """Largest log tokens/s that a trial is believed to have had: its noise is taken out."""
        self.believed: Vector = np.array([])
        """That of every trial that ran, in the order of the observations."""
        if not ran:
            return
        covariances, residuals = _covariances(kernel, self._points, self._points), np.array([found for _, found in ran])
        self._processes = [Process((f, s), covariances, residuals) for f in _SCALES[0] for s in _SCALES[1]]
        likelihoods = np.array([process.log_likelihood for process in self._processes])
        self._shares = np.exp(likelihoods - likelihoods.max())
        self._shares /= self._shares.sum()
        means, _ = self.speeds(self._points, np.array([item.log_predicted for item, _ in ran]))
        self.believed, self.best = means, float(means.max())

    def _each(self, points: Vector, log_predicted: Vector) -> list[tuple[float, Vector, Vector]]:
        """Share, means and standard deviations of log tokens/s under every scale."""
        near, prior = _covariances(self._kernel, points, self._points), _variances(self._kernel)
        found = (process.residuals(near, prior) for process in self._processes)
        return [(share, log_predicted + m, d) for share, (m, d) in zip(self._shares, found, strict=True)]

    def speeds(self, points: Vector, log_predicted: Vector) -> tuple[Vector, Vector]:
        """Means and standard deviations of log tokens/s of many configurations, one a row."""
        if not len(self._points):
            return log_predicted, np.full(len(points), sqrt(sum(_variances(self._kernel))))
        each = self._each(points, log_predicted)
        means: Vector = np.sum([share * mean for share, mean, _ in each], axis=0)
        squares = [share * (deviation**2 + (mean - means) ** 2) for share, mean, deviation in each]
        return means, np.sqrt(np.sum(squares, axis=0))

    def speed(self, point: Vector, log_predicted: float) -> tuple[float, float]:
        """Mean and standard deviation of log tokens/s of one configuration."""
        means, deviations = self.speeds(point[None, :], np.array([log_predicted]))
        return float(means[0]), float(deviations[0])

    def fits(self, log_share: float) -> float:
        """Probability that memory suffices: a step at the learned limit, softened."""
        return 1.0 / (1.0 + exp(min(50.0, max(-50.0, (log_share - self._fit_limit) / _FIT_WIDTH))))

    def gain(self, point: Vector, log_predicted: float, log_share: float) -> float:
        """Expected improvement over the best trial, in log tokens/s (0.01 is one percent), weighed by the fit.

        What more likely runs out of memory than not promises nothing: such a trial costs as much as any and measures
        no speed.
        """
        return self.likely_fits(log_share) * float(self.gains(point[None, :], np.array([log_predicted]))[0])

    def likely_fits(self, log_share: float) -> float:
        """Probability that memory suffices; 0 where it is below one half."""
        fits = self.fits(log_share)
        return fits * (fits >= 0.5)

    def gains(self, points: Vector, log_predicted: Vector) -> Vector:
        """Expected improvement of many configurations, memory aside."""
        if self.best is None:
            return log_predicted
        found: Vector = np.zeros(len(points))
        for share, means, deviations in self._each(points, log_predicted):
            found += share * _expected_excess((means - self.best) / deviations, deviations)
        return found


def _expected_excess(z: Vector, deviations: Vector) -> Vector:
    """Of normal variables over a floor that lies z standard deviations below their means."""
    below = np.array([0.5 * (1 + erf(value / sqrt(2))) for value in z])
    found: Vector = deviations * (z * below + np.exp(-0.5 * z * z) / sqrt(2 * pi))
    return found


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
