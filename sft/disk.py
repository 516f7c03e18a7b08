"""What a training writes, and whether the disk has room for it: checkpoints, the final model, the merged one."""

from __future__ import annotations

import json
import re
import shutil
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from sft.checkpoint import list_checkpoints, written_bytes
from zplan.errors import ConfigError, DoesNotFitError
from zplan.plan import Plan
from zplan.recipe import Recipe
from zplan.units import format_bytes

OPTIMIZER_BYTES = 12
"""fp32 master weight, exp_avg and exp_avg_sq of a trainable parameter in mixed-precision Adam (an upper bound)."""
_BOOKKEEPING_BYTES = 1 << 20
"""Trainer state, random states, zero_to_fp32.py and the headers of the archives, of one checkpoint."""
KEPT_CHECKPOINTS = 2
"""TrainingArguments.save_total_limit of a training."""


_OLD_BUFFER = re.compile(r"rotary_emb\.inv_freq$|(^|\.)(attn|attention)\.(masked_)?bias$")
"""Buffers that older files hold beside the weights, and that transformers leaves out (transformers 5.23,
modeling_utils.py:4920; _keys_to_ignore_on_load_unexpected of gpt2 and gpt_neox)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writes:
    """Upper bounds of what one training writes."""

    checkpoint_bytes: int
    model_bytes: int
    """Full weights or the adapter, written at the end."""
    merged_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Two checkpoints beside either the third that is being written or what is written at the end."""
        return KEPT_CHECKPOINTS * self.checkpoint_bytes + max(
            self.checkpoint_bytes, self.model_bytes + self.merged_bytes
        )


def expected_writes(plan: Plan, *, merge: bool) -> Writes | None:
    """What a training of the plan writes; None if the model folder has no safetensors whose sizes could be read.

        checkpoint   trainable elements * (2 * weight bytes + 12): model.safetensors, the engine's copy, the optimizer
        model        trainable elements * weight bytes
        merged       all elements * weight bytes
        each         tokenizer and configuration: the model folder's files that are no weights, and 1 MiB

    Frozen weights are in no checkpoint: transformers saves adapters with exclude_frozen_parameters.

    Source: transformers 5.23, trainer.py (_save_optimizer_and_scheduler, save_model); deepspeed 0.19.8,
    runtime/engine.py (_save_checkpoint, _save_zero_checkpoint).
    """
    shapes = weight_shapes(Path(plan.model_path))
    if not shapes:
        return None
    recipe = plan.recipe
    beside = _BOOKKEEPING_BYTES + _small_files_bytes(Path(plan.model_path))
    num_elements = sum(prod(shape) for shape in shapes.values())
    trained = num_elements if recipe.method == "full" else adapter_numel(shapes, recipe)
    return Writes(
        checkpoint_bytes=trained * (2 * recipe.weight_bytes + OPTIMIZER_BYTES) + beside,
        model_bytes=trained * recipe.weight_bytes + beside,
        merged_bytes=num_elements * recipe.weight_bytes + beside if merge else 0,
    )


def _small_files_bytes(model_dir: Path) -> int:
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
    return sum(item.stat().st_size for item in model_dir.iterdir() if item.is_file() and item.suffix not in weights)


def weight_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that transformers would load, from the headers of the folder's safetensors.

    Raises:
        ConfigError: a file that is no safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(model_dir):
        try:
            with path.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
        except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
            raise ConfigError(f"{path} is not a readable safetensors file: {error}", fix="download it again") from error
        shapes |= {
            name: tuple(item["shape"])
            for name, item in header.items()
            if name != "__metadata__" and not _OLD_BUFFER.search(name)
        }
    return shapes


def _weight_files(model_dir: Path) -> list[Path]:
    """model.safetensors, else what its index names, else all: some folders hold the same weights in another layout.

    Source: transformers 5.23, modeling_utils.py:592 (_get_resolved_checkpoint_files).
    """
    single, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(model_dir.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index} is not a readable index of safetensors", fix="download it again") from error
    return [model_dir / name for name in sorted(names)]


def modules_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of each module's weight by the module's path; experts stacked in one parameter are named by it."""
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items() if not name.endswith(".bias")}


def is_named(module: str, names: tuple[str, ...]) -> bool:
    """As PEFT matches a list: the whole path, or its end after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def adapter_numel(shapes: dict[str, tuple[int, ...]], recipe: Recipe) -> int:
    """At most so many elements train: r x (in + out) beside every matrix that may be adapted, DoRA's magnitude, and
    the modules trained whole (one that has no weight of its own is a tied one: as large as the largest)."""
    modules = modules_of(shapes)
    tied = sum(not any(is_named(module, (name,)) for module in modules) for name in recipe.modules_to_save)
    total = tied * max(prod(shape) for shape in shapes.values())
    for module, shape in modules.items():
        if is_named(module, recipe.modules_to_save):
            total += prod(shape)
        elif len(shape) >= 2 and (recipe.lora_target == ("all-linear",) or is_named(module, recipe.lora_target)):
            rank = recipe.lora_r * prod(shape[:-2])  # experts stacked in one weight have an adapter each
            total += rank * sum(shape[-2:]) + (shape[-2] if recipe.use_dora else 0)
    return total


def check_adapter(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> None:
    """Every module that the recipe names is one of the model's; PEFT says nothing of one that it does not find.

    Raises:
        ConfigError: with the names that there are.
    """
    if recipe.method == "full" or not shapes:
        return
    modules = [module for module, shape in modules_of(shapes).items() if len(shape) >= 2]
    targets = () if recipe.lora_target == ("all-linear",) else recipe.lora_target
    saved = tuple(name for name in recipe.modules_to_save if name != "lm_head")  # a tied one has no weight of its own
    missing = [
        name for name in (*targets, *saved) if not any(is_named(module, (name,)) for module in modules_of(shapes))
    ]
    if missing:
        raise ConfigError(
            f"the model has no module {', '.join(missing)}",
            because="adapters and --modules-to-save are for modules of the model: "
            + ", ".join(sorted({module.rpartition(".")[2] for module in modules})),
            fix="a plan with --lora-target all-linear",
        )


def check_disk(plan: Plan, output_dir: Path, *, merge: bool = False) -> None:
    """Room for all that will be written, less what the checkpoints that are there already occupy.

    Raises:
        DoesNotFitError: with the bytes that lack.
    """
    writes = expected_writes(plan, merge=merge)
    if writes is None:
        return
    free = shutil.disk_usage(output_dir).free
    there = sum(written_bytes(item) for item in list_checkpoints(output_dir)[:KEPT_CHECKPOINTS])
    short = writes.peak_bytes - there - free
    if short <= 0:
        return
    parts = [f"{KEPT_CHECKPOINTS + 1} checkpoints of at most {format_bytes(writes.checkpoint_bytes)} (two are kept)"]
    if writes.merged_bytes:
        parts.append(f"the merged model, {format_bytes(writes.merged_bytes)}")
    without = ", no --merge" if merge and short <= writes.merged_bytes else ""
    raise DoesNotFitError(
        f"{output_dir} has {format_bytes(free)} free, {format_bytes(short)} too little for what the training writes",
        because=" and ".join(parts),
        fix=f"--output-dir on a disk with {format_bytes(writes.peak_bytes)}{without}, or --force",
    )
