"""Estimates as the JSON that product.md fixes: zplan.estimate/1 and zplan.candidates/1. Unknown is null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from zplan.candidates import Candidate
from zplan.fixes import Fix
from zplan.hardware import Cluster
from zplan.memory.terms import ByteRange, HostLimit, MemoryEstimate, Term
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.settings import hf_auto_bucket_sizes
from zplan.speed.types import SpeedEstimate
from zplan.versions import installed_version
from zplan.zero_config import Choice, OffloadOptimizer, OffloadParam, ZeroConfig, flat_section

_VERSIONS = ("zplan", "deepspeed", "torch", "transformers", "trl", "peft")


@cache
def package_versions() -> dict[str, str | None]:
    """Installed versions of what the numbers depend on; null where a package is missing. Imports none of them."""
    return {name: installed_version(name) for name in _VERSIONS}


def estimate_data(
    candidate: Candidate,
    *,
    shape: ModelShape,
    recipe: Recipe,
    cluster: Cluster,
    origins: Mapping[str, str] | None = None,
    fixes: Sequence[Fix] = (),
    warnings: Sequence[str] = (),
    evidence: str = "formula",
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One configuration, `zplan.estimate/1`.

    Args:
        origins: zero key -> user | auto | default | tuned; where it is silent, a value that equals what transformers
            fills in is `auto`, DeepSpeed's own `default`, and any other one was chosen here, `tuned`.
        calibration: what trials on this machine have corrected the candidate by; None is not at all.
    """
    return {
        "schema": "zplan.estimate/1",
        **_question(shape, recipe, cluster),
        "label": candidate.label,
        "zero": _zero(candidate.choice, origins or {}, shape),
        "batch": {**asdict(candidate.choice.batch), "train_batch_size": candidate.choice.batch.train_batch_size},
        "gradient_checkpointing": candidate.choice.gradient_checkpointing,
        **_memory(candidate.memory),
        "speed": _speed(candidate.speed),
        "fixes": [fix_data(fix) for fix in fixes],
        "notes": list(candidate.memory.notes),
        "warnings": list(warnings),
        "evidence": evidence if calibration is None else "calibrated",
        "calibration": calibration,
        "versions": package_versions(),
    }


def _memory(memory: MemoryEstimate) -> dict[str, Any]:
    """`gpu`, `host` and `nvme`."""
    return {
        "gpu": {
            "allocated_bytes": _range(memory.gpu.allocated),
            "reserved_bytes": _range(memory.gpu.reserved),
            "used_bytes": _range(memory.gpu.used),
            "capacity_bytes": memory.gpu.capacity_bytes,
            "free_bytes": memory.gpu.free_bytes,
            "verdict": memory.gpu.verdict,
            "short_bytes": memory.gpu.short_bytes,
            "phases": dict(memory.gpu.phases),
            "terms": [_term(term) for term in memory.gpu.terms],
            "documented_bound_bytes": memory.gpu.documented_bound_bytes,
        },
        "host": {
            "resident_bytes": memory.host.resident_bytes,
            "pinned_bytes": memory.host.pinned_bytes,
            "phases": dict(memory.host.phases),
            "terms": [_term(term) for term in memory.host.terms],
            "verdict": memory.host.verdict,
            "short_bytes": memory.host.short_bytes,
            "limits": limits_data(memory.host.limits),
        },
        "nvme": {
            "bytes": memory.nvme.bytes,
            "free_bytes": memory.nvme.free_bytes,
            "verdict": memory.nvme.verdict,
            "short_bytes": memory.nvme.short_bytes,
        },
    }


def limits_data(limits: Sequence[HostLimit]) -> list[dict[str, Any]]:
    """`host.limits`."""
    return [asdict(limit) | {"short_bytes": limit.short_bytes} for limit in limits]


def _speed(speed: SpeedEstimate) -> dict[str, Any]:
    return {
        "step_seconds": speed.step_seconds,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_per_gpu": speed.tokens_per_second_per_gpu,
        "bound_by": speed.bound_by,
        "parts": dict(speed.parts),
    }


def candidates_data(
    candidates: Sequence[Candidate],
    *,
    shape: ModelShape,
    recipe: Recipe,
    cluster: Cluster,
    origins: Mapping[str, str] | None = None,
    changes: Sequence[Fix] = (),
    warnings: Sequence[str] = (),
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ranked table, `zplan.candidates/1`.

    Args:
        changes: the smallest changes that would make something fit, when nothing does.
    """
    return {
        "schema": "zplan.candidates/1",
        **_question(shape, recipe, cluster),
        "candidates": [
            estimate_data(
                candidate, shape=shape, recipe=recipe, cluster=cluster, origins=origins, calibration=calibration
            )
            for candidate in candidates
        ],
        "best": best_index(candidates),
        "fixes": [fix_data(change) for change in changes],
        "warnings": list(warnings),
        "versions": package_versions(),
    }


def best_index(candidates: Sequence[Candidate]) -> int | None:
    """The first candidate that fits by its upper bound; None if none does."""
    return next((index for index, candidate in enumerate(candidates) if candidate.tier == 0), None)


def fix_data(fix: Fix) -> dict[str, Any]:
    """One entry of `fixes`; tokens_per_second is the ratio to the speed before."""
    return asdict(fix)


def _question(shape: ModelShape, recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    model = {
        "name": shape.name,
        "model_type": shape.model_type,
        "architecture": shape.architecture,
        "num_parameters": shape.num_parameters,
        "source": shape.source,
    }
    described = {**asdict(cluster), "world_size": cluster.world_size}
    return {"model": model, "recipe": asdict(recipe), "cluster": described}


def _zero(choice: Choice, origins: Mapping[str, str], shape: ModelShape) -> dict[str, Any]:
    """Every key of the section with its value and origin; offload sections flattened to `offload_param.device`."""
    auto, bare = hf_auto_bucket_sizes(shape.hidden_size), ZeroConfig()
    offload = {"offload_optimizer": OffloadOptimizer(device="cpu"), "offload_param": OffloadParam(device="cpu")}
    default = flat_section(replace(bare, stage=choice.zero.stage, **offload)) | {"stage": bare.stage}  # type: ignore[arg-type]

    def origin(key: str, value: Any) -> str:
        given = origins.get(key) or origins.get(key.partition(".")[0])
        chosen = key.endswith(".device") or default.get(key) != value
        return given or ("auto" if auto.get(key) == value else "tuned" if chosen else "default")

    return {key: {"value": value, "origin": origin(key, value)} for key, value in flat_section(choice.zero).items()}


def _range(value: ByteRange) -> dict[str, int]:
    return {"low": value.low, "expected": value.expected, "high": value.high}


def _term(term: Term) -> dict[str, Any]:
    return asdict(term) | {"phases": list(term.phases)}
