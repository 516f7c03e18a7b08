"""Bytes of single operations and of a few steps, worked by hand."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from tests.memory.test_estimate import SHAPE, cluster, estimate, term_bytes
from zplan.catalog.find import find_model
from zplan.memory import operations as ops
from zplan.memory import scores
from zplan.memory.block_tape import record_block
from zplan.memory.coordinator import Act, Coordinator, Fetches
from zplan.memory.course import course
from zplan.memory.estimate import estimate_memory
from zplan.memory.events import Event
from zplan.memory.fetch_limits import Limits
from zplan.memory.operations import Modules, Sizes
from zplan.memory.script import Op
from zplan.memory.tape import Tape, Tensor, Value
from zplan.memory.timeline import INNER, Recording, record, root_module
from zplan.memory.trainable import Weight, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, ZeroConfig

SIZES = Sizes(micro_batch=1, length=100, itemsize=2, attention="sdpa", on_cpu=False)


def most_in_backward(build: object, input_bytes: int, output_bytes: int) -> int:
    """Above the saved tensors and the incoming gradient."""
    tape = record_block(build, input_bytes, output_bytes)  # type: ignore[arg-type]
    net = peak = 0
    for _, change, above in tape.backward:
        peak, net = max(peak, net + above), net + change
    return peak


def test_the_views_of_a_split_give_their_gradients_to_one_that_joins_them() -> None:
    def build(tape: Tape, x: Value) -> Value:
        left, right = tape.split(x, 2, 200)
        out = tape.apply(100, [(left, 100), (right, 100)])
        tape.drop(left, right)
        return out

    assert (
        most_in_backward(build, 200, 100) == 100 + 100 + 200 - 100
    )  # two halves, the joined one; the incoming is gone


def test_slices_give_gradients_of_the_whole() -> None:
    def build(tape: Tape, x: Value) -> Value:
        left, right = (tape.apply(None, [(x, 200)]) for _ in range(2))
        out = tape.apply(100, [(left, 100), (right, 100)])
        tape.drop(left, right)
        return out

    # one half's gradient has become a whole; the other makes its own whole before they are added
    assert most_in_backward(build, 200, 100) == 200 + 100 + 200 - 100


def saved_by(build: object) -> int:
    """Bytes that stay after the forward, output and input aside."""
    tape = Tape()
    source = Value(Tensor(0, foreign=True))
    out = build(tape, source)  # type: ignore[operator]
    return sum(step[1] for step in (*tape.steps, (0, tape._net, 0)) if step[0] == 0) - out.storage.bytes


def test_dropout_keeps_a_byte_for_every_element() -> None:
    assert saved_by(lambda tape, x: ops.dropout(tape, SIZES, x, 64, 0.1)) == 100 * 64
    on_cpu = replace(SIZES, on_cpu=True)
    assert saved_by(lambda tape, x: ops.dropout(tape, on_cpu, x, 64, 0.1)) == 100 * 64 * 2  # noise in bf16
    assert saved_by(lambda tape, x: ops.dropout(tape, SIZES, x, 64, 0.0)) == 0


def test_flash_attention_s_backward_takes_rows_of_128_and_heads_of_32() -> None:
    assert scores._flash_scratch(SIZES, num_heads=3, head_dim=40) == 4 * 128 * 3 * (1 + 64)


def grouped_attention(tape: Tape, x: Value) -> Value:
    q, k, v = (tape.apply(None, [(x, None)]) for _ in range(3))
    out = scores.fused_attention(tape, replace(SIZES, itemsize=4), q, k, v, 4, 64, 32, 32, masked=False)
    tape.drop(q, k, v)
    return out


def test_grouped_queries_in_fp32_take_the_math_kernel() -> None:
    wide, square = 4 * 100 * 64, 100 * 100
    # q and keys scaled, values of every head, the weights
    assert saved_by(grouped_attention) == 3 * wide + 4 * 4 * square
    tape = Tape()
    grouped_attention(tape, Value(Tensor(0, foreign=True)))
    # the repeated keys as well, a mask; scores and softmax of four heads, a byte for every score
    assert tape._peak == 4 * wide + 4 * square + 2 * 4 * 4 * square + 4 * square


def windowed(length: int) -> int:
    batch = BatchSizes(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1, world_size=1)
    found = estimate_memory(
        replace(SHAPE, sliding_window=256),
        Recipe(model="windowed", train_batch_size=2, max_length=length),
        Choice(zero=ZeroConfig(stage=2), batch=batch),
        cluster(1),
    )
    return term_bytes(found, "activations", "forward")


def test_a_batch_as_long_as_the_window_gets_a_mask() -> None:
    growth = windowed(256) - windowed(255)
    assert growth - (windowed(255) - windowed(254)) == 2 * 256 * 256  # a byte for every pair of positions


def test_persistent_parameters_are_away_while_the_optimizer_steps() -> None:
    small, whole = (
        estimate(ZeroConfig(stage=3, stage3_param_persistence_threshold=size), world_size=8) for size in (0, 10**9)
    )
    persistent = 2 * SHAPE.num_parameters
    assert term_bytes(whole, "persistent parameters", "forward") == persistent
    assert term_bytes(whole, "persistent parameters", "step") == 0
    assert whole.gpu.phases["step"] == small.gpu.phases["step"] - term_bytes(
        small, "temporaries of the engine", "step"
    ) + max(term_bytes(small, "temporaries of the engine", "step"), persistent)


def test_a_recomputed_weight_lives_until_its_module_s_backward() -> None:
    fetches = Fetches.of([0, 0], {0: (0,)}, (10,))
    coordinator = Coordinator(fetches, Limits(prefetch=0, live=0, reuse=0), persistent=frozenset(), external=(),
                              trainable=(True,))  # fmt: skip
    coordinator.pre_module(0)
    assert coordinator.kept_module(0) == ((Act.KEEP, (0,)),)
    assert (Act.GATHER, (0,)) in coordinator.pre_module(0)  # a second time
    assert coordinator.post_module(0) == ((Act.RELEASE, (0,)), (Act.FORGET, (0,)))


def test_what_a_leaf_module_holds_is_passed_over_on_the_way_to_another_module_s_next_use() -> None:
    """Modules 0 (one parameter of 10), 1 (a leaf with one of 1000), 0 again; the root, 2, holds both."""
    modules, inside = {0: (0,), 1: (1,)}, {0: (0,), 1: (1,), 2: (0, 1)}
    plain = Fetches.of([0, 1, 2, 0], modules, (10, 1000))
    leafy = Fetches.of([0, 1, 2, 0], modules, (10, 1000), frozenset({1}), inside)
    assert (plain.distance(0, 1), leafy.distance(0, 1)) == (1000, 0)
    assert plain.distance(1, 2) > leafy.distance(1, 2) == 0  # the root counts with everything within it


def test_a_reentrant_layer_s_mask_and_positions_stay_until_the_update() -> None:
    full, adapted = (
        term_bytes(estimate(ZeroConfig(stage=3), method=method, attention="eager"), "activations", "step")
        for method in ("full", "lora")
    )
    tokens, width, head = 128, 256, SHAPE.head_dim
    assert full == 0
    # the embedding's output and its gradient; a bf16 mask, positions, cos and sin
    assert adapted == 2 * 2 * tokens * width + 2 * tokens * tokens + 8 * tokens + 2 * 2 * tokens * head


def test_every_micro_batch_s_tokens_are_there_for_the_whole_step() -> None:
    found = estimate(ZeroConfig(stage=2), micro_batch=2, accumulation=3)
    assert term_bytes(found, "batches", "step") == 3 * 8 * 2 * 3 * 128


def test_the_first_step_gathers_what_the_later_ones_keep() -> None:
    """Everything persists from the second step on; the first gathers each module's parameters on their own."""
    zero = ZeroConfig(
        stage=3, stage3_param_persistence_threshold=10**9, offload_optimizer=OffloadOptimizer(device="cpu")
    )
    found = estimate(zero, world_size=8)
    assert term_bytes(found, "persistent parameters", "backward") == 2 * SHAPE.num_parameters
    assert term_bytes(found, "gathered parameters", "backward") == 0  # what it gathers is less than all of them


