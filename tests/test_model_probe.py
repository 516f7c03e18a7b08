"""Shapes read from config.json through transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from zplan.catalog import find_model, model_names
from zplan.errors import ConfigError
from zplan.model_probe import build_on_meta, probe_config, shape_of_config
from zplan.model_shape import ModelShape

TINY = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 128,
}  # fmt: skip
NOT_IN_TRANSFORMERS = ("qwen-", "internlm2-", "baichuan2-", "chatglm3-")


def test_a_built_model_has_the_same_parameters_in_the_same_order() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
    shape = shape_of_config(TINY, name="tiny")
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(name, parameter.shape) for name, parameter in shape.parameters()] == built
    assert shape.num_parameters == model.num_parameters()


def test_tied_embeddings_count_once() -> None:
    untied = shape_of_config(TINY, name="tiny")
    tied = shape_of_config({**TINY, "tie_word_embeddings": True}, name="tiny")
    assert untied.num_parameters - tied.num_parameters == 128 * 64
    assert (untied.tie_word_embeddings, tied.tie_word_embeddings) == (False, True)


def _in_transformers() -> list[str]:
    return [name for name in model_names() if not name.startswith(NOT_IN_TRANSFORMERS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", _in_transformers())
def test_catalogue_counts_equal_transformers_on_the_meta_device(name: str) -> None:
    shape = find_model(name)
    assert isinstance(shape, ModelShape)
    model = build_on_meta(dict(shape.config), name=name)
    assert shape.num_parameters == model.num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2", "pythia-70m", "t5-small"])
def test_small_catalogue_models_equal_really_built_ones(name: str) -> None:
    shape = find_model(name)
    assert isinstance(shape, ModelShape)
    meta = build_on_meta(dict(shape.config), name=name)
    real = type(meta)(meta.config)
    built = [(key, tuple(parameter.shape)) for key, parameter in real.named_parameters()]
    assert [(key, parameter.shape) for key, parameter in shape.parameters()] == built
    assert all(parameter.device == torch.device("cpu") for parameter in real.parameters())


def test_a_probed_folder_needs_no_second_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    found = find_model(str(folder))
    assert isinstance(found, Path)
    shape = probe_config(found, name="model")
    assert find_model(str(folder)) == shape
    (folder / "config.json").write_text(json.dumps({**TINY, "vocab_size": 256}))
    assert isinstance(find_model(str(folder)), Path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "my_own"}, "does not know"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": "vit"}, "no language model"),
        ({"model_type": "qwen3_vl"}, "a qwen3_vl wraps a qwen3_vl_text, which is no model of its own"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers is 1000000000"),
        ({"text_config": {"hidden_size": -1}}, "hidden_size is -1"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": 1e9}, "vocab_size is 1000000000.0"),
        ({"num_attention_heads": 1 << 40}, "num_attention_heads"),
        ({"num_attention_heads": 6}, "cannot build a llama"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": -8}, "head_dim is -8"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
    ],
)
def test_an_impossible_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_of_config({**TINY, **change}, name="bad")


def test_a_model_without_attention_is_refused_as_such() -> None:
    with pytest.raises(ConfigError, match="only attention is modelled"):
        shape_of_config({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2}, name="state space")


def test_a_key_that_a_custom_model_does_not_have_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        shape_of_config({**TINY, "hiden_size": 64, "rope_theta": 1e6}, name="custom")
    assert caught.value.problems == ("hiden_size: a llama has no such key; did you mean hidden_size?",)


def test_junk_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content in ("", "[]", "{", '{"a": 1}', "\x00" * 100):
        file.write_text(content)
        with pytest.raises(ConfigError):
            probe_config(file, name="junk")
