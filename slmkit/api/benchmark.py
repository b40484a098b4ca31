"""How fast this machine trains a model, and how fast it generates with one."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from slmkit.adapt.load import load_model
from slmkit.device import Device, find_device, measured_peak
from slmkit.find import find_model_directory
from slmkit.generation import LanguageModel, SamplingSettings, generate_ids
from slmkit.model import SLMConfig, build_decoder
from slmkit.model.presets import PRESETS
from slmkit.model.sizes import flops_per_token, parameter_count
from slmkit.training.probe import Probe, Subject, probe
from slmkit.training.recipe import TrainSettings

BATCHES = (1, 8)  # sequences that are generated at once


@dataclass(frozen=True)
class TrainingSpeed:
    parameters: int
    measured: Probe
    mfu: float  # share of the speed that large matrix products have on this machine


@dataclass(frozen=True)
class DecodingSpeed:
    """Tokens a second, of all sequences of a batch together; medians of several rounds."""

    batch: int
    prompt: float  # of the prompt, which is read at once
    new: float  # of new tokens, one after the other


def training_speed(preset: str, settings: TrainSettings, steps: int) -> TrainingSpeed:
    """Train a new model of a preset on random tokens for some real steps."""
    device = find_device(settings.device, settings.precision)
    subject = Subject.fresh(SLMConfig.from_preset(preset))
    architecture = subject.inventory.architecture
    measured = probe(subject, settings, device, steps)
    flops = flops_per_token(architecture, settings.sequence_length or architecture.max_positions)
    mfu = measured.tokens_per_second * (flops.forward + flops.backward) / measured_peak(device)
    return TrainingSpeed(parameter_count(architecture), measured, mfu)


def decoding_speed(model: str, prompt: int, new: int, rounds: int, device: str) -> list[DecodingSpeed]:
    """Greedy generation with a preset of random weights, a model directory or a run, for one sequence and for several.

    Raises `UserError` where prompt and new tokens do not fit into the model's context.
    """
    where = find_device(device)
    if model in PRESETS:
        decoder: LanguageModel = build_decoder(SLMConfig.from_preset(model), seed=0).to(where.torch_device).eval()
    else:
        decoder = load_model(find_model_directory(model), where.torch_device)[0]
    return [_decoding_speed(decoder, batch, prompt, new, rounds, where) for batch in BATCHES]


def _decoding_speed(
    decoder: LanguageModel, batch: int, prompt: int, new: int, rounds: int, device: Device
) -> DecodingSpeed:
    ids = torch.randint(200, (batch, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device.torch_device)
    greedy = SamplingSettings(do_sample=False)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        generate_ids(decoder, ids, max_new_tokens=count, stop_ids=set(), settings=greedy, pad_token_id=0).cpu()
        return time.perf_counter() - started

    seconds(2)  # what is loaded or allocated at first use
    times = [(seconds(1), seconds(1 + new)) for _ in range(rounds)]
    first = statistics.median(one for one, _ in times)
    more = statistics.median(max(whole - one, 1e-9) for one, whole in times)
    return DecodingSpeed(batch, batch * prompt / first, batch * new / more)