def test_a_single_rank_flattens_its_gradients_without_zero_as_well() -> None:
    """Of one bucket: all trainable elements, as there are fewer than 5e8."""
    one, two = (estimate(ZeroConfig(stage=0), world_size=ranks).gpu.phases["backward"] for ranks in (1, 2))
    assert one == two


def test_a_view_that_experts_keep_outlives_the_release() -> None:
    fetches = Fetches.of([0, 0], {0: (0, 1)}, (10, 10))
    coordinator = Coordinator(fetches, Limits(prefetch=0, live=0, reuse=0), persistent=frozenset(), external=(),
                              trainable=(True, True), viewed=frozenset({1}))  # fmt: skip
    coordinator.pre_module(0)
    assert coordinator.viewed_module(0) == ((Act.KEEP, (1,)), (Act.RELEASE, (0,)))


def joined(flat: bool, partitioned: bool = False) -> int:
    """Most bytes in backward where two linear modules read one tensor of 200 bytes and give 100 each."""

    def build(tape: Tape, x: Value) -> Value:
        y = tape.apply(200, [(x, 200)])
        outs = [tape.apply(100, [(y, 200)], viewed=not flat and not partitioned) for _ in range(2)]
        tape.drop(y)
        out = tape.apply(100, [(value, None) for value in outs])
        tape.drop(*outs)
        return out

    return most_in_backward(build, 200, 100)


