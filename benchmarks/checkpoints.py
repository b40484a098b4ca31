"""What a checkpoint every 50 steps costs: the same steps with and without saving, in turn, in one run.

python -m benchmarks.checkpoints       # two minutes on two cores

Two figures: the stall, which is how much longer the loop is held up at a save (the copy, and waiting for the checkpoint
before), and the whole cost, in which the writing thread's share of the cores is too.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.figures import spread
from slmkit.data.batch import Batch
from slmkit.device import find_device, keep_freed_memory
from slmkit.model.config import SLMConfig
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.checkpoints.checkpoint import WholeModel
from slmkit.training.checkpoints.saver import Saver
from slmkit.training.logging.metrics_log import environment
from slmkit.training.loop import Plan, State, train_step
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import OPTIMIZERS
from slmkit.training.recipe.recipe import TrainSettings
from slmkit.training.run_directory import RunDirectory

EVERY, ROUNDS = 50, 3
ROWS, LENGTH = 2, 128
RESULTS = Path(__file__).parent / "results" / "checkpoints.json"


def ten_million() -> tuple[State, SLMConfig]:
    """10.6 M parameters in float32, with AdamW's moments: 128 MB a checkpoint."""
    config = SLMConfig(
        vocab_size=4096, hidden_size=320, intermediate_size=960, num_hidden_layers=7, num_attention_heads=5,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = build_decoder(config)
    return State(model, OPTIMIZERS["adamw"](model, TrainSettings())), config


def main() -> None:
    device = find_device("cpu")
    keep_freed_memory()
    state, config = ten_million()
    plan = Plan(10**9, ROWS, 1.0, lambda step: 1.0, device)
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(config.vocab_size, (ROWS, LENGTH), generator=generator) for _ in range(2))
    batch = Batch(ids, labels, labels.numel())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        saver = Saver(RunDirectory(folder), WholeModel(config), SLMTokenizer(260).save_pretrained, 2, warn=print)

        def round_of_steps(is_saving: bool) -> tuple[float, float]:
            """Seconds of a save and the steps until the next, and those of the save alone."""
            started = time.perf_counter()
            if is_saving:
                saver.save(state, {})
            stalled = time.perf_counter() - started
            for _ in range(EVERY):
                train_step(state, next_token, batch, plan)
                saver.check(state, {})
            return time.perf_counter() - started, stalled

        round_of_steps(True)
        saver.wait()
        rounds = []
        for _ in range(ROUNDS):
            without, _ = round_of_steps(False)
            saving, stalled = round_of_steps(True)
            saver.wait()
            begun = time.perf_counter()
            saver.save(state, {})
            saver.wait()
            rounds.append((without, saving, stalled, time.perf_counter() - begun))
            print([round(seconds, 3) for seconds in rounds[-1]], flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "what": f"{EVERY} steps of {ROWS * LENGTH} tokens with one checkpoint and without, {ROUNDS} rounds in turn",
        "environment": environment() | device.describe(),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "milliseconds_a_step": spread([1e3 * without / EVERY for without, *_ in rounds], 2),
        "stall_in_percent": spread([100 * stalled / without for without, _, stalled, _ in rounds], 2),
        "whole_cost_in_percent": spread([100 * (saving / without - 1) for without, saving, *_ in rounds], 2),
        "stall_in_milliseconds": spread([1e3 * stalled for *_, stalled, _ in rounds], 2),
        "written_at_once_in_milliseconds": spread([1e3 * whole for *_, whole in rounds], 2),
    }
    print(json.dumps(result, indent=2))
    if "--no-output" not in sys.argv:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
