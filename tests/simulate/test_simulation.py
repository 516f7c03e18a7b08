"""The dry run through its worker, on a model of 0.1 M parameters."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.simulate.conftest import GIB, TINY_LLAMA, TINY_NUMEL, question
from zplan.errors import ConfigError
from zplan.report.timeline import load_answer, write_timeline
from zplan.simulate.client import SimulationTimeoutError, WorkerClient
from zplan.simulate.report import SimulationError, SimulationReport
from zplan.zero_config import OffloadOptimizer


def bytes_of(report: SimulationReport, name: str) -> int:
    return next(item.bytes for item in report.collectives if item.name == name)


def test_zero2_reduces_and_gathers_the_model_once_a_step(worker: WorkerClient) -> None:
    report = worker.ask(question(2))
    padded = -(-TINY_NUMEL // 8) * 8
    assert abs(bytes_of(report, "all_gather_into_tensor") - 2 * 2 * padded) <= 2 * 2 * 2 * 8
    assert report.categories["parameters"] >= 2 * TINY_NUMEL


def test_adam_states_are_eight_bytes_a_parameter_shared_by_the_ranks(worker: WorkerClient) -> None:
    report = worker.ask(question(2, zero={"reduce_bucket_size": 1000}))
    assert report.categories["optimizer"] == pytest.approx(8 * TINY_NUMEL / 4, abs=16 * 512)


def test_offloaded_states_leave_the_gpu_for_pinned_memory(worker: WorkerClient) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    with_offload = worker.ask(question(2, zero=_offloads(offload)))
    without = worker.ask(question(2))
    assert "optimizer" not in with_offload.categories
    assert with_offload.pinned_phases["step"] >= 4 * TINY_NUMEL // 4
    assert without.pinned_phases["step"] == 0
    assert with_offload.device_to_host_bytes > without.device_to_host_bytes


def test_zero3_holds_less_than_zero2_at_idle(worker: WorkerClient) -> None:
    two, three = worker.ask(question(2)), worker.ask(question(3))
    assert three.categories["parameters"] < two.categories["parameters"]


def test_categories_add_up_to_the_peak(worker: WorkerClient) -> None:
    report = worker.ask(question(3))
    assert sum(report.categories.values()) == report.gpu_allocated_bytes
    assert report.gpu_allocated_bytes == max(report.allocated_phases.values())
    assert report.gpu_reserved_bytes >= report.gpu_allocated_bytes


def test_two_answers_to_one_question_are_equal(worker: WorkerClient) -> None:
    first, second = worker.ask(question(3)), worker.ask(question(3))
    assert first.allocated_phases == second.allocated_phases
    assert first.collectives == second.collectives


def test_lora_trains_only_its_adapters(worker: WorkerClient) -> None:
    report = worker.ask(question(2, recipe={"method": "lora", "lora_r": 4}))
    assert report.categories.get("optimizer", 0) < 8 * TINY_NUMEL // 4


def test_a_full_card_is_reported_in_pytorchs_words(worker: WorkerClient) -> None:
    report = worker.ask(question(0, card_bytes=4 << 20))
    assert report.oom_message.startswith("CUDA out of memory. Tried to allocate")


def test_a_model_that_needs_downloaded_code_is_named(worker: WorkerClient) -> None:
    config = {**TINY_LLAMA, "model_type": "brand_new", "auto_map": {"AutoModelForCausalLM": "modeling.BrandNew"}}
    with pytest.raises(SimulationError, match="trust_remote_code") as caught:
        worker.ask(question(2, config=config))
    assert caught.value.module == "modeling.BrandNew"
    assert caught.value.cause == "unsupported"  # the formula still answers


def test_what_training_would_refuse_too_is_refused_with_the_way_out(worker: WorkerClient) -> None:
    with pytest.raises(SimulationError, match="BloomForCausalLM has no sdpa attention") as caught:
        worker.ask(question(2, config={**TINY_LLAMA, "model_type": "bloom"}))
    assert (caught.value.cause, caught.value.fix) == ("refused", "--attention eager")


def test_what_cannot_be_simulated_names_the_operation(worker: WorkerClient) -> None:
    with pytest.raises(SimulationError) as caught:
        worker.ask(question(2, recipe={"optimizer": "adamw_8bit"}))
    assert caught.value.operation == "adamw_8bit"


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "gemma3_text", "head_dim": 16},  # a scale that is a tensor made of a Python number
        {"model_type": "falcon", "new_decoder_architecture": False, "multi_query": True},  # `x[..., [-2], :]`
        {"model_type": "deepseek_v2", "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16,
         "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1},  # other heads in v
    ],
    ids=lambda family: family["model_type"],
)  # fmt: skip
def test_families_that_do_more_than_llama_does_are_simulated(worker: WorkerClient, family: dict[str, object]) -> None:
    config = {**TINY_LLAMA, "num_key_value_heads": 2, **family}
    two, three = worker.ask(question(2, config=config)), worker.ask(question(3, config=config))
    assert two.categories["parameters"] > three.categories["parameters"] > 0


def test_cpu_ranks_are_simulated_too(worker: WorkerClient) -> None:
    report = worker.ask(question(2, kind="cpu", world_size=2))
    assert report.gpu_allocated_bytes > 0
    assert report.gpu_used_bytes == report.gpu_reserved_bytes == report.gpu_allocated_bytes, "no caching allocator"
    assert report.host_to_device_bytes == 0


def test_the_trace_opens_in_perfetto(worker: WorkerClient, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    report = worker.ask(question(2, config={**TINY_LLAMA, "vocab_size": 20_000}, trace=str(path)))
    events = json.loads(path.read_text())["traceEvents"]
    assert {"M", "X"} <= {event["ph"] for event in events}
    assert {"forward", "backward", "step"} <= {event["name"] for event in events}
    peak = max(sum(event["args"].values()) for event in events if event["name"] == "gpu bytes")
    assert peak == pytest.approx(report.gpu_allocated_bytes, abs=2 << 20)  # counters skip changes below 1 MiB
    assert any("parameters" in event.get("args", ()) for event in events)


def test_the_timeline_reaches_the_peak_and_says_what_every_byte_is_for(worker: WorkerClient, tmp_path: Path) -> None:
    config = {**TINY_LLAMA, "vocab_size": 20_000}
    report = worker.ask(question(3, config=config))
    assert max(sample.gpu_bytes for sample in report.samples) == report.gpu_allocated_bytes
    assert all(sum(sample.categories.values()) == sample.gpu_bytes for sample in report.samples)
    assert {sample.phase for sample in report.samples} == set(report.allocated_phases)
    answer = {"model": {"name": "tiny"}, "label": "ZeRO-3", "simulation": asdict(report),
              "gpu": {"verdict": "fits", "free_bytes": 80 * GIB}}  # fmt: skip
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    page = write_timeline(str(tmp_path / "answer.json"), tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert report.top_allocations[0].site in page
    assert all(item.name in page for item in report.collectives if item.bytes)


def test_a_file_that_holds_no_simulation_is_refused_with_the_command_that_writes_one(tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text(json.dumps({"schema": "zplan.estimate/1", "simulation": None}))
    with pytest.raises(ConfigError, match="holds no simulation") as caught:
        load_answer(str(tmp_path / "answer.json"))
    assert "--out" in str(caught.value.fix)


def test_a_deadline_ends_the_worker_and_the_next_question_starts_another() -> None:
    with WorkerClient() as own:
        with pytest.raises(SimulationTimeoutError):
            own.ask(question(3), deadline_seconds=0.0)
        assert own.ask(question(0, card_bytes=GIB)).gpu_allocated_bytes > 0


def _offloads(sections: dict[str, dict[str, str]]) -> dict[str, object]:
    from zplan.zero_config import OffloadOptimizer

    return {"offload_optimizer": OffloadOptimizer(**sections["offload_optimizer"])}  # type: ignore[arg-type]


def test_states_on_the_nvme_keep_pinned_buffers_and_move_bytes(worker: WorkerClient, tmp_path: Path) -> None:
    """Four buffers of the only sub-group and the gradients are pinned; masters and both states travel each step."""
    config = {**TINY_LLAMA, "vocab_size": 20_000}
    nvme = OffloadOptimizer(device="nvme", nvme_path=str(tmp_path))
    report = worker.ask(question(3, world_size=1, config=config, zero={"offload_optimizer": nvme}))
    numel = report.categories["parameters"] // 2
    assert report.pinned_phases["step"] == pytest.approx((4 * 4 + 2) * numel, rel=0.01)
    assert report.nvme_read_bytes >= 2 * 4 * numel
    assert report.nvme_written_bytes >= 2 * 3 * 4 * numel
    assert list(tmp_path.iterdir()) == []  # the drive is the user's