def test_gradients_of_three_dimensional_linears_are_added_out_of_place() -> None:
    """Seen with torch's profiler: aten::add for three dimensions, aten::add_ for two and for ZeRO-3's own linear."""
    assert joined(flat=True) == joined(flat=False, partitioned=True) == 200 + 200
    assert joined(flat=False) == 200 + 200 + 200 - 100  # by then the outputs' gradient is gone


def test_opt_s_last_norm_runs_after_the_layers() -> None:
    shape = find_model("opt-1.3b")
    assert isinstance(shape, ModelShape)
    recipe = Recipe(model="opt-1.3b", train_batch_size=1, max_length=64)
    recording = record(shape, recipe, layout(shape, recipe), micro_batch=1, on_cpu=False)
    (block,) = (block for block in recording.blocks if block.laid.block.role == "embedding")
    assert [name.rpartition(".")[2] for name, _ in block.embeddings] == ["embed_tokens", "embed_positions"]
    assert block.late is not None


def test_without_checkpointing_the_first_norm_of_an_adapted_model_keeps_nothing() -> None:
    """The embedding is frozen and nothing before the first adapter is in the graph."""
    recipe = Recipe(model="llama-like", method="lora", train_batch_size=1, max_length=128)
    recording = record(SHAPE, recipe, layout(SHAPE, recipe), micro_batch=1, on_cpu=False)
    assert kept_less(recording) == 4 * 128 * 256 + 4 * 128
    gpt2 = find_model("gpt2")
    assert isinstance(gpt2, ModelShape)
    recording = record(gpt2, recipe, layout(gpt2, recipe), micro_batch=1, on_cpu=False)
    assert kept_less(recording) == 2 * 128 * 768 + 8 * 128  # LayerNorm keeps its input, mean and deviation


def kept_less(recording: Recording) -> int:
    """Bytes that the first layer's forward keeps less than another's."""
    block = next(block for block in recording.blocks if block.first)
    assert block.first
    assert block.tape
    apart, others = (
        sum(net for event, net, _ in steps if event == Event.BYTES)
        for steps in (block.first.forward, block.tape.forward)
    )
    return others - apart


