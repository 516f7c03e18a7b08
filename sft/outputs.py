"""What a training leaves behind: weights, tokenizer, model card, report; and what it says on the way."""

from __future__ import annotations

import gc
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sft import build
from sft.data import Data
from sft.ranks import Rank
from sft.render import Renderer
from sft.session import MERGED_FOLDER, REPORT_FILE, Session
from zplan import files
from zplan.errors import MachineError
from zplan.trial import TrialResult
from zplan.units import format_bytes

_VERSIONED = ("torch", "deepspeed", "transformers", "trl", "peft", "accelerate", "datasets", "zplan")
_SHOWN = 5


def print_data_report(loaded: Data) -> None:
    """Lengths, what was cut and what was left out, on stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    lengths = loaded.lengths
    known = f"{len(loaded.train)} examples" if loaded.stream is None else "a stream"
    console.print(
        f"  data: {known} to train on, {len(loaded.held_out)} held out; tokens per example "
        f"median {lengths.median_tokens}, p95 {lengths.p95_tokens}, max {lengths.max_tokens}"
    )
    if loaded.stream is not None:
        console.print(
            f"  figures are of its first {lengths.num_examples} examples; a longer one may come later, so that the "
            "first step does not show the most memory that the training needs"
        )
    if loaded.num_truncated:
        console.print(f"  {loaded.num_truncated} examples are longer than max_length and were cut at the end")
    for name, places in (("skipped", [str(row) for row in loaded.bad_rows]), ("no answer left", loaded.without_labels)):
        if places:
            console.print(f"  {name}: {len(places)} rows", markup=False)
            for place in places[:_SHOWN]:
                console.print(f"    {place}", markup=False)


def gather_weights(model: Any, place: Rank) -> dict[str, torch.Tensor] | None:
    """The trainable model's weights on rank 0's host, one parameter at a time; None elsewhere and where nobody shards.

    Works at ZeRO-3 whether or not the plan sets stage3_gather_16bit_weights_on_model_save.
    """
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not sharded:
        return None
    only_trained = isinstance(model, PeftModel)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if only_trained and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if place.is_first:
                state[name] = parameter.detach().cpu().clone()
    if place.is_first and not only_trained:
        state |= {name: buffer.cpu() for name, buffer in _persistent_buffers(model).items()}
    return state


def _persistent_buffers(model: Any) -> dict[str, torch.Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def save_model(trainer: Any, tokenizer: Any, state: dict[str, torch.Tensor] | None, output_dir: Path) -> None:
    """Full model or adapter as safetensors, and the tokenizer, loadable by transformers without DeepSpeed.

    Raises:
        MachineError: no space, no permission.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    try:
        model.save_pretrained(output_dir, state_dict=state) if state else model.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
    except OSError as error:
        raise MachineError(
            f"the model cannot be saved into {output_dir}: {error.strerror or error}",
            fix="free space; the same command again continues from the newest checkpoint",
        ) from error


def save_merged(session: Session, tokenizer: Any) -> Path:
    """The adapter merged into the base weights, loadable by transformers alone, on rank 0 after the adapter is saved.

    The base is loaded again in the training dtype: a qlora adapter is merged into weights that were never quantised.

    Raises:
        MachineError: no space, no permission.
    """
    unset_hf_deepspeed_config()
    gc.collect()
    merged_dir = Path(session.output_dir) / MERGED_FOLDER
    model = _saved_model(session, "after", build.DTYPES[session.plan.recipe.dtype]).merge_and_unload()
    try:
        model.save_pretrained(merged_dir)
        tokenizer.save_pretrained(merged_dir)
    except OSError as error:
        raise MachineError(
            f"the merged model cannot be saved into {merged_dir}: {error.strerror or error}",
            because="it is as large as the base model; the adapter itself is saved",
            fix="free space, and peft's merge_and_unload makes it from the adapter",
        ) from error
    return merged_dir


