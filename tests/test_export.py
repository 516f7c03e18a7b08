"""Every export target, read back by the tool's own parser where it is installed."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from zplan.errors import ConfigError
from zplan.export import DEEPSPEED_FILE, PLAN_FILE, TARGETS, export_plan
from zplan.files import load
from zplan.hardware import Cluster, Gpu, Host
from zplan.plan import Plan
from zplan.recipe import Recipe
from zplan.units import GIB
from zplan.zero_config import Choice, ZeroConfig, batch_sizes, deepspeed_config


def plan(*, nodes: int = 1, stage: Any = 2, **recipe_values: Any) -> Plan:
    gpu = Gpu(name="A100", total_bytes=80 * GIB, free_bytes=79 * GIB)
    host = Host(total_bytes=512 * GIB, available_bytes=500 * GIB)
    cluster = Cluster(gpu=gpu, host=host, gpus_per_node=4, nodes=nodes)
    recipe = Recipe(model="/models/it's here", dataset="/data/rows.jsonl", train_batch_size=32, **recipe_values)
    batch = batch_sizes(recipe, micro_batch=2, world_size=cluster.world_size)
    choice = Choice(zero=ZeroConfig(stage=stage), batch=batch)
    config = deepspeed_config(recipe, choice, cpu_adam=False)
    return Plan(model_path=recipe.model, recipe=recipe, choice=choice, deepspeed=config, cluster=cluster)


@pytest.mark.parametrize("split", [{"sequence_parallel_size": 2}, {"autotp_size": 2}])
def test_what_is_not_data_parallel_goes_to_deepspeed_only(split: dict[str, int]) -> None:
    made = plan()
    batch = batch_sizes(made.recipe, micro_batch=2, world_size=4, **split)
    divided = replace(made, choice=replace(made.choice, batch=batch))
    assert export_plan(divided, "deepspeed")
    for target in set(TARGETS) - {"deepspeed"}:
        with pytest.raises(ConfigError, match=f"{next(iter(split))} 2"):
            export_plan(divided, target)


def test_deepspeeds_own_parser_reads_the_exported_configuration() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    exported = json.loads(export_plan(plan(stage=3), "deepspeed")[DEEPSPEED_FILE])
    exported["train_batch_size"] //= 4  # the parser multiplies by the world size of this process, 1 instead of 4
    parsed = DeepSpeedConfig(exported)
    assert parsed.zero_config.stage == 3
    assert parsed.train_micro_batch_size_per_gpu == 2
    assert parsed.gradient_accumulation_steps == 32 // (2 * 4)


@pytest.mark.parametrize("nodes", [1, 2])
def test_accelerates_own_parser_reads_the_exported_configuration(nodes: int, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import DeepSpeedPlugin

    path = tmp_path / "accelerate.yaml"
    path.write_text(export_plan(plan(nodes=nodes), "accelerate")["accelerate.yaml"])
    parsed = ClusterConfig.from_yaml_file(str(path))
    assert str(parsed.distributed_type.value) == "DEEPSPEED"
    assert (parsed.num_machines, parsed.num_processes) == (nodes, 4 * nodes)
    assert parsed.deepspeed_config["deepspeed_config_file"] == DEEPSPEED_FILE
    (tmp_path / DEEPSPEED_FILE).write_text(export_plan(plan(nodes=nodes), "accelerate")[DEEPSPEED_FILE])
    assert DeepSpeedPlugin(hf_ds_config=str(tmp_path / DEEPSPEED_FILE)).zero_stage == 2


def test_torchrun_and_slurm_carry_the_whole_plan(tmp_path: Path) -> None:
    for target in ("torchrun", "slurm"):
        path = tmp_path / PLAN_FILE
        path.write_text(export_plan(plan(), target)[PLAN_FILE])
        assert load(Plan, path) == plan()


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(
    ("target", "script"), [("torchrun", "train.sh"), ("slurm", "train.sbatch"), ("ms-swift", "ms_swift.sh")]
)
def test_scripts_are_valid_bash(target: str, script: str, nodes: int) -> None:
    text = export_plan(plan(nodes=nodes), target)[script]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_slurm_asks_for_the_plans_machine() -> None:
    text = export_plan(plan(nodes=2), "slurm")["train.sbatch"]
    assert "#SBATCH --nodes=2" in text
    assert "#SBATCH --gpus-per-node=4" in text
    assert "--nnodes 2 --nproc-per-node 4" in text


@pytest.mark.parametrize(
    ("target", "file", "micro_batch"),
    [
        ("axolotl", "axolotl.yaml", "micro_batch_size"),
        ("llama-factory", "llama_factory.yaml", "per_device_train_batch_size"),
    ],
)
def test_other_trainers_get_the_plans_batch_and_its_deepspeed_file(target: str, file: str, micro_batch: str) -> None:
    files = export_plan(plan(), target)
    config = yaml.safe_load(files[file])
    assert config[micro_batch] * config["gradient_accumulation_steps"] * 4 == 32
    assert config["deepspeed"] == DEEPSPEED_FILE
    assert json.loads(files[DEEPSPEED_FILE]) == plan().deepspeed


def test_lora_targets_are_spelt_as_each_tool_spells_them() -> None:
    everything = plan(method="lora", lora_r=8)
    named = plan(method="qlora", lora_target=("q_proj", "v_proj"))
    assert yaml.safe_load(export_plan(everything, "axolotl")["axolotl.yaml"])["lora_target_linear"] is True
    assert yaml.safe_load(export_plan(named, "axolotl")["axolotl.yaml"])["lora_target_modules"] == ["q_proj", "v_proj"]
    factory = yaml.safe_load(export_plan(named, "llama-factory")["llama_factory.yaml"])
    assert (factory["lora_target"], factory["quantization_bit"]) == ("q_proj,v_proj", 4)
    assert "--target_modules all-linear" in export_plan(everything, "ms-swift")["ms_swift.sh"]


def test_eight_bit_loading_is_spelt_as_each_tool_spells_it() -> None:
    given = plan(method="qlora", load_in_8bit=True)
    axolotl = yaml.safe_load(export_plan(given, "axolotl")["axolotl.yaml"])  # which refuses adapter: qlora in 8 bit
    assert (axolotl["adapter"], axolotl["load_in_8bit"], axolotl["load_in_4bit"]) == ("lora", True, False)
    assert yaml.safe_load(export_plan(given, "llama-factory")["llama_factory.yaml"])["quantization_bit"] == 8
    assert "--quant_bits 8" in export_plan(given, "ms-swift")["ms_swift.sh"]


def test_switches_are_spelt_as_each_tool_spells_them() -> None:
    given = plan(
        method="lora", use_dora=True, use_rslora=True, neftune_noise_alpha=5.0, modules_to_save=("lm_head", "norm")
    )
    axolotl = yaml.safe_load(export_plan(given, "axolotl")["axolotl.yaml"])
    factory = yaml.safe_load(export_plan(given, "llama-factory")["llama_factory.yaml"])
    assert (axolotl["peft_use_dora"], axolotl["peft_use_rslora"]) == (True, True)
    assert (factory["use_dora"], factory["use_rslora"]) == (True, True)
    assert axolotl["neftune_noise_alpha"] == factory["neftune_noise_alpha"] == 5.0
    assert (axolotl["lora_modules_to_save"], factory["additional_target"]) == (["lm_head", "norm"], "lm_head,norm")
    swift = export_plan(given, "ms-swift")["ms_swift.sh"]
    for flag in ("--use_dora true", "--use_rslora true", "--neftune_noise_alpha 5.0", "--modules_to_save lm_head norm"):
        assert flag in swift
    assert "dora" not in "".join(export_plan(plan(method="lora"), "ms-swift").values())


KNOWN_KEYS = {
    "axolotl": """
        base_model datasets output_dir sequence_len sample_packing micro_batch_size gradient_accumulation_steps
        num_epochs optimizer learning_rate lr_scheduler max_grad_norm bf16 fp16 attn_implementation
        gradient_checkpointing seed deepspeed neftune_noise_alpha adapter lora_r lora_alpha lora_dropout load_in_4bit
        load_in_8bit lora_target_linear lora_target_modules lora_modules_to_save peft_use_rslora peft_use_dora
    """,
    "llama-factory": """
        model_name_or_path stage do_train finetuning_type dataset_dir dataset template cutoff_len packing flash_attn
        disable_gradient_checkpointing output_dir per_device_train_batch_size gradient_accumulation_steps
        learning_rate num_train_epochs max_grad_norm optim bf16 fp16 seed deepspeed neftune_noise_alpha lora_rank
        lora_alpha lora_dropout lora_target use_rslora use_dora additional_target quantization_bit
    """,
}
"""Looked up one by one, because the tools are not installed here.

