"""Which RoPE scaling still finds a needle past the length a model was trained on?

A small Llama learns, at 128 tokens, to name the value that followed a key when it was said before. It is then asked for
one pair in a haystack of random words, at longer lengths, its RoPE scaled in each of the known ways by how much longer
they are; nothing is trained on.

    python benchmarks/needle.py --seeds 3        # about five minutes on two cores
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from slmkit.data.stream import Stream
from slmkit.device import find_device, keep_freed_memory
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.fit import make_plan
from slmkit.training.logging.metrics_log import environment
from slmkit.training.loop import Every, State, train
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import OPTIMIZERS
from slmkit.training.recipe.recipe import TrainSettings

TRAINED, IGNORED = 128, -100
LENGTHS = [128, 256, 512, 1_024, 2_048]
FIRST_KEY, KEYS, FIRST_WORD, WORDS = 0, 64, 64, 192
THETA = 10_000.0
RESULTS = Path(__file__).parent / "results" / "needle.json"


class Pairs:
    """Training rows: pairs (key, value) among words, each said several times: what followed a key is learned."""

    def __init__(self, length: int, rows: int, seed: int) -> None:
        self.length, self.rows_in_epoch, self.seed = length, rows, seed

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng([self.seed, index])
        text = draw.integers(FIRST_WORD, FIRST_WORD + WORDS, self.length + 1)
        labels = np.full(self.length, IGNORED)
        keys = FIRST_KEY + draw.permutation(KEYS)[: self.length // 12]
        value_of = dict(zip(keys, draw.integers(FIRST_WORD, FIRST_WORD + WORDS, len(keys))))
        said = set()
        for place in range(0, self.length - 1, 3):  # two tokens of a pair and a word, or three words
            if draw.random() < 0.8:
                key = draw.choice(keys)
                text[place : place + 2] = key, value_of[key]
                if key in said:
                    labels[place] = value_of[key]
                said.add(key)
        return text[:-1], labels

    def documents(self, index: int) -> np.ndarray:
        return np.zeros(self.length, dtype=np.int64)


def haystack(length: int, seed: int) -> tuple[torch.Tensor, int]:
    """A text of words with one pair somewhere and its key at the end: ids [1, length] and the value to be named."""
    draw = np.random.default_rng([length, seed])
    text = draw.integers(FIRST_WORD, FIRST_WORD + WORDS, length)
    place = draw.integers(0, length - 2)
    text[place], text[-1] = (FIRST_KEY + draw.integers(KEYS),) * 2
    return torch.from_numpy(text)[None], int(text[place + 1])


def scalings(factor: float) -> dict[str, dict]:
    """`rope_parameters` that stretch the trained length by `factor`."""
    original = {"original_max_position_embeddings": TRAINED}
    kinds = {
        "none": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": factor},
        "dynamic": {"rope_type": "dynamic", "factor": factor},
        "yarn": {"rope_type": "yarn", "factor": factor} | original,
        "llama3": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | original,
    }
    return {name: kind | {"rope_theta": THETA} for name, kind in kinds.items()}


def config(positions: int, rope: dict) -> SLMConfig:
    return SLMConfig(
        vocab_size=FIRST_WORD + WORDS,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        rope_parameters=rope,
    )


def trained(seed: int, steps: int) -> Decoder:
    model = build_decoder(config(TRAINED, scalings(1)["none"]), seed, "copying")
    settings = TrainSettings(
        optimizer="muon", learning_rate=3e-3, muon_learning_rate=0.02, muon_momentum=0.9, max_steps=steps,
        tokens_per_step=16 * TRAINED,
    )  # fmt: skip
    state = State(model, OPTIMIZERS["muon"](model, settings), seed=seed)
    stream = Stream(Pairs(TRAINED, 10**6, seed), 16, seed)
    plan = make_plan(settings, 10**6, TRAINED, find_device("cpu"))
    train(
        state,
        next_token,
        stream,
        plan,
        [Every(100, lambda _, report: print(f"step {report['step']}: {report['loss']:.3f}"))],
    )
    return model.eval()


@torch.inference_mode()
def found(model: Decoder, length: int, rope: dict, haystacks: int = 100) -> float:
    """Share of needles that the model finds, with its weights read through another rotation."""
    positions = TRAINED if rope["rope_type"] == "dynamic" else length
    scaled = Decoder(architecture_of(config(positions, rope))).eval()
    scaled.load_state_dict(model.state_dict())
    right = 0
    for seed in range(haystacks):
        ids, value = haystack(length, seed)
        right += int(scaled.logits(scaled(ids)[0, -1]).argmax()) == value
    return right / haystacks


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=1_500)
    chosen = arguments.parse_args()
    keep_freed_memory()
    shares: dict[str, dict[int, list[float]]] = {name: {n: [] for n in LENGTHS} for name in scalings(1)}
    for seed in range(chosen.seeds):
        model = trained(seed, chosen.steps)
        for length in LENGTHS:
            for name, rope in scalings(length / TRAINED).items():
                shares[name][length].append(found(model, length, rope))
                print(f"seed {seed}, {length:5} tokens, {name:8} {shares[name][length][-1]:6.1%}", flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "trained_length": TRAINED,
        "steps": chosen.steps,
        "found": {
            name: {
                length: {"median": round(statistics.median(values), 3), "all": [round(v, 3) for v in values]}
                for length, values in by_length.items()
            }
            for name, by_length in shares.items()
        },
        "environment": environment(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
