"""What the doctor finds on machines that are described by fixtures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from zplan import doctor
from zplan.doctor import TESTED_VERSIONS, Finding, diagnose, inspect_data
from zplan.hardware import Cluster, Gpu, Host
from zplan.units import GIB, MIB


def machine(*, memlock_bytes: int | None = None, shm_bytes: int = 8 * GIB, cgroup: int | None = None) -> Cluster:
    gpu = Gpu(name="A100", total_bytes=40 * GIB, free_bytes=39 * GIB)
    host = Host(
        total_bytes=64 * GIB, available_bytes=60 * GIB, memlock_bytes=memlock_bytes, shm_bytes=shm_bytes,
        cgroup_limit_bytes=cgroup,
    )  # fmt: skip
    return Cluster(gpu=gpu, host=host, gpus_per_node=2)


@pytest.fixture(autouse=True)
def extensions_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def with_versions(monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, str | None]) -> None:
    versions: dict[str, str | None] = {**TESTED_VERSIONS, "ninja": "1.13.2", **changes}
    monkeypatch.setattr(doctor, "installed_version", versions.get)


def about(word: str, findings: tuple[Finding, ...]) -> Finding:
    (found,) = [finding for finding in findings if word in finding.what]
    return found


def test_a_missing_package_is_broken_and_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, {"deepspeed": None})
    found = about("deepspeed", diagnose(machine()))
    assert found.severity == "broken"
    assert found.fix == f"pip install deepspeed=={TESTED_VERSIONS['deepspeed']}"


def test_another_version_than_the_tested_one_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, {"deepspeed": "0.16.0"})
    found = about("deepspeed", diagnose(machine()))
    assert (found.severity, found.what) == ("warning", f"deepspeed 0.16.0; tested with {TESTED_VERSIONS['deepspeed']}")


def test_a_local_build_of_the_tested_torch_is_the_tested_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, {"torch": f"{TESTED_VERSIONS['torch']}+cpu"})
    assert about(f"torch {TESTED_VERSIONS['torch']}", diagnose(machine())).severity == "ok"


def test_the_tested_versions_are_the_constrained_ones() -> None:
    lines = (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
    assert {f"{name}=={tested}" for name, tested in TESTED_VERSIONS.items()} <= set(lines)


def test_a_lock_left_by_a_killed_build_is_named(extensions_dir: Path) -> None:
    lock = extensions_dir / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    found = about("left behind", diagnose(machine()))
    assert found.fix == f"rm {lock}"


def test_a_cpu_build_of_torch_on_a_machine_with_gpus_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "torch_cuda_version", lambda: None)
    found = about("CPU build", diagnose(machine()))
    assert found.severity == "broken"
    on_cpu = replace(machine(), gpu=replace(machine().gpu, kind="cpu"))
    assert not [finding for finding in diagnose(on_cpu) if "CPU build" in finding.what]


@pytest.mark.parametrize(("nvcc", "warned"), [("12.4", True), ("12.8", False), (None, False)])
def test_a_cuda_compiler_of_another_version_than_torchs_is_warned(
    nvcc: str | None, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "torch_cuda_version", lambda: "12.8")
    monkeypatch.setattr(doctor, "nvcc_version", lambda: nvcc)
    assert any(finding.what.startswith("nvcc is CUDA") for finding in diagnose(machine())) == warned


def test_versions_of_cuda_are_read_without_importing_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '12.8'\nhip = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    assert doctor.torch_cuda_version() == "12.8"
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    assert doctor.torch_cuda_version() is None
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: str(nvcc))
    assert doctor.nvcc_version() == "12.4"


def test_a_machine_without_compiler_or_ninja_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, {"ninja": None})
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    findings = diagnose(machine())
    assert about("C++ compiler", findings).severity == "warning"
    assert about("ninja", findings).fix == "pip install ninja"


@pytest.mark.parametrize(("prefix", "warned"), [("/home/ann lee/zplan/.venv", True), ("/home/ann/zplan/.venv", False)])
def test_an_environment_that_extensions_cannot_be_linked_in_is_warned(
    prefix: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.sys, "prefix", prefix)
    assert any("has a space" in finding.what for finding in diagnose(machine())) == warned


@pytest.mark.parametrize(("memlock_bytes", "warned"), [(8 * MIB, True), (None, False), (GIB, False)])
def test_a_small_memlock_is_warned_and_unlimited_is_not(memlock_bytes: int | None, warned: bool) -> None:
    findings = diagnose(machine(memlock_bytes=memlock_bytes))
    assert any(finding.what.startswith("memlock") for finding in findings) == warned


def test_dockers_shm_default_is_too_small_for_two_gpus() -> None:
    assert about("/dev/shm", diagnose(machine(shm_bytes=64 * MIB))).severity == "warning"
    assert not [finding for finding in diagnose(machine()) if "/dev/shm" in finding.what]


def test_the_answer_for_programs_is_json_with_every_finding() -> None:
    cluster = machine(cgroup=32 * GIB)
    findings = diagnose(cluster)
    data = json.loads(json.dumps(inspect_data(cluster, findings)))
    assert data["schema"] == "zplan.inspect/1"
    assert data["cluster"]["world_size"] == 2
    assert [finding["what"] for finding in data["findings"]] == [finding.what for finding in findings]


def test_the_doctor_answers_where_torch_does_not_import() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from zplan.doctor import diagnose; from zplan.probe import probe_hardware\n"
        "diagnose(probe_hardware())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
