"""What a recipe needs from the machine, asked before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sft import build, software
from tests.sft.warm import make_plan, make_recipe
from zplan.errors import ConfigError, MachineError
from zplan.hardware import DeviceKind


def check(*, stage: int = 2, kind: DeviceKind = "cuda", **recipe: Any) -> None:
    plan = make_plan(make_recipe(Path("model"), None, **recipe), stage=stage)
    software.check_software(plan.recipe, plan.choice, kind)


@pytest.fixture
def without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = ("bitsandbytes", "liger_kernel", "flash_attn", "wandb")
    monkeypatch.setattr(software, "find_spec", lambda name: None if name in extras else find_spec(name))


@pytest.mark.usefixtures("without_extras")
@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"method": "qlora"}, "qlora loads 4-bit weights"),
        ({"method": "qlora", "load_in_8bit": True}, "qlora loads 8-bit weights"),
        ({"optimizer": "paged_adamw_8bit"}, "paged_adamw_8bit is its optimizer"),
        ({"loss": "liger"}, "the loss is liger"),
        ({"attention": "flash_attention_2"}, "the attention is flash_attention_2"),
    ],
)
def test_a_library_that_is_missing_is_named_with_why_and_what_to_type(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(MachineError) as caught:
        check(**recipe)
    assert "is not installed" in caught.value.what
    assert caught.value.because == said
    assert str(caught.value.fix).startswith("pip install")


@pytest.mark.usefixtures("without_extras")
def test_other_recipes_need_neither() -> None:
    check(method="lora")
    check(stage=3)


def test_flash_attention_is_refused_on_cpu_ranks() -> None:
    with pytest.raises(ConfigError, match="flash_attention_2 on CPU ranks"):
        check(attention="flash_attention_2", kind="cpu")


def test_eight_bit_weights_are_refused_at_stage_3_and_without_adapters() -> None:
    with pytest.raises(ConfigError, match="under ZeRO stage 3"):
        check(stage=3, method="qlora", load_in_8bit=True)
    with pytest.raises(ConfigError, match="the method is lora"):
        check(method="lora", load_in_8bit=True)


def test_eight_bit_loading_reaches_transformers(tmp_path: Path) -> None:
    eight = build._quantization(make_recipe(tmp_path, None, method="qlora", load_in_8bit=True))
    four = build._quantization(make_recipe(tmp_path, None, method="qlora"))
    assert eight is not None
    assert four is not None
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    assert (four.load_in_8bit, four.load_in_4bit) == (False, True)


@pytest.mark.usefixtures("without_extras")
def test_a_reporter_is_known_and_installed_before_the_start() -> None:
    software.check_reporter("none")
    with pytest.raises(ConfigError, match="--report-to is nonsense"):
        software.check_reporter("nonsense")
    with pytest.raises(MachineError, match="wandb is not installed"):
        software.check_reporter("wandb")


def test_every_reporter_is_one_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert software.REPORTERS.keys() <= INTEGRATION_TO_CALLBACK.keys()
