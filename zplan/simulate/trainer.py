"""The training run itself, as transformers, TRL, PEFT, accelerate and DeepSpeed perform it, with the phases marked.

Every step is the libraries' own call. The same code runs on fake tensors and, as a check, on real CPU ranks.
"""

from __future__ import annotations

import contextlib
import gc
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import transformers
import trl.trainer.utils as trl_utils
from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.modeling_utils import set_quantized_state
from trl import SFTTrainer

from zplan.recipe import Recipe
from zplan.simulate import optimizer_process
from zplan.simulate.bitsandbytes import peft_with_4bit, quantize_model
from zplan.simulate.playing import Tapes
from zplan.simulate.report import SimulationError
from zplan.simulate.tracker import Tracker
from zplan.values import dataclass
from zplan.zero_config import Choice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True),
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr),
}
"""As Trainer.get_optimizer_cls_and_kwargs makes them; Muon is DeepSpeed's own (build_engine); the
others need kernels that fake tensors do not have."""


def replaced(recipe: Recipe, choice: Choice) -> tuple[str, ...]:
    """The pieces of the trainer that do not run as they are in this run, one line each."""
    zero = choice.zero
    quantizes = zero.zero_quantized_weights or zero.zero_quantized_gradients
    pieces = (
        (True, "weights are not read and not initialised (no_init_weights)"),
        (True, "the data loader: every batch holds sequences of max_length tokens, no padding, every label counted"),
        (
            recipe.optimizer == "muon",
            "torch.compile, with which DeepSpeed decorates Muon's update: it runs operation by operation, as it is"
            " written",
        ),
        (zero.super_offloads, optimizer_process.REPLACED),
        (quantizes, "DeepSpeed's quantizer: the tensors of its CUDA code, without its arithmetic"),
        (recipe.method == "qlora", "bitsandbytes' 4-bit weights: the tensors of its CUDA code, without its arithmetic"),
        (
            zero.stage < 3,
            "from a worker's second run of a model on: its forward and backward, played from the first run's record if"
            " two steps of that were alike; DeepSpeed, the loss and the optimizer run as they are",
        ),
        (
            True,
            "Trainer's loop: TRL's compute_loss, accelerate's backward and step in its order, no callbacks, no logging",
        ),
    )  # fmt: skip
    return tuple(line for is_there, line in pieces if is_there)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run to perform."""

    model_config: dict[str, Any]
    recipe: Recipe
    choice: Choice
    deepspeed_config: dict[str, Any]
    device: str
    """`simgpu` or `cpu`."""
    steps: int
    initialise: bool = False
    """Fill the weights; real tensors need finite ones, fake tensors have none."""


def train(run: Run, tracker: Tracker) -> Any:
    """Build, initialise and step; the tracker sees everything. Returns the engine, which holds all there is."""
    return train_model(run, load_model(run, tracker), tracker)


@contextlib.contextmanager
def configured(run: Run) -> Iterator[None]:
    """transformers keeps a weak reference to the configuration, and asks it whether to build under zero.Init."""
    hf_config = HfDeepSpeedConfig(run.deepspeed_config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del hf_config


def load_model(run: Run, tracker: Tracker) -> Any:
    """The model with its adapters; of the choice it takes what zero.Init reads, and nothing below stage 3."""
    recipe = run.recipe
    if recipe.method == "qlora" and (recipe.load_in_8bit or run.device == "cpu"):
        what = "LLM.int8()'s kernels have" if recipe.load_in_8bit else "bitsandbytes' CPU kernels have"
        raise SimulationError(f"{what} no simulated counterpart", operation="bitsandbytes")
    tracker.enter_phase("load")
    config = model_config(run.model_config)
    check_attention(config, recipe)
    with configured(run):
        with (
            collected(), contextlib.nullcontext() if run.initialise else no_init_weights(),
            _on_meta(recipe.method == "qlora"),
        ):  # fmt: skip
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[recipe.dtype], attn_implementation=recipe.attention
            )
            model.tie_weights()  # skipped under no_init_weights
        if recipe.method == "qlora":
            return _quantized_with_adapter(run, model)
        return get_peft_model(model, lora_config(recipe), **_adapter_dtype(run)) if recipe.method == "lora" else model


def train_model(run: Run, model: Any, tracker: Tracker, tapes: Tapes | None = None) -> Any:
    """All that follows, up to the last step; returns the engine."""
    with configured(run):
        prepare_model(run, model)
        tracker.enter_phase("init")
        engine = build_engine(run, model, tracker)
        if tapes is not None:
            tapes.begin(engine.module)
        trainer = trainer_stand_in(run, engine)
        for step in range(run.steps):
            tracker.step_index = step
            optimizer_step(run, engine, trainer, tracker)
            if step == 0:
                label_states(engine, tracker)
            if tapes is not None:
                tapes.end_step()
        return engine


def prepare_model(run: Run, model: Any) -> None:
    """As SFTTrainer does: checkpointing and the fused LM head."""
    lora = run.recipe.method != "full"
    if run.choice.gradient_checkpointing:
        reentrant = lora and run.choice.zero.stage == 3
        model.activation_checkpointing_enable({"use_reentrant": True} if reentrant else None)
        if lora:
            model.enable_input_require_grads()
    trl_utils.add_fused_lm_head(model.get_base_model() if lora else model, outputs=("log_probs", "entropy", "is_top1"))
    model.train()


@contextlib.contextmanager
def _on_meta(quantized: bool) -> Iterator[None]:
    """A model that is quantised while it is loaded has no bytes before, and is not built under zero.Init."""
    with contextlib.ExitStack() as stack:
        if quantized:
            stack.enter_context(set_quantized_state())
            stack.enter_context(torch.device("meta"))
        yield


def _quantized_with_adapter(run: Run, model: Any) -> Any:
    """QLoRA: as transformers loads the base model, PEFT adds the adapters and TRL casts them (SFTTrainer.__init__)."""
    quantize_model(model, dtype=DTYPES[run.recipe.dtype], device=run.device)
    with peft_with_4bit():
        model = get_peft_model(model, lora_config(run.recipe))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """No garbage collection while the model is built, one after it: when it happens does not depend on what ran before.

    A head that was tied away hangs in a cycle with its partition; a long run collects it soon. So do the parameters of
    zero.Init that AutoTP replaces.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def _adapter_dtype(run: Run) -> dict[str, bool]:
    return {"autocast_adapter_dtype": False} if run.choice.zero.stage == 3 else {}