def measured_gpu(reports: list[dict[str, Any]]) -> dict[str, int | None]:
    """Worst rank; None on CPU ranks, whose memory is the host's."""

    def largest(key: str) -> int | None:
        return max((item[key] for item in reports if item[key] is not None), default=None)

    return {key: largest(key) for key in ("allocated_bytes", "reserved_bytes", "used_bytes")}


def training_report(
    session: Session,
    *,
    log_history: list[dict[str, Any]],
    tokens_per_second: float | None,
    step_seconds: float | None,
    gpu: dict[str, int | None],
    host_resident_bytes: int,
    host_pinned_bytes: int | None,
    outcome: str,
    data: Data,
) -> dict[str, Any]:
    """`training_report.json`: what was trained, how it went, and the measured figures beside the predicted ones."""
    plan = session.plan
    history = [{"step": entry["step"], "loss": entry["loss"]} for entry in log_history if "loss" in entry]
    return {
        "schema": "zplan.training_report/1",
        "outcome": outcome,
        "steps": history[-1]["step"] if history else 0,
        "loss_history": history,
        "held_out_loss": _held_out(log_history, data),
        "tokens_per_second": tokens_per_second,
        "step_seconds": step_seconds,
        "gpu": {
            "predicted": _predicted(plan.predicted, "gpu"),
            "trial": _predicted(plan.measured, "gpu"),
            "measured": gpu,
        },
        "host": {
            "predicted": _predicted(plan.predicted, "host"),
            "trial": _predicted(plan.measured, "host"),
            "measured": {"resident_bytes": host_resident_bytes, "pinned_bytes": host_pinned_bytes},
        },
        "data": _what_was_read(session, data),
        "model": plan.model_path,
        "recipe": files.to_data(plan.recipe),
        "resumed_from": session.resume,
        "versions": {name: version(name) for name in _VERSIONED} | {"python": platform.python_version()},
    }


def _held_out(log_history: list[dict[str, Any]], data: Data) -> dict[str, Any]:
    losses = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    return {
        "before": losses[0][1] if losses and losses[0][0] == 0 else None,
        "after": losses[-1][1] if losses and losses[-1][0] > 0 else None,
        "examples": len(data.held_out),
    }


def _what_was_read(session: Session, data: Data) -> dict[str, Any]:
    return {
        "source": session.plan.recipe.dataset,
        "streaming": session.streaming,
        "lengths": asdict(data.lengths),
        "truncated": data.num_truncated,
        "bad_rows": [str(row) for row in data.bad_rows],
        "without_labels": list(data.without_labels),
    }


def _predicted(result: TrialResult | None, kind: str) -> dict[str, int | None] | None:
    if result is None:
        return None
    if kind == "gpu":
        return {
            "allocated_bytes": result.gpu_allocated_bytes,
            "reserved_bytes": result.gpu_reserved_bytes,
            "used_bytes": result.gpu_used_bytes,
        }
    return {"resident_bytes": result.host_resident_bytes, "pinned_bytes": result.host_pinned_bytes}


def sample_before_and_after(session: Session, tokenizer: Any, question: str) -> list[dict[str, str]]:
    """One greedy answer of the model as it was and as it is now, both from their saved files, on rank 0 alone."""
    unset_hf_deepspeed_config()
    gc.collect()
    recipe = session.plan.recipe
    renderer = Renderer(tokenizer, response_template=session.response_template)
    device = "cuda" if session.plan.cluster.gpu.kind == "cuda" else "cpu"
    answers = []
    for which in ("before", "after"):
        model = _saved_model(session, which, build.DTYPES[recipe.dtype]).to(device).eval()
        prompt = tokenizer(
            renderer.prompt(question), return_tensors="pt", add_special_tokens=not renderer.uses_chat_template
        ).to(device)
        with torch.no_grad():
            output = model.generate(
                input_ids=prompt["input_ids"],
                attention_mask=prompt["attention_mask"],
                max_new_tokens=session.sample_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        del model
    return [{"prompt": question, "before": answers[0], "after": answers[1]}]


def _saved_model(session: Session, which: str, dtype: torch.dtype) -> Any:
    full = session.plan.recipe.method == "full"
    source = session.output_dir if which == "after" and full else session.plan.model_path
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, trust_remote_code=session.trust_remote_code
    )
    return PeftModel.from_pretrained(model, session.output_dir) if which == "after" and not full else model


