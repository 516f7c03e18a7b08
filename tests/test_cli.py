"""The command line as a user meets it: real processes, exit codes, stdout and stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CARD = ("--gpu", "h100-80gb", "--gpus-per-node", "8")


def zplan(*arguments: str, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a terminal of 80 columns."""
    command = [sys.executable, "-m", "zplan.cli", *arguments]
    env = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300, env=env)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def answer(*arguments: str, code: int = 0) -> dict[str, Any]:
    """The JSON on stdout."""
    data = json.loads(zplan(*arguments, "--json", code=code).stdout)
    assert isinstance(data, dict)
    return data


def test_the_ranked_table_is_json_under_its_schema() -> None:
    data = answer("estimate", "--model", "mistral-7b", *CARD)
    assert data["schema"] == "zplan.candidates/1"
    assert data["best"] == 0
    best = data["candidates"][0]
    assert best["schema"] == "zplan.estimate/1"
    assert best["gpu"]["used_bytes"]["high"] <= best["gpu"]["free_bytes"]


def test_what_looks_like_markup_or_emoji_is_printed_as_it_is() -> None:
    code = "from zplan import cli; cli._show('wrote a[bold]/:cat:.json')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "wrote a[bold]/:cat:.json\n"


def test_one_configuration_has_every_field_of_the_contract() -> None:
    data = answer("estimate", "--model", "mistral-7b", *CARD, "--stage", "2", "--set", "reduce_bucket_size=2e8")
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
    assert data["zero"]["reduce_bucket_size"] == {"value": 200_000_000, "origin": "user"}
    assert data["zero"]["stage"]["origin"] == "user"
    assert data["model"]["num_parameters"] == 7_241_732_096
    at_peak = max(data["gpu"]["phases"], key=data["gpu"]["phases"].__getitem__)
    terms = [term["bytes"] for term in data["gpu"]["terms"] if at_peak in term["phases"]]
    assert sum(terms) == data["gpu"]["phases"][at_peak]
    assert all(isinstance(value, int) for value in data["gpu"]["phases"].values())


def test_what_does_not_fit_ends_with_3() -> None:
    data = answer("estimate", "--model", "llama-3.1-405b", "--gpu", "t4-16gb", "--stage", "3", code=3)
    assert data["gpu"]["verdict"] == "does_not_fit"
    assert data["gpu"]["short_bytes"] > 0


def test_tables_stay_within_80_columns_and_lose_no_digit() -> None:
    for more in (("--nvme", "50GiB", "--host-ram", "100GiB"), ("--stage", "3", "--method", "lora")):
        out = zplan("estimate", "--model", "mistral-7b", *CARD, *more).stdout
        assert max(len(line) for line in out.splitlines()) <= 80
        assert "…" not in out


def test_the_documented_bound_of_the_worked_example_is_9_gb() -> None:
    sizes = ("--set", "reduce_bucket_size=5e8", "--set", "allgather_bucket_size=5e8", "--set", "overlap_comm=true")
    data = answer("estimate", "--model", "mistral-7b", *CARD, "--stage", "2", *sizes)
    assert data["gpu"]["documented_bound_bytes"] == 500_000_000 * 2 * 2 * 4.5