def model_config(values: dict[str, Any]) -> Any:
    """config.json -> transformers' config; a family that is not in transformers would need its author's code."""
    model_type = values.get("model_type", "")
    if model_type not in transformers.CONFIG_MAPPING:
        raise SimulationError(
            f"model_type {model_type!r} is not in transformers {transformers.__version__}: its code comes with the"
            " model (trust_remote_code), and the simulation runs no downloaded code",
            module=str(values.get("auto_map", {}).get("AutoModelForCausalLM", model_type)),
        )
    config = AutoConfig.for_model(**values)
    config.use_cache = False
    return config


def check_attention(config: Any, recipe: Recipe) -> None:
    """The fused attention that not every family has in transformers; `from_pretrained` refuses it as well."""
    family = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if recipe.attention == "sdpa" and family is not None and not family._supports_sdpa:
        raise SimulationError(
            f"{family.__name__} has no sdpa attention in transformers {transformers.__version__}",
            module=family.__name__, cause="refused", fix="--attention eager",
        )  # fmt: skip


def lora_config(recipe: Recipe) -> LoraConfig:
    targets = recipe.lora_target
    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        modules_to_save=list(recipe.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )


def build_engine(run: Run, model: Any, tracker: Tracker) -> Any:
    """deepspeed.initialize as accelerate calls it (accelerator.py, _prepare_deepspeed)."""
    label_parameters(model, tracker)
    if run.recipe.optimizer == "muon":
        # which the configuration names: transformers hands the parameters over, in one group (DummyOptim)
        trainer_gives = {"model_parameters": [p for p in model.parameters() if p.requires_grad]}
    else:
        trainer_gives = {"optimizer": build_optimizer(run, model)}
    replaces = run.choice.batch.autotp_size > 1 and run.choice.zero.stage == 3
    if replaces:
        gc.unfreeze()  # the model, which the run does not search for garbage otherwise
    with collected() if replaces else contextlib.nullcontext():
        engine, *_ = deepspeed.initialize(
            model=model, config_params=run.deepspeed_config, mpu=share_sequences(run, model), **trainer_gives
        )
    label_parameters(model, tracker)
    label_states(engine, tracker)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(label_gradient, tracker=tracker))
    return engine


def share_sequences(run: Run, model: Any) -> Any:
    """Ulysses: its attention in place of the model's, and its groups of ranks (accelerator.py, _prepare_deepspeed).

    Accelerate leaves it to every batch how long it is (DeepSpeedSequenceParallelConfig), and to the model what its
    attention is.
    """
    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=run.recipe.attention,
        sequence_parallel_size=run.choice.batch.sequence_parallel_size,
        micro_batch_size=run.choice.batch.train_micro_batch_size_per_gpu,
        seq_length_is_variable=True,
        disable_in_eval=True,
    )


