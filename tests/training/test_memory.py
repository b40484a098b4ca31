"""Memory by arithmetic is the memory that a process really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from slmkit.device import find_device
from slmkit.model import SLMConfig
from slmkit.model.families import architecture_of
from slmkit.training.inventory import Inventory
from slmkit.training.memory import reading_bytes, training_bytes
from slmkit.training.recipe import TrainSettings

SHAPE = {
    "vocab_size": 8_192, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
    "max_position_embeddings": 512,
}  # fmt: skip
MODELS = {
    "llama": {},
    "gpt2": {"model_type": "gpt2"},
    "gemma3_text": {"model_type": "gemma3_text", "num_key_value_heads": 2, "sliding_window": 64},
}
SMALL = SHAPE | {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS, LENGTH = 2, 512

# Trains or reads in a process of its own: only there is the most that was ever used known to be this step's.
PROGRAM = """
import json, sys, torch
from slmkit.device import find_device
from slmkit.model import Decoder, SLMConfig
from slmkit.model.families import architecture_of
from slmkit.training.losses import linear_cross_entropy
from slmkit.training.optimizers import OPTIMIZERS
from slmkit.training.recipe import TrainSettings

def status(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024

def train(shape, rows, length, precision, optimizer, recompute_every):
    device, decoder = find_device("cpu", precision), Decoder(architecture_of(SLMConfig(**shape)))
    decoder.recompute_every = recompute_every
    optimizers = OPTIMIZERS[optimizer](decoder, TrainSettings(optimizer=optimizer))
    ids = torch.randint(100, (rows, length))
    for _ in range(2):
        with device.autocast():
            loss = linear_cross_entropy(decoder(ids).flatten(0, 1), decoder.head_weight, ids.flatten())
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)

def read(shape, rows, length, *_):
    decoder = Decoder(architecture_of(SLMConfig(**shape))).eval()
    with torch.no_grad():
        decoder.logits(decoder(torch.randint(100, (rows, length)), decoder.new_cache(rows, length))[:, -1])

torch.set_num_threads(1)
what, small, shape, rows, length, *how = json.loads(sys.argv[1])
run = {"train": train, "read": read}[what]
run(small, 2, 64, *how)  # what libraries load at first use is none of the model's
before = status("VmRSS")
run(shape, rows, length, *how)
print(status("VmHWM") - before)
"""


def measured(what: str, model: str, *how: object) -> int:
    """Bytes by which the process grew at most."""
    arguments = json.dumps([what, SMALL | MODELS[model], SHAPE | MODELS[model], ROWS, LENGTH, *how])
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # as soon as it is freed
    command = [sys.executable, "-c", PROGRAM, arguments]
    return int(subprocess.run(command, env=os.environ | given_back, check=True, capture_output=True, text=True).stdout)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.parametrize(
    ("model", "precision", "optimizer", "recompute_every"),
    [
        ("llama", "float32", "adamw", 0),
        ("llama", "float32", "adamw", 1),
        ("llama", "auto", "muon", 2),
        ("gpt2", "auto", "muon", 0),
        ("gpt2", "float32", "adamw", 1),
        ("gemma3_text", "auto", "adamw", 0),
    ],
)
def test_training(model: str, precision: str, optimizer: str, recompute_every: int) -> None:
    shape = SHAPE | MODELS[model]
    settings, device = TrainSettings(optimizer=optimizer), find_device("cpu", precision)
    said = training_bytes(
        Inventory(architecture_of(SLMConfig(**shape))), settings, ROWS, LENGTH, device, recompute_every
    )
    assert said == pytest.approx(measured("train", model, precision, optimizer, recompute_every), rel=0.15)


@linux
@pytest.mark.parametrize("model", MODELS)
def test_reading(model: str) -> None:
    shape = SHAPE | MODELS[model]
    said = reading_bytes(architecture_of(SLMConfig(**shape)), ROWS, LENGTH, torch.float32)
    assert said == pytest.approx(measured("read", model), rel=0.15)


def test_recomputing_takes_less_and_every_second_block_between() -> None:
    a = Inventory(architecture_of(SLMConfig(**SHAPE)))
    device = find_device("cpu", "float32")
    whole, second, every = (training_bytes(a, TrainSettings(), ROWS, LENGTH, device, n) for n in (0, 2, 1))
    assert every < 0.75 * whole
    assert every < second < whole
