"""Random weights that cost a copy: of the usual size, finite, no row like another, and nothing stays patched."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from sft import build
from sft.random_weights import _BLOCK_NUMEL, cheap_random_weights
from tests.sft.warm import make_recipe


def test_a_large_weight_is_filled_with_numbers_of_the_asked_size() -> None:
    weight = torch.empty(1024, 1024)
    assert weight.numel() > 10 * _BLOCK_NUMEL
    with cheap_random_weights():
        torch.nn.init.normal_(weight, std=0.02)
    # The deviation of a sample of n values is within five of its own standard errors, 1 / sqrt(2 n) of the asked one.
    assert abs(float(weight.std()) / 0.02 - 1) < 5 / sqrt(2 * _BLOCK_NUMEL)
    assert len(torch.unique(weight, dim=0)) == 1024


def test_a_seed_gives_the_same_weights_and_the_patch_ends() -> None:
    before = torch.Tensor.normal_

    def weights() -> torch.Tensor:
        torch.manual_seed(3)
        with cheap_random_weights():
            return torch.empty(300, 300).uniform_(-1, 1)

    assert torch.equal(weights(), weights())
    assert torch.Tensor.normal_ is before


def test_a_larger_weight_takes_no_more_operators_and_repeats_its_first_block() -> None:
    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        operators = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operators += 1
            return func(*args, **(kwargs or {}))

    def fill(numel: int) -> tuple[torch.Tensor, int]:
        weight = torch.empty(numel)
        with Count() as count, cheap_random_weights():  # type: ignore[no-untyped-call]
            weight.normal_()
        return weight, count.operators

    small, large = fill(_BLOCK_NUMEL + 1), fill(20 * _BLOCK_NUMEL + 17)
    assert small[1] == large[1]
    for weight, _ in (small, large):
        assert torch.equal(weight[_BLOCK_NUMEL:], weight[:-_BLOCK_NUMEL])


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody writes is found by its value."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(float("nan")))


def count_fills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the tensors that are filled with random numbers of either kind."""
    filled: list[int] = []

    def counting(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fill_and_count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            filled.append(tensor.numel())
            return fill(tensor, *args, **kwargs)

        return fill_and_count

    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    return filled


@pytest.mark.usefixtures("unwritten_is_nan")
def test_a_trial_s_weights_are_filled_once_and_all_of_them(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = count_fills(monkeypatch)
    model = build.load_model(str(tiny_model_dir), make_recipe(tiny_model_dir, None), weights="random")
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    assert len(filled) == sum(isinstance(module, kinds) for module in model.modules())
    assert not any(isnan(float(parameter.detach().sum())) for parameter in model.parameters())
    assert isnan(float(torch.empty(1)))  # the fixture works
    reset: Any = torch.nn.Linear.reset_parameters
    assert reset.__module__.startswith("torch")  # and nothing stays patched


@pytest.mark.usefixtures("unwritten_is_nan")
def test_torch_fills_the_layers_of_a_model_that_fills_its_own_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", lambda self, module: None)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    with cheap_random_weights(config):
        model = LlamaForCausalLM(config)
    assert not any(isnan(float(parameter.detach().sum())) for parameter in model.parameters())
