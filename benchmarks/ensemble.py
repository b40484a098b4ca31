"""Whether several models together tell the built-in stories better than each: losses of seeds, and of their ensembles.

python -m benchmarks.ensemble [--steps 300] [--seeds 3]        # some minutes on two cores

The models have the shape of the quickstart's and differ in their seed: initial weights, stories and their order. For
comparison the mean of their weights (`slm merge`, linear), which is no model at all where runs began apart.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import torch

from slmkit.adapt.merge_recipe import MergedModel, MergeRecipe
from slmkit.data.prepare.corpus import open_corpus
from slmkit.data.stream import DocumentRows
from slmkit.device import find_device, keep_freed_memory
from slmkit.evaluation import validation_loss
from slmkit.generation.ensemble import Ensemble
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import load_decoder
from slmkit.training.logging.metrics_log import environment
from slmkit.training.recipe.recipe import find_recipe, load_recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.context import Silence
from slmkit.workflows.merge import prepare_merge, write_merge
from slmkit.workflows.train import train_recipe

RESULTS = Path(__file__).parent / "results" / "ensemble.json"


def trained(folder: Path, seed: int, steps: int) -> RunDirectory:
    """The quickstart's model on stories alone; all seeds have the first one's tokenizer."""
    tokenizer = [f"tokenizer.path={folder / '0' / 'data' / 'tokenizer'}"] if seed else ["tokenizer.vocab_size=4096"]
    recipe = load_recipe(
        find_recipe("quickstart-stories"),
        [
            f"output_dir={folder / str(seed)}", f"seed={seed}", "model={preset: quickstart, initialization: copying}",
            f"data.documents={6 * steps}", "data.primer_documents=0", f"train.max_steps={steps}",
            "train.num_train_epochs=null", f"train.eval_steps={steps}", "train.device=cpu", "train.sample_prompts=[]",
            *tokenizer,
        ],
    )  # fmt: skip
    return train_recipe(recipe, Silence())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-output", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [trained(folder, seed, arguments.steps) for seed in range(arguments.seeds)]
        shards = open_corpus(runs[0].data).validation
        rows, cpu = DocumentRows(shards, 512), find_device("cpu", "float32")

        def loss(model: Decoder | Ensemble) -> float:
            return round(validation_loss(model, rows, cpu).loss, 4)

        models = [load_decoder(run.root / "best")[0] for run in runs]
        mean = MergeRecipe(
            merge_method="linear",
            models=[MergedModel(model=str(run.root)) for run in runs],
            output_dir=str(folder / "mean"),
        )
        found = {
            "each": [loss(model) for model in models],
            "ensembles of two": [loss(Ensemble(pair)) for pair in itertools.combinations(models, 2)],
            "ensemble of all": loss(Ensemble(models)),
            "mean of all weights": loss(load_decoder(write_merge(prepare_merge(mean)))[0]),
            "perfect model": round(shards.header.perfect_loss or 0.0, 4),
        }
    found["gain of two over the better of both"] = round(
        statistics.mean(
            min(pair) - together
            for pair, together in zip(itertools.combinations(found["each"], 2), found["ensembles of two"])
        ),
        4,
    )
    result = {
        "date": datetime.date.today().isoformat(),
        "what": f"validation loss, nats per token, after {arguments.steps} steps of 1,024 tokens, {len(runs)} seeds",
        "environment": environment(),
        "parameters": sum(p.numel() for p in models[0].parameters()),
    } | found
    print(json.dumps(result, indent=2))
    if not arguments.no_output:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
