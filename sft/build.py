"""Recipe, choice and the plan's DeepSpeed configuration -> SFTConfig, model, adapter, trainer.

The one place where zplan's names become those of transformers, TRL and PEFT. A trial and the final training both come
through here, so what is measured is what trains.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from sft.checkpoint import MARK
from sft.disk import KEPT_CHECKPOINTS
from sft.meter import Meter
from sft.order import LongestFirst
from sft.random_weights import cheap_random_weights
from sft.ranks import Rank, num_threads
from sft.release import quicken_release
from zplan.errors import ConfigError, MachineError
from zplan.hardware import DeviceKind
from zplan.recipe import Recipe
from zplan.zero_config import Choice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPTIM = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "lion": "lion_32bit",
}
"""Recipe.optimizer -> TrainingArguments.optim; adamw_torch_fused is transformers' default (no foreach temporaries).
Muon is not among them: the DeepSpeed configuration names it, and transformers then makes none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What differs between a trial and a training of the same plan."""

    output_dir: Path
    max_steps: int = -1
    num_train_epochs: float = 1.0
    learning_rate: float
    seed: int
    save_steps: int | None = None
    """None: no checkpoints."""
    keep_order: bool = False
    """Take the rows in the order given (a trial puts the longest first)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further TrainingArguments, under transformers' names."""


def quiet_libraries() -> None:
    """Leave the screen to our own lines: no progress bars of loading and saving, no notes on what we do on purpose."""
    disable_progress_bar()
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|transformers).*")


def init_process_group(kind: DeviceKind, place: Rank, *, timeout_seconds: float) -> None:
    """Join the other ranks, before SFTConfig and from_pretrained see DeepSpeed.

    With `use_cpu`, transformers never tells DeepSpeed about the world, and zero.Init would believe that it is alone;
    `ddp_timeout` is ignored as well. On the CPU accelerator DeepSpeed would also compile a shared-memory op that ZeRO
    never calls: an empty list of compatible ops prevents it. Without LOCAL_SIZE, which DeepSpeed's own launcher sets,
    it starts a process for every bucket of ZeRO-3, to count the NUMA nodes.

    Source: transformers 5.23, training_args.py (_setup_devices); deepspeed 0.19.8, comm/torch.py (TorchBackend),
    launcher/launch.py:182, accelerator/cpu_accelerator.py:71 (device_count).
    """
    if kind == "cpu":
        os.environ["LOCAL_SIZE"] = str(place.local_world_size)
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
        torch.set_num_threads(num_threads(place))
    elif not torch.cuda.is_available():
        raise MachineError(
            "no CUDA device is visible to this process",
            because="the plan was made for NVIDIA GPUs",
            fix="nvidia-smi; zplan inspect",
        )
    quicken_release()
    deepspeed.init_distributed(
        dist_backend="gloo" if kind == "cpu" else "nccl",
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=timeout_seconds),
        verbose=False,
    )


def check_world(choice: Choice, world_size: int) -> None:
    """Refuse to start with another number of ranks than the batch was cut for."""
    if choice.batch.world_size != world_size:
        raise ConfigError(
            f"{world_size} ranks were started, but the batch sizes are for {choice.batch.world_size}",
            because="train_batch_size = micro-batch x accumulation x world_size",
            fix=f"start {choice.batch.world_size} ranks, or make a plan for {world_size}",
        )


def wants_cpu_adam(kind: DeviceKind) -> bool:
    """DeepSpeedCPUAdam under offload: on GPU machines; on CPU ranks torch's AdamW does the same without a compiler."""
    return kind == "cuda"


