"""The recipes' learning rates, tried on models of their kind that are narrow and shallow enough for two cores.

python -m benchmarks.learning_rates             # twenty minutes on one core
python -m benchmarks.learning_rates --smoke     # everything once; nothing is written

Each preset's family, optimizer, schedule, betas, clipping, dropout and weight decay, at two widths, four layers deep,
over the built-in stories; the warm-up is a tenth. What it can tell: whether a recipe's rate is one that learns, how far
the best is from it, and which way the best moves with the width. What it cannot: the best rate of the whole size over
billions of tokens, which is lower, since short runs and small models like high rates.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path

import torch

from benchmarks.tokens_to_loss import LENGTH, VOCABULARY, First, Quiet
from slmkit.data.prepare.corpus import Corpus, DataSettings, TokenizerSettings, build_corpus
from slmkit.data.stream import DocumentRows, PretrainRows, Stream
from slmkit.device import find_device, keep_freed_memory
from slmkit.evaluation import validation_loss
from slmkit.model.config import SLMConfig
from slmkit.model.initialization import build_decoder
from slmkit.training.fit import make_plan
from slmkit.training.logging.metrics_log import environment
from slmkit.training.loop import State, train
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import make_optimizers
from slmkit.training.recipe.recipe import find_recipe, load_recipe

RESULTS = Path(__file__).parent / "results" / "learning_rates.json"
TOKENS_PER_STEP, VALIDATION_ROWS = 2_048, 32
WIDTHS, DEPTH, HEAD = (128, 256), 4, 64
ADAMW = (3e-4, 1e-3, 3e-3, 1e-2)
RATES = {"vector-slm": ADAMW, "vector-clm-50m": (0.005, 0.01, 0.02, 0.04), "gemma-3-270m": ADAMW, "smallm-60m": ADAMW}


def shape_of(preset: str, width: int) -> SLMConfig:
    """The preset, narrow and shallow, with a small vocabulary. A Gemma keeps its four heads, wider than the model."""
    published = SLMConfig.from_preset(preset)
    heads = 4 if published.model_type == "gemma3_text" else width // HEAD
    changes = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": DEPTH, "num_attention_heads": heads,
        "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if published.model_type != "gpt2":
        changes |= {"intermediate_size": width * 3, "num_key_value_heads": max(1, heads // 4)}
    if published.model_type == "gemma3_text":
        changes |= {"head_dim": HEAD, "sliding_window": LENGTH // 2, "layer_types": None}
    return SLMConfig.from_preset(preset, **changes)


def loss_at(preset: str, width: int, rate: float, corpus: Corpus, steps: int) -> float:
    """The validation loss after so many steps from fresh weights."""
    device = find_device("cpu")
    settings = load_recipe(find_recipe(preset)).train
    name = "muon_learning_rate" if settings.optimizer == "muon" else "learning_rate"
    settings = settings.model_copy(
        update={
            "sequence_length": LENGTH, "tokens_per_step": TOKENS_PER_STEP, "micro_batch_tokens": TOKENS_PER_STEP,
            "max_steps": steps, "max_tokens": None, "warmup_ratio": 0.1, "precision": "auto", name: rate,
        }
    )  # fmt: skip
    model = build_decoder(shape_of(preset, width), seed=0)
    rows = PretrainRows(corpus.train[0], LENGTH)
    plan = make_plan(settings, rows.rows_in_epoch, LENGTH, device)
    state = State(model, make_optimizers(model, settings, device))
    train(state, next_token, Stream(rows, settings.rows_per_step(LENGTH), 0), plan)
    return validation_loss(model, First(DocumentRows(corpus.validation, LENGTH), VALIDATION_ROWS), device).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    steps, found = 2 if arguments.smoke else arguments.steps, dict[str, dict[str, dict[str, float]]]()
    with tempfile.TemporaryDirectory() as folder:
        data = DataSettings(source="stories", documents=2_000, validation_documents=200)
        corpus = build_corpus("text", data, TokenizerSettings(vocab_size=VOCABULARY), 0, Path(folder), None, Quiet())
        for preset, rates in RATES.items():
            found[preset] = {}
            for width in WIDTHS:
                losses = {str(rate): round(loss_at(preset, width, rate, corpus, steps), 4) for rate in rates}
                found[preset][str(width)] = losses
                print(preset, width, losses, flush=True)
                content = {
                    "date": datetime.date.today().isoformat(), "environment": environment(),
                    "steps": steps, "tokens_per_step": TOKENS_PER_STEP, "depth": DEPTH, "validation_loss": found,
                }  # fmt: skip
                if not arguments.smoke:
                    RESULTS.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
