"""Adapters in MoE blocks that ZeRO-3 hooks as one module, on a real rank of the installed engine."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from zplan.simulate.worker import import_libraries
import_libraries()
from tests.simulate.conftest import question
from zplan.simulate.reference import run_on_real_ranks
config = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
    "num_experts_per_tok": 2, "vocab_size": 256, "max_position_embeddings": 512,
}
recipe = {"method": "lora", "lora_target": tuple(sys.argv[2].split(","))}
asked = question(3, world_size=1, kind="cpu", cuda_answers=True, initialise=True, config=config, recipe=recipe)
asked = replace(asked, choice=replace(asked.choice, gradient_checkpointing=False))
print("peaks", run_on_real_ranks(asked, Path(sys.argv[1])).allocated_phases)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("targets", "stops"), [("w1,w2,w3", True), ("w1,w2,w3,q_proj", False)])
def test_deepspeed_stops_in_backward_where_nothing_before_the_first_block_trains(
    targets: str, stops: bool, tmp_path: object
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), targets], capture_output=True, text=True, check=False, timeout=300
    )
    assert ("The size of tensor a (0) must match" in done.stdout + done.stderr) is stops
    assert ("peaks" in done.stdout) is not stops
