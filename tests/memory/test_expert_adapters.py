"""Adapters on routed experts, and what the model itself holds while its layers run."""

from __future__ import annotations

from typing import Any

from benchmarks.family_configs import FAMILIES
from benchmarks.formula_case import cut_layers
from tests.memory.test_activations import kept_less
from zplan.catalog.find import find_model
from zplan.memory.course import course
from zplan.memory.events import Event
from zplan.memory.owners import module_parameters, viewed_numbers
from zplan.memory.timeline import Recording, local_embedding_bytes, record
from zplan.memory.trainable import Weight, layout
from zplan.model_probe import shape_of_config
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe

TOKENS = 128


def recorded(name: str, method: str = "lora", **options: Any) -> Recording:
    """Two layers of a model."""
    shape = find_model(name)
    assert isinstance(shape, ModelShape)
    shape = cut_layers(shape, 2)
    recipe = Recipe(model=name, method=method, train_batch_size=1, max_length=TOKENS, **options)  # type: ignore[arg-type]
    return record(shape, recipe, layout(shape, recipe), micro_batch=1, on_cpu=False, partitioned=True)


def weights_of_layers(recording: Recording) -> dict[int, Weight]:
    """Number of each parameter of the layers -> its weight."""
    return {
        recording.items.base[index] + layer * len(block.laid.weights) + local: weight
        for index, block in enumerate(recording.blocks)
        if block.laid.block.role == "layer"
        for layer in range(block.laid.repeat)
        for local, weight in enumerate(block.laid.weights)
    }


def test_the_graph_keeps_views_of_the_adapters_of_experts_and_not_of_the_experts_that_they_change() -> None:
    recording = recorded("mixtral-8x7b")
    viewed = viewed_numbers(recording, checkpointing=False)
    names = {
        weight.name.rpartition(".")[2] for number, weight in weights_of_layers(recording).items() if number in viewed
    }
    assert names == {"expert_lora_A", "expert_lora_B"}


def test_a_leaf_module_is_traced_with_its_adapters_behind_the_weights_that_the_model_was_built_with() -> None:
    recording = recorded("qwen3-30b-a3b")
    weights = weights_of_layers(recording)
    leaf = max(module_parameters(recording).values(), key=lambda numbers: sum(number in weights for number in numbers))
    are_adapters = ["lora_" in weights[number].name for number in leaf]
    assert True in are_adapters
    assert are_adapters == sorted(are_adapters)


def test_an_adapter_on_a_router_in_fp32_keeps_the_fp32_hidden_states() -> None:
    """It is added to the weight itself, which then has a gradient."""
    adapted = recorded("deepseek-v2-lite", lora_target=("gate_up_proj", "gate_proj", "up_proj", "down_proj", "gate"))
    others = recorded("deepseek-v2-lite", lora_target=("gate_up_proj", "gate_proj", "up_proj", "down_proj"))
    kept = [
        sum(step[1] for step in recording.blocks[2].tape.forward if step[0] == 0) for recording in (adapted, others)
    ]  # type: ignore[union-attr]
    assert kept[0] - kept[1] >= 4 * TOKENS * 2048


def test_before_the_first_adapter_a_product_keeps_only_what_the_other_factor_s_gradient_needs() -> None:
    """No norm keeps anything; q, k, v, the output of attention and its sums are none of the graph's."""
    fused, mlp = (recorded("llama-3.2-1b", lora_target=targets) for targets in (("gate_proj", "up_proj"), ("up_proj",)))
    inner = 2 * TOKENS * 8192  # gate_proj's result, for the activation, and up_proj's, for that gradient
    assert kept_less(mlp) - kept_less(fused) == 2 * inner


def test_adapted_experts_are_not_kept_for_a_gradient_that_the_first_layer_s_input_does_not_have() -> None:
    """gate_up_proj with its adapter is; down_proj is multiplied with what has a gradient."""
    both = recorded("mixtral-8x7b", lora_target=("w1", "w2", "w3"))
    shape = both.shape
    experts, rows = 8 * 2 * 14336 * 4096, TOKENS * 2 * 4096
    attention = kept_less(recorded("mixtral-8x7b", lora_target=("w1", "w2", "w3", "o_proj")))
    assert shape.hidden_size == 4096
    assert kept_less(both) - attention >= 2 * (experts + rows)


def test_a_layer_that_has_no_latent_is_attention_as_any_other() -> None:
    """Kimi Linear's config.json speaks of a latent; its linear layers have none, and could not be asked about."""
    shape = shape_of_config(FAMILIES["Kimi Linear"], name="kimi-linear")
    recipe = Recipe(model="kimi-linear", method="lora", train_batch_size=1, max_length=TOKENS)
    assert record(shape, recipe, layout(shape, recipe), micro_batch=1, on_cpu=False).blocks


def test_the_embedding_is_a_local_of_the_model_until_its_forward_ends() -> None:
    """Without recomputation no operation of the first layer saves it: a norm keeps an fp32 copy."""
    recording = recorded("mixtral-8x7b", "full")
    layers = next(block for block in recording.blocks if block.tape)
    assert local_embedding_bytes(recording, layers) == 2 * TOKENS * 4096
    plain = course(recording, checkpointing=False, fetches=False)
    assert plain.moments[-1] == 0
    gpt2 = recorded("gpt2", "full")
    assert local_embedding_bytes(gpt2, next(block for block in gpt2.blocks if block.tape)) == 0  # positions are added


def test_gradients_of_a_leaf_module_wait_for_its_backward_and_the_views_of_its_weights_do_not() -> None:
    """At ZeRO-3; below, and in families whose experts are no leaf module, each is reduced when it is there."""
    steps = backward_of_experts(recorded("qwen3-30b-a3b", "full"))
    made = [number for event, number in steps if event == Event.MADE]
    at_once = [number for event, number in steps[steps.index((Event.MADE, made[-1])) :] if event == Event.GRADIENT]
    assert len(made) == 3  # router, gate_up_proj, down_proj
    assert at_once[:3] == sorted(made)
    others = backward_of_experts(recorded("deepseek-v2-lite", "full"))
    assert not [number for event, number in others if event == Event.MADE]


def backward_of_experts(recording: Recording) -> list[tuple[int, int]]:
    """(event, number) of a recorded layer with experts."""
    block = next(
        block for block in recording.blocks if any(len(weight.shape) == 3 for weight in block.laid.weights)
    )  # fmt: skip
    assert block.tape
    return [(event, number) for event, number, _ in block.tape.backward]