def save_report(report: dict[str, Any], session: Session) -> None:
    """The report, and the model card that tells it to people. The report is written last: it says that all is there."""
    output_dir = Path(session.output_dir)
    if report["outcome"] == "finished":
        files.save_text(model_card(report, session), output_dir / "README.md")
    files.save_json(report, output_dir / REPORT_FILE)


def model_card(report: dict[str, Any], session: Session) -> str:
    """README.md of the model: base, method, configuration, figures, versions."""
    recipe, choice = session.plan.recipe, session.plan.choice
    held_out = report["held_out_loss"]
    losses = report["loss_history"]
    speed = report["tokens_per_second"]
    adapter = "" if recipe.method == "full" else f", r = {recipe.lora_r}, alpha = {recipe.lora_alpha}"
    adapter += "".join(f", {name}" for name in ("use_rslora", "use_dora", "load_in_8bit") if getattr(recipe, name))
    rows = [
        ("base model", recipe.model),
        ("data", recipe.dataset),
        ("method", f"{recipe.method}{adapter}, {recipe.dtype}"),
        ("ZeRO stage, ranks", f"{choice.zero.stage}, {choice.batch.world_size}"),
        ("batch", f"{choice.batch.train_batch_size} sequences of at most {recipe.max_length} tokens"),
        ("optimizer, learning rate, seed", f"{recipe.optimizer}, {recipe.learning_rate}, {recipe.seed}"),
        ("steps", report["steps"]),
        ("training loss", f"{losses[0]['loss']:.4f} to {losses[-1]['loss']:.4f}" if losses else "-"),
        ("held-out loss", f"{held_out['before']} to {held_out['after']}" if held_out["examples"] else "-"),
        ("tokens per second", f"{speed:.0f}" if speed else "-"),
        ("GPU memory allocated, worst rank", _against(report["gpu"], "allocated_bytes")),
        ("host memory, all ranks of a node", _against(report["host"], "resident_bytes")),
        ("versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    library = "transformers" if recipe.method == "full" else "peft"
    base = "" if Path(recipe.model).exists() else f"base_model: {recipe.model}\n"
    name = Path(session.output_dir).name
    return (
        f"---\nlibrary_name: {library}\n{base}tags: [sft, trl, deepspeed, zplan]\n---\n\n# {name}\n\n"
        "Fine-tuned with `python -m sft.train` from a zplan plan (`run.json` holds it).\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## DeepSpeed configuration\n\n```json\n{json.dumps(dict(session.plan.deepspeed), indent=2)}\n```\n"
    )


def _against(figures: dict[str, Any], key: str) -> str:
    measured, predicted = figures["measured"][key], (figures["predicted"] or {}).get(key)
    text = "not measured" if measured is None else format_bytes(measured)
    return text if predicted is None else f"{text} (predicted {format_bytes(predicted)})"


def print_summary(report: dict[str, Any], session: Session) -> None:
    """The end, in a few lines on stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    held_out = report["held_out_loss"]
    console.print(f"  {report['outcome']} after step {report['steps']}: {session.output_dir}", markup=False)
    if held_out["before"] is not None and held_out["after"] is not None:
        console.print(
            f"  held-out loss {held_out['before']:.4f} before, {held_out['after']:.4f} after "
            f"({held_out['examples']} examples)"
        )
    host = f"host memory {_against(report['host'], 'resident_bytes')}"
    gpu = f"GPU memory {_against(report['gpu'], 'allocated_bytes')}, "
    console.print(f"  peaks: {gpu if session.plan.cluster.gpu.kind == 'cuda' else ''}{host}")
    for sample in report.get("samples", []):
        for name in ("prompt", "before", "after"):
            console.print(f"  {name + ':':8} {sample[name]}", markup=False)