axolotl: src/axolotl/utils/schemas/{config,peft,training,model,datasets}.py. LLaMA-Factory:
src/llamafactory/hparams/{model,data,finetuning}_args.py, and transformers' TrainingArguments.
"""


@pytest.mark.parametrize(("target", "file"), [("axolotl", "axolotl.yaml"), ("llama-factory", "llama_factory.yaml")])
def test_every_key_is_one_that_the_tools_schema_has(target: str, file: str) -> None:
    switches = {"use_dora": True, "use_rslora": True, "neftune_noise_alpha": 5.0, "modules_to_save": ("lm_head",)}
    for given in (plan(), plan(method="qlora", **switches), plan(method="lora", lora_target=("q_proj",), **switches)):
        keys = yaml.safe_load(export_plan(given, target)[file]).keys()
        assert keys <= set(KNOWN_KEYS[target].split())


ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "prompt and response": {"prompt": "q", "response": "a"},
    "prompt and completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "a"},
}


def plan_with(rows: dict[str, Any], tmp_path: Path, **recipe_values: Any) -> Plan:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n" + json.dumps(rows) + "\n")
    given = plan(**recipe_values)
    return replace(given, recipe=replace(given.recipe, dataset=str(source)))


@pytest.mark.parametrize("columns", ROWS)
def test_the_columns_named_to_other_trainers_are_those_of_the_data(columns: str, tmp_path: Path) -> None:
    given = plan_with(ROWS[columns], tmp_path)
    entry = yaml.safe_load(export_plan(given, "axolotl")["axolotl.yaml"])["datasets"][0]
    info = json.loads(export_plan(given, "llama-factory")["dataset_info.json"])["plan"]
    assert set(info["columns"].values()) == set(ROWS[columns])
    if "prompt" in ROWS[columns]:
        assert {entry["type"]["field_instruction"], entry["type"]["field_output"]} == set(ROWS[columns])
    else:
        expected = {"messages": "chat_template", "conversations": "chat_template", "alpaca": "alpaca"}
        assert entry["type"] == expected.get(columns, "completion")


def test_columns_that_cannot_be_seen_are_left_to_fill_in_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    entry = yaml.safe_load(export_plan(plan(), "axolotl")["axolotl.yaml"])["datasets"][0]
    assert entry["type"]["field_instruction"] == "PROMPT_COLUMN"
    with pytest.raises(ConfigError, match="are answer, question"):
        export_plan(plan_with({"question": "q", "answer": "a"}, tmp_path), "llama-factory")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_trls_own_parser_reads_the_exported_configuration(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.scripts.sft import make_parser

    switches = {"use_dora": True, "use_rslora": True} if method == "lora" else {}
    given = plan_with(
        ROWS["messages"], tmp_path, method=method, dtype="fp32", lora_r=8, neftune_noise_alpha=5.0, **switches
    )
    cpu = replace(given, cluster=replace(given.cluster, gpu=replace(given.cluster.gpu, kind="cpu")))
    monkeypatch.chdir(tmp_path)
    for name, text in export_plan(cpu, "trl").items():
        (tmp_path / name).write_text(text)
    config = yaml.safe_load((tmp_path / "trl.yaml").read_text())
    del config["deepspeed"]  # SFTConfig reads that file at once and asks it for a world of ranks
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(config))
    _, training, model, mixture = make_parser().parse_args_and_config(["--config", "trl.yaml"])
    assert training.per_device_train_batch_size == 2
    assert training.max_length == given.recipe.max_length
    assert (model.use_peft, model.lora_r if method == "lora" else None) == (
        method == "lora",
        8 if method == "lora" else None,
    )
    assert (model.use_dora, model.use_rslora, training.neftune_noise_alpha) == (bool(switches), bool(switches), 5.0)
    assert mixture.datasets[0].data_files == given.recipe.dataset


def test_columns_that_trl_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds prompt and response"):
        export_plan(plan_with(ROWS["prompt and response"], tmp_path), "trl")


def test_every_optimizer_name_is_one_of_transformers() -> None:
    from transformers.training_args import OptimizerNames

    known = {item.value for item in OptimizerNames}
    for name in ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd", "lion"):
        config = yaml.safe_load(export_plan(plan(optimizer=name), "llama-factory")["llama_factory.yaml"])
        assert config["optim"] in known


def test_an_optimizer_that_a_tool_cannot_express_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer muon"):
        export_plan(plan(optimizer="muon"), "axolotl")


def test_numbers_in_yaml_are_read_back_as_numbers() -> None:
    small = replace(plan(), recipe=replace(plan().recipe, learning_rate=1e-5))
    assert yaml.safe_load(export_plan(small, "axolotl")["axolotl.yaml"])["learning_rate"] == 1e-5


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        export_plan(plan(), "keras")
    assert all(target in str(caught.value) for target in TARGETS)