def build_optimizer(run: Run, model: Any) -> Any:
    """Trainer.create_optimizer: two groups, with and without weight decay; DeepSpeedCPUAdam if the config forces it."""
    if run.recipe.optimizer not in OPTIMIZERS:
        raise SimulationError(
            f"optimizer {run.recipe.optimizer} has no simulated counterpart", operation=run.recipe.optimizer
        )
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": 0.0},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS[run.recipe.optimizer](groups, run.recipe.learning_rate)
    forced = run.deepspeed_config.get("zero_force_ds_cpu_optimizer", True)
    if run.choice.zero.offloads_optimizer and forced:
        return map_pytorch_optim_to_deepspeed(optimizer)
    return optimizer


def trainer_stand_in(run: Run, engine: Any) -> Any:
    """An SFTTrainer that knows only what its compute_loss reads."""
    world, sp_size = run.choice.batch.world_size, run.choice.batch.sequence_parallel_size
    parallelism = SimpleNamespace(sp_backend="deepspeed", sp_enabled=True, sp_size=sp_size, tp_size=1)
    accelerator = SimpleNamespace(
        parallelism_config=parallelism if sp_size > 1 else None,
        num_processes=world,
        gather_for_metrics=lambda value: value.new_empty((world,)) if world > 1 else value,
    )
    trainer = SFTTrainer.__new__(SFTTrainer)
    vars(trainer).update(
        model=engine.module,
        aux_loss_enabled=False,
        accelerator=accelerator,
        compute_loss_func=None,
        label_smoother=None,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=True),
        get_tp_size=lambda: run.choice.batch.autotp_size,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    return trainer


def batch(run: Run) -> dict[str, torch.Tensor]:
    """One micro-batch of the longest sequences, or the rank's part of it (UlyssesSPDataLoaderAdapter.refill)."""
    sizes = run.choice.batch
    shape = (sizes.train_micro_batch_size_per_gpu, run.recipe.max_length // sizes.sequence_parallel_size)
    names = ["input_ids", "attention_mask", "labels"]
    if sizes.sequence_parallel_size > 1:
        names = ["input_ids", "attention_mask", "position_ids", "shift_labels"]
    return {name: torch.ones(shape, dtype=torch.int64, device=run.device) for name in names}


def optimizer_step(run: Run, engine: Any, trainer: Any, tracker: Tracker) -> None:
    """One optimizer step as Trainer._run_epoch and accelerate's DeepSpeedEngineWrapper do it."""
    tracker.enter_phase("forward")
    accumulation = run.choice.batch.gradient_accumulation_steps
    batches = [batch(run) for _ in range(accumulation)]
    num_items = torch.ones((), dtype=torch.int64, device=run.device)
    for number in range(accumulation):
        inputs = batches[number]
        last = number == accumulation - 1
        tracker.enter_phase("forward")
        loss = compute_loss(run, engine, trainer, dict(inputs), num_items)
        tracker.enter_phase("backward")
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        engine.backward(loss, scale_wrt_gas=False)
        if last:
            tracker.enter_phase("step")
            engine.step()
        del loss
    engine.zero_grad()


def compute_loss(run: Run, engine: Any, trainer: Any, inputs: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
    """TRL's own loss, or transformers' plain one over full logits."""
    if run.recipe.loss == "full" and run.choice.batch.sequence_parallel_size > 1:
        return Trainer.compute_loss(trainer, engine, {**inputs, "use_cache": False})  # type: ignore[no-any-return]
    if run.recipe.loss == "full":
        loss: torch.Tensor = engine(**inputs, use_cache=False).loss
        return loss
    if run.recipe.loss == "liger":
        raise SimulationError("liger's Triton kernels do not run on fake tensors", operation="liger_kernel")
    return trainer.compute_loss(engine, inputs, num_items_in_batch=num_items)  # type: ignore[no-any-return]


def label_parameters(model: Any, tracker: Tracker) -> None:
    for parameter in model.parameters():
        tracker.categorise(parameter, "parameters")
        tracker.categorise(getattr(parameter, "ds_tensor", None), "parameters")


def label_gradient(parameter: torch.Tensor, *, tracker: Tracker) -> None:
    """A gradient that autograd has made; one that DeepSpeed has moved into a bucket by then stays the bucket's."""
    if parameter.grad is not None:
        block = tracker.block_of(parameter.grad)
        if block is not None and not block.site.startswith("deepspeed/"):
            block.category = "gradients"


def label_states(engine: Any, tracker: Tracker) -> None:
    """Master weights and optimizer states, by where DeepSpeed's optimizers keep them."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups:
        for parameter in group["params"]:
            if parameter.dtype == torch.float32:
                tracker.categorise(parameter, "master")
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        for tensor in getattr(optimizer, name, None) or ():
            tracker.categorise(tensor, "master")
    for state in inner.state.values():
        for value in state.values():
            tracker.categorise(value, "optimizer")
