"""Texts as DeepSpeed, torch and gloo printed them (deepspeed 0.19.8, torch 2.13), and what they mean."""

from __future__ import annotations

import pytest

from zplan.backends.outcome import Observed, RankError, RankExit, classify
from zplan.errors import MachineError
from zplan.trial import Outcome


def _failed(text: str, *, returncode: int = 1) -> Observed:
    return Observed(exits=(RankExit(rank=0, returncode=returncode, ended_at=5.0),), log_tails={0: text})


RECORDED = [
    (Outcome.GPU_OOM, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total ..."),
    (Outcome.GPU_OOM, "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (
        Outcome.HOST_OOM,
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 67108864 bytes. Error code 12 (Cannot allocate memory)",
    ),
    (Outcome.BAD_CONFIG, "deepspeed.runtime.config.DeepSpeedConfigError: MiCS ZeRO-3 sharding has been removed"),
    (Outcome.BAD_CONFIG, "  Extra inputs are not permitted [type=extra_forbidden, input_value=1, input_type=int]"),
    (Outcome.BAD_CONFIG, "ValueError: Type fp16 is not supported on your device."),
    (Outcome.BAD_CONFIG, "AssertionError: Hybrid Optimizer Only Supports DeepSpeedCPUAdam"),
    (
        Outcome.BAD_CONFIG,
        "AssertionError: Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
        "gradient_acc_step * world_size 4 != 2 * 1 * 1",
    ),
    (
        Outcome.BAD_CONFIG,
        "ValueError: Please correct the following DeepSpeed config values that mismatch TrainingArguments values",
    ),
    (Outcome.ENV_BROKEN, "RuntimeError: Unable to JIT load the cpu_adam op due to ninja not being installed."),
    (
        Outcome.ENV_BROKEN,
        "Unable to JIT load the async_io op due to it not being compatible due to hardware/software issue.",
    ),
    (Outcome.ENV_BROKEN, "RuntimeError: Error building extension 'cpu_adam'"),
    (
        Outcome.ENV_BROKEN,
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3384, unhandled system error "
        "(run with NCCL_DEBUG=INFO for details), ncclSystemError: System call failed or device error",
    ),
    (Outcome.ENV_BROKEN, "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."),
    (
        Outcome.ENV_BROKEN,
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
        "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
    ),
    (
        Outcome.TIMED_OUT,
        "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 15000ms for send operation",
    ),
]


@pytest.mark.parametrize(("outcome", "text"), RECORDED)
def test_a_recorded_text_has_its_outcome(outcome: Outcome, text: str) -> None:
    assert classify(_failed(text))[0] is outcome


@pytest.mark.parametrize("text", [text for outcome, text in RECORDED if outcome is Outcome.ENV_BROKEN])
def test_a_broken_machine_comes_with_a_mend(text: str) -> None:
    assert "; try: " in classify(_failed(text))[1]


def test_all_zero_with_a_result_is_ok() -> None:
    exits = (RankExit(rank=0, returncode=0, ended_at=1.0), RankExit(rank=1, returncode=0, ended_at=1.1))
    assert classify(Observed(exits=exits, has_result=True)) == (Outcome.OK, "")


def test_all_zero_without_a_result_is_not_ok() -> None:
    assert classify(Observed(exits=(RankExit(rank=0, returncode=0, ended_at=1.0),)))[0] is Outcome.RANK_LOST


def test_the_rank_that_failed_first_decides() -> None:
    observed = Observed(
        exits=(RankExit(rank=0, returncode=1, ended_at=9.0), RankExit(rank=1, returncode=1, ended_at=8.0)),
        log_tails={0: "RuntimeError: something after it", 1: "torch.OutOfMemoryError: CUDA out of memory."},
    )
    assert classify(observed)[0] is Outcome.GPU_OOM


def test_a_rank_that_only_lost_its_peer_never_decides() -> None:
    gloo = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:30022. GLHF!"
    observed = Observed(
        exits=(RankExit(rank=0, returncode=1, ended_at=7.9), RankExit(rank=1, returncode=-9, ended_at=8.0)),
        log_tails={0: gloo, 1: "step 3"},
    )
    outcome, message = classify(observed)
    assert outcome is Outcome.RANK_LOST
    assert "rank 1 was ended by SIGKILL" in message


def test_sigkill_by_the_kernel_for_memory_is_host_oom() -> None:
    observed = Observed(exits=(RankExit(rank=0, returncode=-9, ended_at=4.0),), host_oom_kills=1)
    assert classify(observed)[0] is Outcome.HOST_OOM


def test_ranks_that_we_ended_are_no_evidence() -> None:
    exits = (
        RankExit(rank=0, returncode=-15, ended_at=5.0, ended_by_us=True),
        RankExit(rank=1, returncode=3, ended_at=4.0),
    )
    assert "rank 1 ended with status 3" in classify(Observed(exits=exits))[1]


@pytest.mark.parametrize(
    ("watchdog", "outcome"),
    [("deadline", Outcome.TIMED_OUT), ("stalled", Outcome.TIMED_OUT), ("host_memory", Outcome.HOST_OOM)],
)
def test_a_watchdog_decides_before_everything_else(watchdog: str, outcome: Outcome) -> None:
    observed = Observed(
        exits=(RankExit(rank=0, returncode=1, ended_at=5.0),), log_tails={0: "CUDA out of memory"}, watchdog=watchdog
    )  # type: ignore[arg-type]
    assert classify(observed)[0] is outcome


def test_a_refusal_before_the_first_step_is_a_bad_config() -> None:
    observed = Observed(
        exits=(RankExit(rank=0, returncode=1, ended_at=5.0),),
        errors={0: RankError(type="builtins.ValueError", message="a setting that nobody knows", phase="init")},
    )
    assert classify(observed)[0] is Outcome.BAD_CONFIG


def test_a_missing_library_is_a_broken_machine_and_says_what_to_type() -> None:
    error = MachineError("bitsandbytes is not installed", because="qlora needs it", fix="pip install bitsandbytes")
    observed = Observed(
        exits=(RankExit(rank=0, returncode=4, ended_at=5.0),),
        errors={0: RankError(type="zplan.errors.MachineError", message=str(error), phase="init", traceback="...")},
    )
    outcome, message = classify(observed)
    assert outcome is Outcome.ENV_BROKEN
    assert "pip install bitsandbytes" in message


def test_the_word_error_alone_is_no_failure() -> None:
    exits = (RankExit(rank=0, returncode=0, ended_at=1.0),)
    log = "WARNING: error handling enabled; 0 errors; CUDA out of memory is handled"
    assert classify(Observed(exits=exits, has_result=True, log_tails={0: log}))[0] is Outcome.OK