def sft_config(
    recipe: Recipe, choice: Choice, deepspeed_config: Mapping[str, Any], run: Run, kind: DeviceKind
) -> SFTConfig:
    """TRL's arguments. The DeepSpeed configuration goes in as it is."""
    if kind == "cpu" and recipe.dtype == "fp16":
        raise ConfigError("dtype is fp16 on CPU ranks", because="DeepSpeed refuses it there", fix="--dtype fp32")
    return SFTConfig(
        output_dir=str(run.output_dir),
        max_steps=run.max_steps,
        num_train_epochs=run.num_train_epochs,
        per_device_train_batch_size=choice.batch.train_micro_batch_size_per_gpu,
        per_device_eval_batch_size=choice.batch.train_micro_batch_size_per_gpu,
        gradient_accumulation_steps=choice.batch.gradient_accumulation_steps,
        learning_rate=run.learning_rate,
        max_grad_norm=recipe.max_grad_norm,
        neftune_noise_alpha=recipe.neftune_noise_alpha,
        optim=OPTIM.get(recipe.optimizer, OPTIM["adamw"]),
        bf16=recipe.dtype == "bf16",
        fp16=recipe.dtype == "fp16",
        activation_checkpointing=choice.gradient_checkpointing,
        activation_checkpointing_kwargs=_checkpointing_kwargs(recipe, choice),
        max_length=recipe.max_length,
        packing=recipe.packing,
        dataset_kwargs=None if recipe.packing else {"skip_prepare_dataset": True},
        use_liger_kernel=recipe.loss == "liger",
        deepspeed=dict(deepspeed_config),
        use_cpu=kind == "cpu",
        ddp_backend="gloo" if kind == "cpu" else "nccl",
        dataloader_pin_memory=kind != "cpu",
        train_sampling_strategy="sequential" if run.keep_order else "random",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        seed=run.seed,
        **_saving(run),
        **{"report_to": "none", **run.extra},
    )


def _saving(run: Run) -> dict[str, Any]:
    if run.save_steps is None:
        return {"save_strategy": "no"}
    return {"save_strategy": "steps", "save_steps": run.save_steps, "save_total_limit": KEPT_CHECKPOINTS}


def _checkpointing_kwargs(recipe: Recipe, choice: Choice) -> dict[str, bool] | None:
    """Non-reentrant, as PyTorch recommends; PEFT under ZeRO-3 needs the reentrant kind (trl 1.16, SFTTrainer)."""
    if not choice.gradient_checkpointing:
        return None
    return {"use_reentrant": recipe.method != "full" and choice.zero.stage == 3}


def load_tokenizer(model_path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model folder; pad falls back to eos, as TRL does it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded from {model_path}: {str(error).splitlines()[0]}",
            fix="put tokenizer.json and tokenizer_config.json into the model folder",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"the tokenizer of {model_path} has neither a pad nor an eos token",
            because="batches need padding, and the model must learn where to stop",
            fix="add eos_token to tokenizer_config.json",
        )
    return tokenizer


def load_model(
    model_path: str, recipe: Recipe, *, weights: Literal["random", "real"], trust_remote_code: bool = False
) -> Any:
    """The causal LM in the training dtype; call it after `sft_config`, which is what makes zero.Init partition it.

    Source: transformers 5.23, integrations/deepspeed.py (is_deepspeed_zero3_enabled looks for a live config).
    """
    common: dict[str, Any] = {"dtype": DTYPES[recipe.dtype], "attn_implementation": recipe.attention}
    try:
        if weights == "random":
            config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
            with cheap_random_weights(config):
                return AutoModelForCausalLM.from_config(config, **common)
        return AutoModelForCausalLM.from_pretrained(
            model_path,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            quantization_config=_quantization(recipe),
            **common,
        )
    except (OSError, ValueError) as error:
        own_code = "trust_remote_code" in str(error)
        raise ConfigError(
            f"no model can be loaded from {model_path}: {str(error).splitlines()[0]}",
            because="its folder holds Python code of its own, which is not run unasked"
            if own_code
            else "a folder with config.json and *.safetensors is needed; pickled weights are not loaded",
            fix="read that code, then --trust-remote-code" if own_code else "check the plan's model_path",
        ) from error


