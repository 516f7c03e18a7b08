"""A plan as the files of another tool: the same DeepSpeed configuration, started or described the tool's own way.

Keys: accelerate 1.15.0 utils/dataclasses.py, axolotl 0.19.0 utils/schemas, llamafactory 0.9.5 hparams/, ms-swift 4.6.0
arguments/.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from zplan.errors import ConfigError
from zplan.export_data import AXOLOTL, LLAMA_FACTORY, columns_of
from zplan.files import to_data
from zplan.plan import Plan

DEEPSPEED_FILE = "ds_config.json"
PLAN_FILE = "plan.json"
_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "lion": "lion_32bit",
}
"""zplan's optimizer -> `optim` of transformers' TrainingArguments, which the trainers below pass on."""


def export_plan(plan: Plan, to: str) -> Mapping[str, str]:
    """File name -> content, for one of `TARGETS`.

    Raises:
        ConfigError: an unknown target, or a plan that the target cannot express.
    """
    if to not in _WRITERS:
        raise ConfigError(
            f"--to is {to!r}", because=f"it is one of {', '.join(_WRITERS)}", fix=f"--to {next(iter(_WRITERS))}"
        )
    batch = plan.choice.batch
    if to != "deepspeed" and max(batch.sequence_parallel_size, batch.autotp_size) > 1:
        raise ConfigError(
            f"the plan has sequence_parallel_size {batch.sequence_parallel_size} and autotp_size {batch.autotp_size}",
            because=f"a plan for {to} is data-parallel: every trainer switches the others on in its own way",
            fix="--to deepspeed, whose file holds DeepSpeed's own keys",
        )
    return _WRITERS[to](plan)


def _deepspeed(plan: Plan) -> dict[str, str]:
    return {DEEPSPEED_FILE: json.dumps(dict(plan.deepspeed), indent=2) + "\n"}


def _yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def _accelerate(plan: Plan) -> dict[str, str]:
    """`accelerate launch --config_file accelerate.yaml TRAINER`; batch and precision are in ds_config.json."""
    cluster = plan.cluster
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": DEEPSPEED_FILE,
            "zero3_init_flag": plan.choice.zero.stage == 3,
        },
        "machine_rank": 0,
        "main_training_function": "main",
        "num_machines": cluster.nodes,
        "num_processes": cluster.world_size,
        "use_cpu": cluster.gpu.kind == "cpu",
    }
    if cluster.nodes > 1:
        config["deepspeed_config"]["deepspeed_multinode_launcher"] = "standard"
        config |= {"main_process_ip": "FIRST_NODE", "main_process_port": 29500}
    return {**_deepspeed(plan), "accelerate.yaml": _yaml(config)}


def _plan_text(plan: Plan) -> str:
    return json.dumps(to_data(plan), indent=2, allow_nan=False) + "\n"


def _torchrun_arguments(plan: Plan, endpoint: str) -> str:
    cluster = plan.cluster
    if cluster.nodes == 1:
        return f"--standalone --nproc-per-node {cluster.gpus_per_node}"
    return (
        f"--nnodes {cluster.nodes} --nproc-per-node {cluster.gpus_per_node} "
        f'--rdzv-backend c10d --rdzv-id zplan --rdzv-endpoint "{endpoint}"'
    )


def _torchrun(plan: Plan) -> dict[str, str]:
    lines = ["#!/usr/bin/env bash", "# Start on every node; on more than one, set FIRST_NODE to the first one's name."]
    lines += ["set -eu", 'cd "$(dirname "$0")"']
    lines.append(f'torchrun {_torchrun_arguments(plan, "${FIRST_NODE:?}:29500")} -m sft.train --plan {PLAN_FILE} "$@"')
    return {PLAN_FILE: _plan_text(plan), "train.sh": "\n".join(lines) + "\n"}


def _slurm(plan: Plan) -> dict[str, str]:
    """One task per node: torchrun starts the ranks of its node."""
    cluster = plan.cluster
    lines = ["#!/usr/bin/env bash", "#SBATCH --job-name=zplan", f"#SBATCH --nodes={cluster.nodes}"]
    lines.append("#SBATCH --ntasks-per-node=1")
    if cluster.gpu.kind == "cuda":
        lines.append(f"#SBATCH --gpus-per-node={cluster.gpus_per_node}")
    lines += ["#SBATCH --exclusive", "#SBATCH --signal=TERM@300", "# Submit from this folder: sbatch train.sbatch"]
    lines += ["set -eu", 'FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)']
    lines.append(f'srun torchrun {_torchrun_arguments(plan, "$FIRST_NODE:29500")} -m sft.train --plan {PLAN_FILE} "$@"')
    return {PLAN_FILE: _plan_text(plan), "train.sbatch": "\n".join(lines) + "\n"}


def _optimizer(plan: Plan) -> str:
    name = plan.recipe.optimizer
    if name not in _OPTIMIZERS:
        raise ConfigError(f"optimizer {name} has no name in transformers' Trainer", fix="--to deepspeed")
    return _OPTIMIZERS[name]


def _lora_modules(plan: Plan) -> list[str] | None:
    """Names of the adapted modules; None is every linear module."""
    target = list(plan.recipe.lora_target)
    return None if target == ["all-linear"] else target


def _adapter_switches(plan: Plan) -> dict[str, Any]:
    """PEFT's own names, which TRL, LLaMA-Factory and ms-swift all keep; only what is switched on."""
    found = {name: getattr(plan.recipe, name) for name in ("use_rslora", "use_dora")}
    return {name: True for name, is_on in found.items() if is_on}


