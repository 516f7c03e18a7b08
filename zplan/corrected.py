"""An estimate corrected by what trials on this machine have shown: the label is then `calibrated`.

The peaks, of every phase too, are multiplied by measured / predicted; terms stay the formula's, with the difference as
one more. A correction may turn "fits" into "tight" or worse, and never the other way: that takes a trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from zplan.calibrate import QUANTITIES, Corrections, Quantity
from zplan.candidates import Candidate
from zplan.hardware import Cluster
from zplan.memory.terms import VERDICTS, ByteRange, GpuEstimate, HostEstimate, Phase, Term, Verdict
from zplan.speed.types import SpeedEstimate


def correct(candidate: Candidate, corrections: Corrections | None, cluster: Cluster) -> Candidate:
    """The candidate as this machine would measure it; unchanged while too little is known."""
    if corrections is None:
        return candidate
    memory, speed = candidate.memory, candidate.speed
    gpu, host, tokens = (corrections.ratio(quantity) for quantity in QUANTITIES)
    if gpu is not None:
        memory = replace(memory, gpu=_gpu(memory.gpu, gpu))
    if host is not None:
        memory = replace(memory, host=_host(memory.host, host, cluster.host.available_bytes))
    return replace(candidate, memory=memory, speed=speed if tokens is None else _speed(speed, tokens))


def correction_line(corrections: Corrections) -> str:
    """`calibrated by 12 trials on this machine: GPU bytes x 1.08, tokens/s x 0.83`."""
    names: Mapping[Quantity, str] = {"gpu_bytes": "GPU", "host_bytes": "host", "tokens_per_second": "tokens/s"}
    found = [f"{names[name]} x {ratio:.2f}" for name in QUANTITIES if (ratio := corrections.ratio(name)) is not None]
    return f"calibrated by {len(corrections.samples)} trials on this machine (measured / formula): {', '.join(found)}"


def correction_data(corrections: Corrections | None) -> dict[str, object] | None:
    """For JSON: how many trials, and measured / predicted of each quantity."""
    if corrections is None:
        return None
    ratios = {quantity: corrections.ratio(quantity) for quantity in QUANTITIES}
    return {"trials": len(corrections.samples), "measured_over_formula": ratios}


def _gpu(gpu: GpuEstimate, ratio: float) -> GpuEstimate:
    """What the driver and the libraries take beside the tensors does not grow with them."""
    low, expected, high = gpu.allocated.low, gpu.allocated.expected, gpu.allocated.high
    more = ByteRange(
        low=round(low * (ratio - 1)), expected=round(expected * ratio) - expected, high=round(high * (ratio - 1))
    )
    used = _plus(gpu.used, more)
    verdict = _worse(gpu.verdict, _verdict(used.expected, used.high, gpu.free_bytes))
    return replace(
        gpu,
        allocated=_plus(gpu.allocated, more),
        reserved=_plus(gpu.reserved, more),
        used=used,
        verdict=verdict,
        short_bytes=max(gpu.short_bytes, used.high - gpu.free_bytes if verdict == "does_not_fit" else 0),
        phases=_scaled(gpu.phases, ratio),
        terms=(*gpu.terms, _term(gpu.phases, gpu.peak_phase, ratio)),
    )


def _plus(size: ByteRange, more: ByteRange) -> ByteRange:
    return ByteRange(low=size.low + more.low, expected=size.expected + more.expected, high=size.high + more.high)


def _verdict(expected_bytes: int, high_bytes: int, free_bytes: int) -> Verdict:
    if high_bytes <= free_bytes:
        return "fits"
    return "tight" if expected_bytes <= free_bytes else "does_not_fit"


def _worse(one: Verdict, other: Verdict) -> Verdict:
    return max(one, other, key=VERDICTS.index)


def _host(host: HostEstimate, ratio: float, available_bytes: int) -> HostEstimate:
    """Pinned bytes are counted, not measured: they stay."""
    resident = round(host.resident_bytes * ratio)
    peak = max(host.phases, key=lambda phase: host.phases[phase])
    return replace(
        host,
        resident_bytes=resident,
        verdict=_worse(host.verdict, _verdict(resident, resident + resident // 10, available_bytes)),
        short_bytes=max(host.short_bytes, resident - available_bytes),
        phases=_scaled(host.phases, ratio),
        terms=(*host.terms, _term(host.phases, peak, ratio)),
    )


def _scaled(phases: Mapping[Phase, int], ratio: float) -> dict[Phase, int]:
    return {phase: round(size * ratio) for phase, size in phases.items()}


def _term(phases: Mapping[Phase, int], peak: Phase, ratio: float) -> Term:
    return Term(
        name="calibration",
        bytes=round(phases[peak] * ratio) - phases[peak],
        phases=(peak,),
        formula=f"{ratio:.3f} x the sum of the others: the median of the trials on this machine",
        source="zplan tune",
    )


def _speed(speed: SpeedEstimate, ratio: float) -> SpeedEstimate:
    if speed.step_seconds is None or speed.tokens_per_second is None or speed.tokens_per_second_per_gpu is None:
        return speed
    return replace(
        speed,
        step_seconds=speed.step_seconds / ratio,
        tokens_per_second=speed.tokens_per_second * ratio,
        tokens_per_second_per_gpu=speed.tokens_per_second_per_gpu * ratio,
    )
