"""The JSON that programs read: the field names that product.md fixes, ints for bytes, null for unknown."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.shapes import described_cluster, llama_like
from zplan.answer import best_index, candidates_data, estimate_data
from zplan.planner import Fixed, evaluate, make_choice, quantify_fixes, rank_candidates
from zplan.recipe import Recipe

SHAPE = llama_like(hidden_size=512, num_hidden_layers=4, vocab_size=8000)
RECIPE = Recipe(model="m", max_length=512, train_batch_size=16)
CLUSTER = described_cluster(gpus_per_node=4)


def answer(stage: int = 3, **more: Any) -> dict[str, Any]:
    choice = make_choice(SHAPE, RECIPE, CLUSTER, fixed=Fixed(stage=stage))
    candidate = evaluate(SHAPE, RECIPE, choice, CLUSTER)
    data = estimate_data(candidate, shape=SHAPE, recipe=RECIPE, cluster=CLUSTER, **more)
    parsed: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return parsed


def test_an_estimate_has_the_promised_fields() -> None:
    data = answer()
    assert data["schema"] == "zplan.estimate/1"
    assert {
        "model",
        "recipe",
        "cluster",
        "zero",
        "gpu",
        "host",
        "nvme",
        "speed",
        "fixes",
        "evidence",
        "versions",
    } <= set(data)
    for name in ("allocated_bytes", "reserved_bytes", "used_bytes"):
        low, expected, high = (data["gpu"][name][part] for part in ("low", "expected", "high"))
        assert low <= expected <= high
        assert type(expected) is int
    assert set(data["gpu"]["phases"]) == {"load", "init", "forward", "backward", "step", "save"}
    assert set(data["gpu"]["terms"][0]) == {"name", "bytes", "phases", "formula", "source"}
    assert {"resident_bytes", "pinned_bytes", "phases", "verdict", "short_bytes"} <= set(data["host"])
    assert {"step_seconds", "tokens_per_second", "tokens_per_second_per_gpu", "bound_by"} <= set(data["speed"])


def test_the_terms_that_live_at_the_peak_add_up_to_it() -> None:
    gpu = answer()["gpu"]
    peak = max(gpu["phases"], key=gpu["phases"].__getitem__)
    assert sum(term["bytes"] for term in gpu["terms"] if peak in term["phases"]) == gpu["phases"][peak]


def test_every_zero_value_says_where_it_comes_from() -> None:
    zero = answer(origins={"sub_group_size": "user"})["zero"]
    assert zero["sub_group_size"] == {"value": 10**9, "origin": "user"}
    assert zero["reduce_bucket_size"] == {"value": 512 * 512, "origin": "auto"}
    assert zero["contiguous_gradients"] == {"value": True, "origin": "default"}


def test_an_unknown_speed_is_null() -> None:
    cluster = described_cluster(gpus_per_node=4, dense_flops=None)
    choice = make_choice(SHAPE, RECIPE, cluster, fixed=Fixed(stage=3))
    data = estimate_data(evaluate(SHAPE, RECIPE, choice, cluster), shape=SHAPE, recipe=RECIPE, cluster=cluster)
    assert data["speed"]["step_seconds"] is None
    assert data["speed"]["bound_by"] is None


def test_fixes_are_listed_with_bytes_and_a_ratio() -> None:
    choice = make_choice(SHAPE, RECIPE, CLUSTER, fixed=Fixed(stage=3))
    fixes = quantify_fixes(SHAPE, RECIPE, choice, CLUSTER)
    assert {"change", "gpu_bytes", "host_bytes", "tokens_per_second"} <= set(answer(fixes=fixes)["fixes"][0])


@pytest.mark.parametrize(("gpu_bytes", "best"), [(80 << 30, 0), (1 << 28, None)])
def test_best_is_the_first_that_fits_or_null(gpu_bytes: int, best: int | None) -> None:
    cluster = described_cluster(gpus_per_node=2, gpu_bytes=gpu_bytes)
    candidates = rank_candidates(SHAPE, RECIPE, cluster)
    data = candidates_data(candidates, shape=SHAPE, recipe=RECIPE, cluster=cluster)
    assert data["schema"] == "zplan.candidates/1"
    assert data["best"] == best == best_index(candidates)
    assert len(data["candidates"]) == len(candidates)
    json.dumps(data, allow_nan=False)
