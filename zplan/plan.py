"""Plan: what is saved in profiles/*.json and what `sft.train` runs, unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from zplan.hardware import Cluster
from zplan.recipe import Recipe
from zplan.trial import TrialResult
from zplan.values import dataclass
from zplan.zero_config import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of the fallback ladder: a safer, smaller choice and why it is one."""

    choice: Choice
    deepspeed: Mapping[str, Any]
    reason: str
    predicted: TrialResult | None = None
    measured: TrialResult | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A configuration that is ready to train, with the evidence for it."""

    schema: Literal["zplan.plan/1"] = "zplan.plan/1"
    model_path: str
    """Folder with config.json, weights and tokenizer."""
    recipe: Recipe
    choice: Choice
    deepspeed: Mapping[str, Any]
    """The complete DeepSpeed configuration without "auto"; handed to the engine as it is."""
    cluster: Cluster
    """The machine it was made for (fingerprint)."""
    predicted: TrialResult | None = None
    simulated: TrialResult | None = None
    measured: TrialResult | None = None
    ladder: tuple[Rung, ...] = ()
    study: str | None = None
    trial: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
