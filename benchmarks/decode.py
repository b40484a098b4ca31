"""Greedy decoding beside transformers: the same weights, the same tokens, the same threads, in one run.

python benchmarks/decode.py            # about two minutes on two cores
"""

from __future__ import annotations

import datetime
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from slmkit.device import find_device
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.training.logging.metrics_log import environment

PROMPT, NEW, ROUNDS = 64, 64, 5
MODELS = {
    "smollm2-135m": SLMConfig.from_preset("smollm2-135m"),
    "gemma-3-270m": SLMConfig.from_preset("gemma-3-270m"),
    "quickstart": SLMConfig.from_preset("quickstart"),
}
RESULTS = Path(__file__).parent / "results" / "decode.json"


def ours(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    greedy = SamplingSettings(do_sample=False)
    return generate_ids(decoder, ids, max_new_tokens=NEW, stop_ids=set(), settings=greedy, pad_token_id=0)


def theirs(model: transformers.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW)


def seconds(run: Callable[[], torch.Tensor]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def step_at(decoder: Decoder, filled: int, room: int) -> float:
    """Median milliseconds of one step behind `filled` positions of a cache with `room`."""
    times = []
    with torch.inference_mode():
        for _ in range(30):
            cache = decoder.new_cache(1, room)
            decoder(torch.ones(1, filled, dtype=torch.long), cache)
            times.append(seconds(functools.partial(decoder, torch.ones(1, 1, dtype=torch.long), cache)))
    return round(statistics.median(times) * 1e3, 2)


def compare(config: SLMConfig) -> dict[str, object]:
    decoder = build_decoder(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        save_decoder(decoder, config, directory)
        reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None
    ids = torch.randint(config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(decoder, ids), theirs(reference, ids)), "not the same tokens"
    pairs = [(seconds(lambda: ours(decoder, ids)), seconds(lambda: theirs(reference, ids))) for _ in range(ROUNDS)]
    ratios = sorted(their / our for our, their in pairs)
    return {
        "ours_tokens_per_second": round(NEW / statistics.median(our for our, _ in pairs), 1),
        "transformers_tokens_per_second": round(NEW / statistics.median(their for _, their in pairs), 1),
        "times_as_fast": {
            "median": round(statistics.median(ratios), 2),
            "range": [round(ratios[0], 2), round(ratios[-1], 2)],
        },
    }


def main() -> None:
    result: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "what": f"batch 1, float32, prompt {PROMPT}, {NEW} new tokens, {ROUNDS} rounds in turn",
        "environment": environment() | {"transformers": version("transformers")} | find_device("cpu").describe(),
    }
    for name, config in MODELS.items():
        result[name] = compare(config)
        print(name, result[name], flush=True)
    decoder = build_decoder(SLMConfig.from_preset("quickstart", max_position_embeddings=16_384)).eval()
    result["quickstart, one step behind 64 positions, in ms"] = {
        f"room for {room}": step_at(decoder, 64, room) for room in (128, 1_024, 16_384)
    }
    print(result["quickstart, one step behind 64 positions, in ms"])
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