def scaled(model_type: str) -> int:
    shape = replace(SHAPE, model_type=model_type)
    recipe = Recipe(model="any", train_batch_size=1, max_length=128)
    recording = record(shape, recipe, layout(shape, recipe), micro_batch=1, on_cpu=False)
    (layer,) = (block for block in recording.blocks if block.laid.block.role == "layer")
    assert layer.tape is not None
    return sum(step[1] for step in layer.tape.forward if step[0] == 0)


def test_granite_keeps_nothing_more_for_its_multipliers_and_phi_3_keeps_its_attention_s_output_twice() -> None:
    assert scaled("granite") == scaled("llama")
    assert scaled("phi3") == scaled("llama") + 2 * 128 * 256  # as the kernel gave it, and in the order of positions


def test_peft_s_own_modules_prefetch_before_the_model_is_entered() -> None:
    recipe = Recipe(model="llama-like", method="lora", train_batch_size=1, max_length=128)
    for method, entered in (("full", 1), ("lora", 3)):
        asked = replace(recipe, method=method)  # type: ignore[arg-type]
        recording = record(SHAPE, asked, layout(SHAPE, asked), micro_batch=1, on_cpu=False, partitioned=True)
        calls = course(recording, checkpointing=True, fetches=True).script.calls
        first = next(number for number, (op, _) in enumerate(calls) if op == Op.PRE_MODULE)
        modules = [number for op, number in calls[first : first + entered]]
        assert modules[-1] == root_module(recording)
        assert calls[first + entered] == (Op.PRE_MODULE, root_module(recording) + INNER)
        assert len(set(modules)) == entered


def test_zero_3_keeps_a_norm_on_the_gpu_for_every_offloaded_gradient() -> None:
    zero = ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(device="cpu"))
    count = sum(1 for _ in SHAPE.parameters())
    assert term_bytes(estimate(zero), "gradient norms", "step") == 512 * count
    assert term_bytes(estimate(ZeroConfig(stage=3)), "gradient norms", "step") == 0


def test_an_adapter_s_dropout_keeps_its_mask_and_what_passed_it() -> None:
    shape = find_model("smollm2-135m")
    assert isinstance(shape, ModelShape)
    plain = Recipe(model="smollm2-135m", method="lora", max_length=128)

    def kept(recipe: Recipe) -> int:
        recording = record(shape, recipe, layout(shape, recipe), micro_batch=1, on_cpu=False)
        tape = next(block.tape for block in recording.blocks if block.laid.block.role == "layer")
        assert tape is not None
        return sum(step[1] for step in tape.forward if step[0] == Event.BYTES)

    widths = 6 * 576 + 1536  # q, k, v, o, gate, up; down
    per_element = 2 + 1  # what passed, in bf16, and a byte of mask
    inputs_of_lora_a = 2 * (2 * 576 + 1536)  # two norms' outputs and the gated product; attention keeps its own output
    grown = kept(replace(plain, lora_dropout=0.05)) - kept(plain)
    assert grown == 128 * (per_element * widths - inputs_of_lora_a), "every lora_A keeps its own input instead"


