"""Versions read from folder names are the ones that importlib.metadata reads from inside."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from zplan import versions
from zplan.versions import installed_version


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    versions.installed_version.cache_clear()
    versions._from_folders.cache_clear()


@pytest.mark.parametrize("package", ["zplan", "torch", "deepspeed", "transformers", "trl", "peft", "accelerate"])
def test_it_is_the_version_that_the_package_states(package: str) -> None:
    assert installed_version(package) == version(package)


def test_a_missing_package_has_none() -> None:
    assert installed_version("no-such-package") is None


def test_the_first_folder_of_the_path_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, number in (("one", "1.0+cpu"), ("two", "2.0")):
        (tmp_path / folder / f"a_b-{number}.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "no such"), str(tmp_path / "one"), str(tmp_path / "two")])
    assert installed_version("a-b") == "1.0+cpu"


def test_what_has_no_such_folder_is_asked_of_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "older.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: older\nVersion: 0.3\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_version("older") == "0.3"