def _loading(plan: Plan) -> dict[str, bool]:
    """bitsandbytes as axolotl and TRL call it."""
    quantised, in_8bit = plan.recipe.method == "qlora", plan.recipe.load_in_8bit
    return {"load_in_4bit": quantised and not in_8bit, "load_in_8bit": in_8bit}


def _noise(plan: Plan) -> dict[str, Any]:
    alpha = plan.recipe.neftune_noise_alpha
    return {} if alpha is None else {"neftune_noise_alpha": alpha}


def _axolotl(plan: Plan) -> dict[str, str]:
    recipe, batch = plan.recipe, plan.choice.batch
    config: dict[str, Any] = {
        "base_model": plan.model_path,
        "datasets": [{"path": recipe.dataset or "DATASET", **AXOLOTL[columns_of(recipe.dataset)]}],
        "output_dir": "./out",
        "sequence_len": recipe.max_length,
        "sample_packing": recipe.packing,
        "micro_batch_size": batch.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "num_epochs": 1,
        "optimizer": _optimizer(plan),
        "learning_rate": recipe.learning_rate,
        "lr_scheduler": "cosine",
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.dtype == "bf16",
        "fp16": recipe.dtype == "fp16",
        "attn_implementation": recipe.attention,
        "gradient_checkpointing": plan.choice.gradient_checkpointing,
        "seed": recipe.seed,
        "deepspeed": DEEPSPEED_FILE,
        **_noise(plan),
    }
    if recipe.method != "full":
        config |= {
            "adapter": "lora" if recipe.load_in_8bit else recipe.method,
            "lora_r": recipe.lora_r,
            "lora_alpha": recipe.lora_alpha,
        }
        config |= {"lora_dropout": recipe.lora_dropout, **_loading(plan)}
        modules = _lora_modules(plan)
        config |= {"lora_target_linear": True} if modules is None else {"lora_target_modules": modules}
        config |= {f"peft_{name}": is_on for name, is_on in _adapter_switches(plan).items()}
        if recipe.modules_to_save:
            config["lora_modules_to_save"] = list(recipe.modules_to_save)
    return {**_deepspeed(plan), "axolotl.yaml": _yaml(config)}


def _trainer_arguments(plan: Plan) -> dict[str, Any]:
    """What LLaMA-Factory and ms-swift both pass on to transformers' TrainingArguments."""
    recipe, batch = plan.recipe, plan.choice.batch
    return {
        "output_dir": "out",
        "per_device_train_batch_size": batch.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "learning_rate": recipe.learning_rate,
        "num_train_epochs": 1,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": _optimizer(plan),
        "bf16": recipe.dtype == "bf16",
        "fp16": recipe.dtype == "fp16",
        "seed": recipe.seed,
        "deepspeed": DEEPSPEED_FILE,
        **_noise(plan),
    }


def _trl(plan: Plan) -> dict[str, str]:
    """`torchrun -m trl.scripts.sft --config trl.yaml`; TRL 1.16 knows no column called response."""
    recipe = plan.recipe
    columns = columns_of(recipe.dataset)
    if columns in ("prompt and response", "alpaca"):
        raise ConfigError(
            f"{recipe.dataset} holds {columns}",
            because="TRL takes messages, conversations, prompt and completion, or text, and renames no column",
            fix="rename the columns to prompt and completion, or --to torchrun, which trains with sft.train",
        )
    arguments: dict[str, Any] = {
        "model_name_or_path": plan.model_path,
        "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[recipe.dtype],
        "attn_implementation": recipe.attention,
        "datasets": [{"path": "json", "data_files": recipe.dataset or "DATASET"}],
        "max_length": recipe.max_length,
        "packing": recipe.packing,
        "activation_checkpointing": plan.choice.gradient_checkpointing,
        **_trainer_arguments(plan),
        "use_cpu": plan.cluster.gpu.kind == "cpu",
    }
    if recipe.method != "full":
        modules = _lora_modules(plan)
        arguments |= {"use_peft": True, "lora_r": recipe.lora_r, "lora_alpha": recipe.lora_alpha}
        arguments |= {"lora_dropout": recipe.lora_dropout, **_loading(plan)}
        arguments["lora_target_modules"] = modules or ["all-linear"]
        arguments |= _adapter_switches(plan)
        if recipe.modules_to_save:
            arguments["lora_modules_to_save"] = list(recipe.modules_to_save)
    return {**_deepspeed(plan), "trl.yaml": _yaml(arguments)}