def test_dora_s_norm_holds_three_matrices_and_an_identity_beside_the_output() -> None:
    """One adapted matrix of 40 inputs and 24 outputs at rank 4, 100 tokens."""
    size = {"lora_A": (4, 40), "lora_B": (24, 4), "lora_magnitude_vector": (24,)}
    parts = [("proj", "proj.weight", (24, 40), False)] + [
        (f"proj.{part}.default", f"proj.{part}.default.weight", shape, True) for part, shape in size.items()
    ]
    weights = [
        Weight(
            name=name, module=module, numel=prod(shape), shape=shape, itemsize=2, stored_bytes=2 * prod(shape),
            trainable=trains, group=0,
        )
        for module, name, shape, trains in parts
    ]  # fmt: skip
    modules = Modules(weights={weight.module: [(number, weight)] for number, weight in enumerate(weights)})

    def build(tape: Tape, x: Value) -> Value:
        return ops.linear(tape, modules, SIZES, "proj", x)

    tape = record_block(build, 2 * 100 * 40, 2 * 100 * 24)
    assert tape.forward_without_saving, "the norm is made in every forward"
    net = peak = 0
    for event, change, above in tape.forward_without_saving:
        if event == Event.BYTES:
            peak, net = max(peak, net + above), net + change
    matrix, output = 2 * 24 * 40, 2 * 100 * 24
    identity_and_its_way = 2 * 40 * 40 + 2 * 40 * 4
    products, vectors = 4, 2 * 2 * 24  # the base's, B A x, and the two products with the magnitude; it and the norm
    most = (products + 1) * output + matrix + vectors
    assert peak == max(output + 3 * matrix, most, output + identity_and_its_way + matrix)
    gradients = [weights[step[1]].module for step in tape.backward if step[0] == Event.GRADIENT]
    assert sorted(gradients) == sorted(module for module, _, _, trains in parts if trains)
    kept = sum(change for event, change, _ in tape.forward if event == Event.BYTES)
    assert kept == output + 2 * output + 3 * 2 * 24 + 2 * 100 * 4, "two factors, three vectors, A x"


def kept_by_a_layer(model: str, attention: str, micro_batch: int, **config: object) -> tuple[int, int]:
    """What a layer without checkpointing keeps for its backward, and the bytes of its input."""
    shape = find_model(model)
    assert isinstance(shape, ModelShape)
    shape = replace(shape, config={**shape.config, **config})
    recipe = Recipe(model=model, train_batch_size=8, max_length=512, attention=attention)  # type: ignore[arg-type]
    made = record(shape, recipe, layout(shape, recipe), micro_batch=micro_batch, on_cpu=False)
    tape = next(block.tape for block in made.blocks if block.laid.block.role == "layer")
    assert tape is not None
    return sum(step[1] for step in tape.forward if step[0] == Event.BYTES), made.hidden_bytes


def test_a_parallel_residual_keeps_no_sum_of_input_and_attention() -> None:
    parallel, hidden = kept_by_a_layer("pythia-410m", "sdpa", 2)
    in_turn, _ = kept_by_a_layer("pythia-410m", "sdpa", 2, use_parallel_residual=False)
    assert in_turn - parallel == hidden


def test_eager_products_of_several_sequences_keep_copies_and_let_a_fused_projection_go() -> None:
    """GPT-2's q, k and v are views of one tensor: copied, they are as large; Phi's joined q and k need no copy."""
    one, hidden = kept_by_a_layer("gpt2", "eager", 1)
    two, wider = kept_by_a_layer("gpt2", "eager", 2)
    assert wider == 2 * hidden
    assert two == 2 * one  # three copies in place of the tensor that they were views of
    one, _ = kept_by_a_layer("phi-3-mini", "eager", 1)
    two, wider = kept_by_a_layer("phi-3-mini", "eager", 2)
    assert two == 2 * one - 2 * wider  # the fused tensor, three times as wide, goes; a copy of v stays


def test_falcon_s_new_decoder_keeps_a_key_and_a_value_of_every_head() -> None:
    of_heads, hidden = kept_by_a_layer("falcon-40b", "eager", 1)
    of_groups, _ = kept_by_a_layer("falcon-40b", "eager", 1, new_decoder_architecture=False)
    assert of_heads - of_groups == 2 * (hidden - hidden * 8 // 128)  # 8 groups of 128 heads


def test_shared_keys_of_falcon_are_copied_for_every_head_by_a_product_of_several_sequences() -> None:
    one, _ = kept_by_a_layer("falcon-7b", "eager", 1)
    two, wider = kept_by_a_layer("falcon-7b", "eager", 2)
    assert two - 2 * one == 2 * (wider - wider // 71)  # one group of 71 heads
