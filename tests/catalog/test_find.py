"""The catalogue: names, Hub ids, folders, and counts that equal transformers' own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zplan.catalog import find_model, gpu_names, hub_ids, load_gpu, load_links, model_names
from zplan.catalog.config_file import check_config
from zplan.catalog.find import _index
from zplan.errors import ConfigError
from zplan.model_shape import ModelShape


def test_every_entry_loads_and_has_the_indexed_count() -> None:
    for name in model_names():
        shape = find_model(name)
        assert isinstance(shape, ModelShape)
        assert shape.num_parameters == _index()[name]["num_parameters"]


def test_counts_equal_the_published_ones() -> None:
    published = {name: entry["published"] for name, entry in _index().items() if entry["published"] is not None}
    assert len(published) > 80
    for name, count in published.items():
        shape = find_model(name)
        assert isinstance(shape, ModelShape)
        assert shape.num_parameters + (shape.beside_numel or 0) == count, name


def test_gemma_3_has_siglip_beside_its_text_tower() -> None:
    shape = find_model("google/gemma-3-4b-it")
    assert isinstance(shape, ModelShape)
    layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152  # attention, MLP, two norms
    embeddings = 3 * 14 * 14 * 1152 + 1152 + (896 // 14) ** 2 * 1152
    assert shape.beside_numel == 27 * layer + embeddings + 2 * 1152 + 1152 * 2560 + 1152


def test_mistral_adds_up_by_hand() -> None:
    shape = find_model("mistral-7b")
    assert isinstance(shape, ModelShape)
    attention = 4096 * 4096 * 2 + 1024 * 4096 * 2  # q and o; k and v with 8 heads of 128
    layer = attention + 3 * 14336 * 4096 + 2 * 4096
    assert shape.num_parameters == 2 * 32000 * 4096 + 32 * layer + 4096
    assert sum(parameter.numel for _, parameter in shape.parameters()) == shape.num_parameters


@pytest.mark.parametrize("name", ["mistral-7b", "gpt2", "t5-small", "deepseek-v2-lite"])
def test_hub_ids_lead_to_the_same_shape(name: str) -> None:
    for hub_id in hub_ids(name):
        assert find_model(hub_id) == find_model(name)
        assert find_model(hub_id.upper()) == find_model(name)


def test_an_instruct_variant_with_another_vocabulary_has_its_own_count() -> None:
    shape = find_model("mistralai/Mistral-7B-Instruct-v0.3")
    assert isinstance(shape, ModelShape)
    assert shape.vocab_size == 32768


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ConfigError, match="mistral-7b"):
        find_model("mistrl-7b")


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b"])
def test_a_name_that_can_be_no_path_is_unknown(name: str) -> None:
    with pytest.raises(ConfigError, match="not in the catalogue"):
        find_model(name)


@pytest.mark.parametrize("name", ["internlm2-7b", "chatglm3-6b", "qwen-7b", "pythia-70m", "llama-2-7b"])
def test_a_head_of_its_own_is_not_tied(name: str) -> None:
    shape = find_model(name)
    assert isinstance(shape, ModelShape)
    assert not shape.tie_word_embeddings


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_model(str(tmp_path))


def test_a_new_folder_has_to_be_probed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert find_model(str(tmp_path)) == tmp_path / "config.json"


NO_LAYERS = '{"model_type": "llama", "num_hidden_layers": 0}'
TEN_MEGABYTES = "[" + "1," * 5_000_000


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", "[" * 100_000, NO_LAYERS, TEN_MEGABYTES], ids=range(7))
def test_a_file_that_is_no_model_is_refused_before_torch_is_needed(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        find_model(str(tmp_path))
    assert caught.value.fix


def test_every_shape_of_the_catalogue_has_possible_sizes() -> None:
    for name in model_names():
        shape = find_model(name)
        assert isinstance(shape, ModelShape)
        check_config(shape.config, name=name)


def test_looking_up_imports_no_torch() -> None:
    code = "import sys, zplan.catalog as c; c.find_model('llama-3.1-405b'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("typed", "name"),
    [("h100", "h100-80gb"), ("4090", "rtx-4090-24gb"), ("A100-80GB", "a100-80gb"), ("NVIDIA L4", "l4-24gb")],
)
def test_gpus_answer_to_the_names_people_type(typed: str, name: str) -> None:
    assert load_gpu(typed).name == name


def test_every_gpu_has_speed_and_links() -> None:
    for name in gpu_names():
        gpu, links = load_gpu(name), load_links(name)
        assert gpu.dense_flops is not None
        assert 0 < gpu.free_bytes < gpu.total_bytes
        assert min(links.intra_node_bytes_per_second, links.host_link_bytes_per_second) > 1e9


def test_an_unknown_gpu_lists_the_nearest() -> None:
    with pytest.raises(ConfigError, match="h100-80gb"):
        load_gpu("h1000")
