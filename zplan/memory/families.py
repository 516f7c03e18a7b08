"""What the libraries lack or refuse for a family, and which families' layers the formulas know. No arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from zplan.memory.experts import LEAF, LEAF_FAMILIES
from zplan.memory.trainable import experts_refused, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Attention, Recipe
from zplan.zero_config import Choice

CHECKED_FAMILIES = frozenset(
    {
        "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "exaone4", "falcon", "gemma",
        "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_neox", "gpt_oss", "granite",
        "granitemoe", "granitemoehybrid", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "internlm3", "llama",
        "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo2", "olmo3",
        "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm",
        "starcoder2",
    }
)  # fmt: skip
"""Families that stay within 4 % of the simulated peak, and 5 % in each phase, in `python -m benchmarks.families`: full
fine-tuning at stage 2 and adapters at stage 3, both without recomputation. What `--every` asks besides (recomputation,
and each method at the other stage) is not promised: it was never shown for all of them in one run."""
WITHOUT_FUSED = frozenset({"bloom", "codegen", "gpt_neox_japanese", "mpt", "xglm", "mamba", "mamba2", "falcon_mamba"})
"""Families that have the eager attention only.

Source: transformers 5.23.0, models/*/modeling_*.py (_supports_sdpa, _supports_flash_attn)."""
WITHOUT_SDPA = WITHOUT_FUSED | frozenset({"gemma2", "gpt_neo", "gpt_oss", "gptj", "vaultgemma", "mimo_v2_flash"})
"""Families without sdpa; these have flash attention."""
ATTENTIONS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers, of config.json's `layer_types`, that attend to tokens before."""
_ROUTER_RETURNS_TUPLE = frozenset({"llama4_text", "phimoe"})
_ROUTES_BY_VALUE = frozenset({"jetmoe", "dbrx"})
"""Families that the simulation cannot run: which expert gets how many rows is read on the host."""
_MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


def default_attention(model_type: str) -> Attention:
    """What transformers takes by itself: sdpa where the family has it."""
    return "eager" if model_type in WITHOUT_SDPA else "sdpa"


def refused(shape: ModelShape, recipe: Recipe) -> Iterator[str]:
    """What cannot run with the installed libraries, one line each: `what: why`."""
    family = shape.model_type
    if shape.beside_numel is None:
        yield (
            f"the wrapper around {family}: AutoModelForCausalLM, by which the trainer loads it, knows no such wrapper;"
            " save its text tower as a model of its own, and plan that folder"
        )
    elif shape.beside_numel:
        yield (
            f"{shape.beside_numel} parameters beside the text tower of {family}: the trainer loads the whole wrapper,"
            " and its states are missing here; save the text tower as a model of its own, and plan that folder"
        )
    if recipe.attention != "eager" and family in (WITHOUT_SDPA if recipe.attention == "sdpa" else WITHOUT_FUSED):
        yield f"{recipe.attention} attention of {family}: transformers 5.23.0 refuses it; try --attention eager"
    if family == "llama4_text" and recipe.loss in ("nll", "chunked_nll"):
        yield (
            "TRL's tiled loss on llama4_text: its fused head takes the whole model for the decoder (trl 1.16.0,"
            " add_fused_lm_head; Llama4ForCausalLM.base_model_prefix) and raises; try --loss full"
        )
    why = adapters_refused(shape, recipe)
    if why is not None:
        yield why


def adapters_refused(shape: ModelShape, recipe: Recipe) -> str | None:
    """Why PEFT refuses the recipe's adapters on this model, if it does: `what: why`.

    Source: peft 0.21.2, tuners/lora/layer.py (Linear.forward reads result.dtype), tuners/tuners_utils.py
    (_check_lora_target_modules_mamba); transformers 5.23.0, models/llama4/modeling_llama4.py (Llama4Router),
    models/phimoe/modeling_phimoe.py (PhimoeTopKRouter).
    """
    if recipe.method == "full":
        return None
    family, everywhere = shape.model_type, recipe.lora_target == ("all-linear",)
    if everywhere and family in _ROUTER_RETURNS_TUPLE:
        return f"an adapter on the router of {family}: the router returns a tuple, which peft's Linear cannot add to"
    if family in _MAMBA and (everywhere or not {"out_proj", "conv1d"}.isdisjoint(recipe.lora_target)):
        return (
            f"an adapter on out_proj of {family}: peft refuses it on Mamba's layers (_check_lora_target_modules_mamba)"
        )
    return experts_refused(layout(shape, recipe), recipe)


def leaf_refused(shape: ModelShape, recipe: Recipe, choice: Choice) -> str | None:
    """Why ZeRO-3's backward stops at adapters of a MoE block, if it does: `what: why`.

    The MoE block is one module to its hooks. Where nothing before the first one trains and nothing is recomputed, the
    block's input has no gradient, its backward does not know when it is over, and gradients of its adapters meet
    parameters that have been released: of mixtral, qwen2_moe and qwen3_moe on real ranks "The size of tensor a (0) must
    match ..."; with an adapter on attention, a trained embedding or gradient checkpointing they run.

    Source: deepspeed 0.19.8, runtime/zero/leaf_module_config.py (DEFAULT_LEAF_MODULE_CLASSES), parameter_offload.py
    (PostBackwardFunctionModule: if output_in.requires_grad).
    """
    if shape.model_type not in LEAF_FAMILIES or recipe.method == "full":
        return None  # before anything of the choice is read: an answer is kept by what it reads (memo.py)
    if choice.zero.stage != 3 or choice.gradient_checkpointing:
        return None
    for block in layout(shape, recipe).blocks:
        is_leaf = [weight.module.startswith(f"{LEAF}.") for weight in block.weights]
        trained = [weight.trainable for weight in block.weights]
        if any(trains and not inside for trains, inside in zip(trained, is_leaf, strict=True)):
            return None
        if any(trained):
            return (
                f"adapters in the MoE blocks of {shape.model_type} alone at ZeRO-3 without gradient checkpointing: a"
                " block is hooked as one module, whose input has no gradient, and DeepSpeed stops in backward"
            )
    return None


def unknown_layers(shape: ModelShape) -> str | None:
    """Why the formula does not know this model's layers, if it does not: its activations are those of attention and MLP
    then, and may be far too low."""
    family = shape.model_type
    if shape.is_encoder_decoder:
        return f"layers of {family}, an encoder-decoder: the trainer trains decoders only; try --model qwen3-0.6b"
    if is_recurrent(shape):
        return (
            f"state-space or linear-attention layers of {family}: the formula knows attention and MLP, and is too low;"
            " zplan simulate runs the real ones"
        )
    if family in _ROUTES_BY_VALUE:
        return (
            f"layers of {family}: taken for attention and MLP as elsewhere; the simulation cannot run them either (its"
            " experts are chosen by value); try zplan tune --trials 1"
        )
    if family not in CHECKED_FAMILIES:
        return (
            f"layers of {family}: taken for attention and MLP as elsewhere, and no simulation confirms that; zplan"
            " simulate runs the real ones"
        )
    return None


def is_recurrent(shape: ModelShape) -> bool:
    """Whether some layer carries a state along the sequence instead of attending to it."""
    if any(kind not in ATTENTIONS for kind in shape.layer_types):
        return True
    return any(parameter.kind == "conv" for block in shape.blocks for parameter in block.parameters)