def _quantization(recipe: Recipe) -> BitsAndBytesConfig | None:
    """LLM.int8(), or NF4 with double quantisation, computing in the training dtype (the QLoRA paper's settings)."""
    if recipe.method != "qlora":
        return None
    if recipe.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[recipe.dtype],
        bnb_4bit_quant_storage=DTYPES[recipe.dtype],
    )


def peft_config(recipe: Recipe) -> LoraConfig | None:
    """PEFT's description of the adapter; None for full fine-tuning."""
    if recipe.method == "full":
        return None
    every_linear = recipe.lora_target == ("all-linear",)
    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        target_modules="all-linear" if every_linear else list(recipe.lora_target),
        modules_to_save=list(recipe.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )


def settle(engine: Any) -> None:
    """Wait for ZeRO-3's gathers that nobody will use and give all gathered parameters back.

    A forward without a backward (evaluation) leaves prefetched parameters in flight, and DeepSpeed refuses to partition
    those again: "Cannot partition a param in flight".

    Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py:537 (release_and_reset_all).
    """
    if hasattr(engine, "empty_partition_cache"):
        engine.empty_partition_cache()


class PlanTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that counts real tokens, tells a meter which phase it is in, and can keep the full logits."""

    def __init__(
        self,
        *args: Any,
        meter: Meter | None = None,
        full_logits: bool = False,
        first: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        self.meter = meter
        self.full_logits = full_logits
        self.first = first
        """Rows of the first step; the others are shuffled."""
        self.seen_tokens: torch.Tensor | int = 0
        """Non-padding tokens that this rank trained on; stays on the device, so that counting never waits for it."""
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return LongestFirst(dataset, self.first) if self.first else super()._get_train_sampler(train_dataset)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        self.seen_tokens = self.seen_tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        measured = self.meter is not None and model.training
        if self.meter is not None and measured:
            self.meter.enter("forward")
        if self.full_logits:
            loss = Trainer.compute_loss(self, model, inputs, *args, **kwargs)
        else:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.meter is not None and measured:
            self.meter.enter("backward")
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """One that is written anew, after going back to an older one, is not whole until it is whole again.

        The folder is there before any rank goes on: each looks whether it exists to learn which checkpoint is the best
        one (transformers 5.23, trainer.py, _save_checkpoint), and where nothing is gathered nobody has made it yet.
        """
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MARK).unlink(missing_ok=True)
        dist.barrier()
        super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights beside a checkpoint, written by rank 0 from where they are.

        transformers clones the whole model (the frozen base of an adapter too) into host memory on every rank first,
        and at stage 3 without stage3_gather_16bit_weights_on_model_save it writes the engine's checkpoint twice.

        Source: transformers 5.23, trainer.py (save_model); accelerate 1.15, accelerator.py (get_state_dict);
        deepspeed 0.19.8, checkpoint/utils.py (clone_tensors_for_torch_save).
        """
        engine = self.deepspeed
        if engine.zero_optimization_partition_weights():
            if engine.zero_gather_16bit_weights_on_model_save():
                super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save(output_dir)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        settle(self.model_wrapped)
        return metrics


def build_trainer(
    recipe: Recipe,
    args: SFTConfig,
    model: Any,
    tokenizer: Any,
    train_dataset: Dataset | IterableDataset,
    *,
    eval_dataset: Dataset | None = None,
    callbacks: list[Any] | None = None,
    meter: Meter | None = None,
    first: Sequence[int] = (),
) -> PlanTrainer:
    """The trainer, ready to train. `set_seed` first: adapters start from random numbers that all ranks must share."""
    set_seed(args.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`use_liger_kernel=True` is deprecated")
        trainer = PlanTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config(recipe),
            callbacks=callbacks,
            meter=meter,
            full_logits=recipe.loss == "full",
            first=first,
        )
    trainer.remove_callback(PrinterCallback)
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise MachineError(
            f"accelerate would train with {trainer.accelerator.distributed_type}, without DeepSpeed",
            because="a variable of this environment decides it, and the plan's configuration would be ignored",
            fix="unset the variables that `env | grep ACCELERATE` shows",
        )
    return trainer