def test_estimating_imports_nothing_slow() -> None:
    code = (
        "import sys, zplan.cli as c; sys.argv = ['zplan', 'estimate', '--model', 'mistral-7b', '--gpu', 'h100', '-q']\n"
        "try: c.main()\n"
        "except SystemExit: pass\n"
        "slow = ('torch', 'transformers', 'deepspeed', 'optuna', 'pandas', 'pydantic', 'psutil', 'numpy', 'jinja2')\n"
        "sys.exit(', '.join(name for name in slow if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("estimate",), ("no model", "--model")),
        (("estimate", "--model", "mistrl-7b"), ("mistral-7b",)),
        (("estimate", "--model", "mistral-7b", "--gpu", "h1000"), ("h100-80gb",)),
        (("estimate", "--model", "mistral-7b", *CARD, "--stage", "4"), ("stage is 4",)),
        (("estimate", "--model", "mistral-7b", *CARD, "--stage", "2", "--set", "sub_grup_size=1"), ("sub_group_size",)),
        (("estimate", "--model", "mistral-7b", *CARD, "--train-batch-size", "7", "--stage", "2"), ("does not divide",)),
        (("estimate", "--model", "mistral-7b", *CARD, "--method", "dora"), ("full, lora, qlora",)),
        (("estimate", "--model", "mistral-7b", *CARD, "--host-ram", "-5"), ("--host-ram",)),
        (("estimate", "--model", "mistral-7b", *CARD, "--bucket-rule", "guess"), ("engine or documented",)),
        (("estimate", "--no-such-flag",), ("no-such-flag",)),
        (("estimate", "--plan", "no-such-plan.json"), ("no-such-plan.json",)),
        (("tune", "--model", "mistral-7b", "--backend", "magic"), ("real, simulated or formula",)),
        (("tune", "--model", "mistral-7b", "--trials", "0"), ("--trials is 0",)),
        (("report", "no-such.journal"), ("no-such.journal",)),
        (("simulate", "--model", "mistral-7b", *CARD), ("--stage",)),
    ],
)  # fmt: skip
def test_a_malformed_question_ends_with_2_and_says_why(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = zplan(*arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("zplan: ")
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_inspect_tells_the_cluster_and_the_versions() -> None:
    data = answer("inspect")
    assert data["schema"] == "zplan.inspect/1"
    assert data["cluster"]["world_size"] >= 1
    assert data["versions"]["deepspeed"]
    assert "ok " not in zplan("inspect", "-q").stdout


def test_explain_names_the_option_and_its_bytes() -> None:
    out = zplan("estimate", "--model", "mistral-7b", *CARD, "--stage", "2", "--explain", "reduce_bucket_size").stdout
    assert "reduce_bucket_size" in out
    assert "GiB" in out or "MiB" in out


def test_a_deepspeed_json_of_the_user_is_read(tmp_path: Path) -> None:
    config = tmp_path / "zero2.json"
    config.write_text(
        json.dumps({"bf16": {"enabled": "auto"}, "train_batch_size": "auto", "zero_optimization": {"stage": 2}})
    )
    data = answer("estimate", "--model", "mistral-7b", *CARD, "--ds-config", str(config))
    assert data["zero"]["reduce_bucket_size"]["value"] == 500_000_000
    config.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_buckt_size": 1}}))
    done = zplan("estimate", "--model", "mistral-7b", *CARD, "--ds-config", str(config), code=2)
    assert "reduce_bucket_size" in done.stderr


def test_a_study_by_formula_is_tuned_reported_and_exported(tmp_path: Path) -> None:
    small = ("--model", "qwen2.5-0.5b", "--gpu", "rtx-4090-24gb", "--host-ram", "64GiB", "--max-length", "512")
    done = zplan("tune", *small, "--backend", "formula", "--trials", "4", cwd=tmp_path)
    assert "profiles/best.json" in done.stdout
    assert "Trials by formula: nothing was measured" in done.stdout
    assert max(map(len, (done.stdout + done.stderr).splitlines())) <= 80
    again = zplan("tune", *small, "--backend", "formula", "--trials", "4", cwd=tmp_path)
    assert "4 trials are done" in again.stdout
    zplan("report", cwd=tmp_path)
    page = (tmp_path / "reports" / "study.html").read_text()
    assert page.count("<svg") >= 2
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    planned = zplan("estimate", "--plan", "profiles/best.json", "--gpu", "rtx-4090-24gb", "-q", cwd=tmp_path)
    assert "ZeRO" in planned.stdout or "DDP" in planned.stdout


def test_a_dead_key_of_a_file_is_called_so_once(tmp_path: Path) -> None:
    section = {"stage": 2, "allgather_bucket_size": 200_000_000, "offload_param": {"device": "cpu"}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": section, "train_batch_size": 16}))
    told = zplan("estimate", "--model", "mistral-7b", *CARD, "--ds-config", "ds.json", cwd=tmp_path).stdout
    for key in ("allgather_bucket_size", "offload_param"):
        assert sum(line.partition(": ")[2].startswith(key) for line in told.splitlines()) == 1
    assert "without overlap_comm the documentation counts each bucket once" in " ".join(told.split())


def test_the_flags_offered_for_the_first_row_ask_about_the_first_row() -> None:
    asked = ("estimate", "--model", "smollm2-135m", "--gpu", "rtx-4090", "--gpus-per-node", "4", "--max-length", "64")
    flags = zplan(*asked).stdout.partition("the first in detail: add ")[2].split()
    first = answer(*asked)["candidates"][0]
    again = answer(*asked, *flags)
    assert first["batch"]["world_size"] < 4, "so small a model is slower over PCIe"
    assert (again["label"], again["batch"]) == (first["label"], first["batch"])


def test_a_search_in_which_nothing_can_fit_says_so_and_who_knows_more(tmp_path: Path) -> None:
    small = ("--gpu", "rtx-4090", "--host-ram", "16GiB", "--backend", "formula")
    done = zplan("tune", "--model", "llama-2-7b", *small, cwd=tmp_path, code=3)
    assert "nothing was tried: nothing can fit" in done.stdout
    assert "zplan estimate with the same flags" in done.stdout
    assert not (tmp_path / "profiles" / "best.json").exists()


def test_what_is_not_modelled_is_tight_and_says_how_to_settle_it() -> None:
    done = zplan("estimate", "--model", "gpt2", "--method", "lora", "--use-dora", "--gpu", "h100")
    assert "nothing is sure to fit" in done.stdout
    assert "zplan simulate" in done.stdout


def test_when_nothing_fits_the_closest_one_says_what_it_lacks() -> None:
    machine = ("--gpu", "rtx-4090", "--gpus-per-node", "1", "--host-ram", "64GiB")
    done = zplan("estimate", "--model", "llama-2-7b", *machine, code=3)
    assert "comes closest" in done.stdout
    assert "--method lora" in done.stdout


def test_a_knob_is_narrowed_and_bounded_on_the_command_line(tmp_path: Path) -> None:
    small = ("--model", "qwen2.5-0.5b", "--gpu", "rtx-4090-24gb", "--gpus-per-node", "4", "--max-length", "512")
    knobs = ("--set", "world_size=1,2", "--set", "stage=2,3", "--set", "reduce_bucket_size=1e6..2e6")
    done = answer("tune", *small, *knobs, "--backend", "formula", "--trials", "5", "--out", str(tmp_path / "b.json"),
                  "--study", str(tmp_path / "s.journal"))  # fmt: skip
    choices = [trial["choice"] for trial in done["trials"]]
    assert len(choices) == 5
    assert all(choice["batch"]["world_size"] in (1, 2) for choice in choices)
    assert all(choice["zero"]["stage"] in (2, 3) for choice in choices)
    assert all(1_000_000 <= choice["zero"]["reduce_bucket_size"] <= 2_000_000 for choice in choices)


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_disk_behind_stdout_is_the_machines_error(more: tuple[str, ...]) -> None:
    arguments = ("estimate", "--model", "gpt2", "--gpu", "h100-80gb", *more)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "zplan.cli", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 4
    assert done.stderr.startswith("zplan: the answer cannot be written to stdout: No space left on device\n")
    assert "Traceback" not in done.stderr
