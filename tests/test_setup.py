"""tools/setup_env.py: looks before it starts, picks torch's build, repairs what was interrupted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script over an empty checkout, on a machine without an NVIDIA driver."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("pyproject.toml", "constraints.txt", "tools/setup_env.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name, value in (("ROOT", tmp_path), ("VENV", tmp_path / ".venv"), ("STAMP", tmp_path / ".venv" / "stamp")):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: False)
    return module


def pip_that_offers(requires: list[str]) -> Callable[..., Any]:
    """pip's `--dry-run --report` for a torch with these requirements."""

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        report = Path(command[command.index("--report") + 1])
        report.write_text(json.dumps({"install": [{"metadata": {"requires_dist": requires}}]}))
        return SimpleNamespace(returncode=0, stderr="")

    return run


def test_a_cuda_build_is_not_taken_without_a_driver(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["sympy>=1.13.3", 'nvidia-cudnn-cu13==9.20; platform_system == "Linux"']
    monkeypatch.setattr(subprocess, "run", pip_that_offers(needs))
    assert setup.torch_arguments() == ["--index-url", setup.CPU_INDEX]


def test_an_index_that_serves_the_cpu_build_is_used_as_it_is(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_offers(["sympy>=1.13.3"]))
    assert setup.torch_arguments() == []


def test_a_gpu_machine_gets_the_normal_build(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "has_nvidia_driver", lambda: True)
    assert setup.torch_arguments() == []


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m, p: p.setattr(m.shutil, "which", lambda name: None), "no C++ compiler"),
        (lambda m, p: p.setattr(m.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30)), "1.0 GiB free"),
        (lambda m, p: p.setattr(m, "LEAST_PYTHON", (99, 0)), "this is Python"),
    ],
)
def test_what_would_stop_the_installation_stops_it_before_it_starts(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    break_it: Callable[[ModuleType, pytest.MonkeyPatch], None], message: str,
) -> None:  # fmt: skip
    break_it(setup, monkeypatch)
    assert setup.main() == 4
    said = capsys.readouterr().err
    assert message in said
    assert "because:" in said
    assert "try:" in said
    assert not setup.VENV.exists()


def test_an_interrupted_installation_is_continued_and_a_finished_one_is_not_repeated(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    def interrupted() -> None:
        runs.append("interrupted")
        raise KeyboardInterrupt

    def whole() -> None:
        runs.append("whole")
        (setup.VENV / "bin").mkdir(parents=True)
        (setup.VENV / "bin" / "zplan").touch()

    monkeypatch.setattr(setup, "install", interrupted)
    assert setup.main() == 130
    monkeypatch.setattr(setup, "install", whole)
    assert (setup.main(), setup.main()) == (0, 0)
    assert runs == ["interrupted", "whole"]


def test_a_changed_constraint_installs_again(setup: ModuleType) -> None:
    before = setup.fingerprint()
    constraints = setup.ROOT / "constraints.txt"
    constraints.write_text(constraints.read_text() + "another==1.0\n")
    assert setup.fingerprint() != before


def test_a_failed_step_is_named(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "install", lambda: setup.run(sys.executable, "-c", "raise SystemExit(1)"))
    assert setup.main() == 4
    assert "a step failed" in capsys.readouterr().err
    assert not setup.is_current()


def test_the_constraints_pin_torch_without_a_build_and_name_no_index() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line for line in pins)
    assert "torch==2.13.0" in pins