def _llama_factory(plan: Plan) -> dict[str, str]:
    """`llamafactory-cli train llama_factory.yaml`; data sets are registered in its own dataset_info.json."""
    recipe = plan.recipe
    dataset = Path(recipe.dataset or "DATASET")
    config: dict[str, Any] = {
        "model_name_or_path": plan.model_path,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full" if recipe.method == "full" else "lora",
        "dataset_dir": ".",
        "dataset": "plan",
        "template": "default",
        "cutoff_len": recipe.max_length,
        "packing": recipe.packing,
        "flash_attn": {"sdpa": "sdpa", "flash_attention_2": "fa2", "eager": "disabled"}[recipe.attention],
        "disable_gradient_checkpointing": not plan.choice.gradient_checkpointing,
        **_trainer_arguments(plan),
    }
    if recipe.method != "full":
        modules = _lora_modules(plan)
        config |= {"lora_rank": recipe.lora_r, "lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout}
        config["lora_target"] = "all" if modules is None else ",".join(modules)
        config |= _adapter_switches(plan)
        if recipe.modules_to_save:
            config["additional_target"] = ",".join(recipe.modules_to_save)
    if recipe.method == "qlora":
        config["quantization_bit"] = 8 if recipe.load_in_8bit else 4
    info = {"plan": {"file_name": str(dataset), **LLAMA_FACTORY[columns_of(recipe.dataset)]}}
    return {
        **_deepspeed(plan),
        "llama_factory.yaml": _yaml(config),
        "dataset_info.json": json.dumps(info, indent=2) + "\n",
    }


def _ms_swift(plan: Plan) -> dict[str, str]:
    """A script around `swift sft`, which starts NPROC_PER_NODE ranks itself."""
    recipe, cluster = plan.recipe, plan.cluster
    arguments: dict[str, Any] = {
        "model": plan.model_path,
        "tuner_type": "full" if recipe.method == "full" else "lora",
        "dataset": recipe.dataset or "DATASET",
        "torch_dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[recipe.dtype],
        "attn_impl": recipe.attention,
        "max_length": recipe.max_length,
        "packing": recipe.packing,
        "gradient_checkpointing": plan.choice.gradient_checkpointing,
        **_trainer_arguments(plan),
    }
    if recipe.method != "full":
        modules = _lora_modules(plan)
        arguments |= {"lora_rank": recipe.lora_r, "lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout}
        arguments["target_modules"] = ["all-linear"] if modules is None else modules
        arguments |= _adapter_switches(plan)
        if recipe.modules_to_save:
            arguments["modules_to_save"] = list(recipe.modules_to_save)
    if recipe.method == "qlora":
        arguments |= {"quant_method": "bnb", "quant_bits": 8 if recipe.load_in_8bit else 4}
    lines = ["#!/usr/bin/env bash", "set -eu", 'cd "$(dirname "$0")"']
    environment = [f"NPROC_PER_NODE={cluster.gpus_per_node}"]
    if cluster.nodes > 1:
        environment += [f"NNODES={cluster.nodes}", 'NODE_RANK="${NODE_RANK:?}"', 'MASTER_ADDR="${FIRST_NODE:?}"']
    flags = [f"  --{name} {_words(value)}" for name, value in arguments.items()]
    lines.append(" \\\n".join([f"{' '.join(environment)} swift sft", *flags, '  "$@"']))
    return {**_deepspeed(plan), "ms_swift.sh": "\n".join(lines) + "\n"}


def _words(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join(shlex.quote(str(item).lower() if isinstance(item, bool) else str(item)) for item in values)


_WRITERS: dict[str, Callable[[Plan], dict[str, str]]] = {
    "deepspeed": _deepspeed,
    "accelerate": _accelerate,
    "torchrun": _torchrun,
    "slurm": _slurm,
    "trl": _trl,
    "axolotl": _axolotl,
    "llama-factory": _llama_factory,
    "ms-swift": _ms_swift,
}
TARGETS = tuple(_WRITERS)
KEYS_FROM: Mapping[str, str] = {
    "axolotl": "axolotl 0.19's schema",
    "llama-factory": "LLaMA-Factory 0.9.5's arguments",
    "ms-swift": "ms-swift 4.6's arguments",
}
"""Targets whose own parser does not read the files in our tests, and where their keys were looked up."""
