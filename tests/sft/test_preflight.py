"""What is looked at before a rank starts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sft.preflight import check_devices
from tests.sft.warm import make_plan, make_recipe
from zplan.errors import DoesNotFitError
from zplan.plan import Plan
from zplan.probe import NvmlGpu
from zplan.units import GIB


@dataclass(frozen=True)
class Driver:
    """So many cards, as NVML lists them."""

    count: int

    def devices(self) -> Sequence[NvmlGpu]:
        card = NvmlGpu(name="NVIDIA L4", total_bytes=24 * GIB, free_bytes=23 * GIB, compute_capability="8.9")
        return [card] * self.count


def plan_of(ranks: int, kind: str) -> Plan:
    plan = make_plan(make_recipe(Path("model"), None), ranks=ranks)
    assert kind in ("cuda", "cpu")
    gpu = replace(plan.cluster.gpu, kind="cuda" if kind == "cuda" else "cpu")
    return replace(plan, cluster=replace(plan.cluster, gpu=gpu))


@pytest.mark.parametrize(("cards", "visible"), [(1, None), (8, "0,3,5")])
def test_more_ranks_than_gpus_are_refused_before_any_is_started(cards: int, visible: str | None) -> None:
    with pytest.raises(DoesNotFitError, match=r"4 ranks, and this machine has [13] GPU"):
        check_devices(plan_of(4, "cuda"), Driver(cards), visible=visible)


@pytest.mark.parametrize(("kind", "cards"), [("cuda", 4), ("cuda", 8), ("cuda", 0), ("cpu", 1)])
def test_enough_gpus_cpu_ranks_and_a_driver_that_says_nothing_pass(kind: str, cards: int) -> None:
    check_devices(plan_of(4, kind), Driver(cards), visible=None)


class NothingHere(BaseHTTPRequestHandler):
    """Answers as the Hub does for a name that it does not know."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def empty_hub() -> Iterator[str]:
    """Its address."""
    with HTTPServer(("127.0.0.1", 0), NothingHere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask_hub(endpoint: str) -> subprocess.CompletedProcess[str]:
    """Notes and what ranks would inherit; in a process of its own, since the Hub's library reads these once."""
    script = (
        "import os; from sft.preflight import check_hub; "
        "print(check_hub('owner/data'), os.environ.get('HF_HUB_OFFLINE'))"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    return subprocess.run(
        [sys.executable, "-c", script], env={**inherited, "HF_ENDPOINT": endpoint}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip


def test_a_hub_id_that_the_hub_does_not_know_is_refused_before_any_rank_is_started(empty_hub: str) -> None:
    said = ask_hub(empty_hub).stderr
    assert "ConfigError: owner/data is no file here and no data set that the Hub shows you" in said


def test_where_the_hub_does_not_answer_ranks_only_look_into_the_cache() -> None:
    said = ask_hub("http://127.0.0.1:9").stdout  # the discard port: nobody listens
    assert "the Hub does not answer" in said
    assert said.rstrip().endswith(" 1")
