"""DPO and GRPO from small models that talk: how many held-out questions they answer rightly before and after.

python -m benchmarks.preference                             # sums, three seeds
python -m benchmarks.preference --chat runs/quickstart/chat # and stories, from what `slm quickstart` made
python -m benchmarks.preference --smoke                     # everything once, at a size that teaches nothing
python -m benchmarks.preference --draw docs/preference.png  # only the plot, of what was measured

Of sums one model is fine-tuned from nothing, until it answers some of them; every seed then goes on from that model,
or from the one given, by pairs (a right answer and a wrong one that is near it: `dpo`, and `rpo`, which learns the
right answer itself besides) and by rewards (1 for the right answer, word for word). What is answered are questions that
no training meets: a tenth of all sums is held out; stories are of another seed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs import Quiet
from slmkit.data.sources import BUILT_IN
from slmkit.files.find import find_model_directory
from slmkit.model.files.directory import load_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.logging.metrics_log import environment
from slmkit.training.recipe.recipe import Recipe
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.grpo import AnswerSampler
from slmkit.workflows.train import train_recipe

RESULTS = Path(__file__).parent / "results" / "preference.json"
HELD_OUT = 1_000_003  # the seed of the stream that questions for the table come from
SHAPE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3}
TRAIN = {
    "device": "cpu", "precision": "float32", "weight_decay": 0.0, "logging_steps": 1, "sample_prompts": [],
}  # fmt: skip
# Rewards are noisy: both of Adam's moments are taken over many steps, so that what is noise moves little.
NOISY = {"adam_beta1": 0.97, "adam_beta2": 0.999}
PARTS: dict[str, dict[str, Any]] = {
    "sums": {
        "length": 48, "new": 6, "questions": 300,
        "sft": {"steps": 600, "documents": 8_000, "learning_rate": 2e-3, "tokens": 2_048},
        "dpo": {"steps": 60, "documents": 2_000, "learning_rate": 1e-5, "tokens": 64 * 48},
        "rpo": {"steps": 60, "documents": 2_000, "learning_rate": 5e-5, "tokens": 64 * 48},
        "grpo": {"steps": 200, "documents": 8_000, "learning_rate": 1e-4, "prompts": 32},
    },
    "stories": {
        "length": 256, "new": 16, "questions": 300,
        "dpo": {"steps": 40, "documents": 1_000, "learning_rate": 1e-5, "tokens": 32 * 256},
        "rpo": {"steps": 40, "documents": 1_000, "learning_rate": 5e-5, "tokens": 32 * 256},
        "grpo": {"steps": 150, "documents": 8_000, "learning_rate": 1.5e-4, "prompts": 32},
    },
}  # fmt: skip


def run(part: str, stage: str, seed: int, root: Path, base: str | None, smoke: bool) -> RunDirectory:
    """One run of a part, from the model `base` or from nothing."""
    about, plan = PARTS[part], PARTS[part][stage]
    steps = 2 if smoke else plan["steps"]
    train = TRAIN | {
        "sequence_length": about["length"], "max_steps": steps, "eval_steps": max(1, steps // 5),
        "learning_rate": plan["learning_rate"], "warmup_ratio": 0.05,
    }  # fmt: skip
    recipe: dict[str, Any] = {
        "objective": "dpo" if stage == "rpo" else stage, "seed": seed, "train": train,
        "output_dir": str(root / f"{part}-{stage}-{seed}"),
        "data": {
            "source": part, "documents": 40 if smoke else plan["documents"],
            "validation_documents": 10 if smoke else about["questions"],
        },
    }  # fmt: skip
    if base is None:
        recipe["model"] = SHAPE | {"max_position_embeddings": about["length"]}
        recipe["tokenizer"] = {"vocab_size": 300}
    else:
        recipe["model"] = {"path": base}
    if stage == "grpo":
        train |= NOISY
        recipe["grpo"] = {"prompts_per_step": plan["prompts"], "num_generations": 8, "max_new_tokens": about["new"]}
    else:
        train["tokens_per_step"] = plan["tokens"]
    if stage == "rpo":
        recipe["preference"] = {"rpo_alpha": 1.0}
    return train_recipe(Recipe.model_validate(recipe), Quiet(), force=True)


def shares_right(part: str, model_path: str | Path, smoke: bool) -> tuple[float, float]:
    """Of held-out questions, how many a model answers rightly: by the likeliest tokens, and of four sampled answers."""
    directory = find_model_directory(model_path)
    model, tokenizer = load_decoder(directory)[0], SLMTokenizer.from_pretrained(directory)
    count = 10 if smoke else PARTS[part]["questions"]
    asked = [BUILT_IN[part].item("questions", HELD_OUT + 1, index, True) for index in range(count)]
    prompts = [tokenizer.encode_chat(messages[:-1], add_generation_prompt=True).ids for messages in asked]
    room = model.architecture.max_positions - PARTS[part]["new"]
    fitting = [(torch.tensor(p).numpy(), m[-1]["content"]) for p, m in zip(prompts, asked) if len(p) <= room]

    def share(temperature: float, answers_each: int) -> float:
        sampler = AnswerSampler(tokenizer, PARTS[part]["new"], temperature)
        answers = sampler(model, [prompt for prompt, _ in fitting], answers_each, seed=0)
        said = [tokenizer.decode(answer.tolist(), skip_special_tokens=True).strip() for answer in answers]
        known = [right for _, right in fitting for _ in range(answers_each)]
        return sum(a == right for a, right in zip(said, known)) / (count * answers_each)

    return share(0.0, 1), share(1.0, 4)


def measure(part: str, seeds: int, root: Path, base: str | None, smoke: bool) -> dict[str, Any]:
    """A part's table and curves."""
    started = time.perf_counter()
    base = base or str(run(part, "sft", 0, root, None, smoke).latest)
    greedy, sampled = shares_right(part, base, smoke)
    found: dict[str, Any] = {"before": greedy, "before_sampled": sampled, "seeds": seeds}
    print(f"{part}: {greedy:.3f} right before, {sampled:.3f} of sampled answers", flush=True)
    curves = {"dpo": "rewards/accuracy", "rpo": "rewards/accuracy", "grpo": "answers/right"}
    for stage, figure in curves.items():
        shares, samples, lines = [], [], []
        for seed in range(1, seeds + 1):
            began = time.perf_counter()
            made = run(part, stage, seed, root, base, smoke)
            greedy, sampled = shares_right(part, made.latest, smoke)
            shares.append(greedy)
            samples.append(sampled)
            lines.append(made.metrics.read())
            took = time.perf_counter() - began
            print(f"{part}: {stage}, seed {seed}: {greedy:.3f}, sampled {sampled:.3f} ({took:.0f} s)", flush=True)
        held_out = "validation/right" if stage == "grpo" else "validation/rewards/accuracy"
        found[stage] = {
            "right": shares,
            "sampled_right": samples,
            "mean": statistics.mean(shares),
            "deviation": statistics.stdev(shares) if seeds > 1 else None,
            "curves": [[[line["step"], round(line[figure], 4)] for line in each] for each in lines],
            "validation": [[[line["step"], line[held_out]] for line in each if held_out in line] for each in lines],
        }
    return found | {"seconds": round(time.perf_counter() - started)}


def draw(results: dict[str, Any], path: Path) -> None:
    """Shares over steps: of right answers with GRPO, of pairs told apart with DPO."""
    from matplotlib.figure import Figure

    parts = results["parts"]
    figure = Figure(figsize=(12, 3.2 * len(parts)), layout="constrained")
    rows, told_apart = figure.subplots(len(parts), 3, squeeze=False), "pairs told apart"
    shown = {
        "grpo": ("GRPO", "right answers"), "dpo": ("DPO", told_apart), "rpo": ("DPO and the better answer", told_apart),
    }  # fmt: skip
    for row, (part, found) in zip(rows, parts.items()):
        for axes, (stage, (title, what)) in zip(row, shown.items()):
            for number, (curve, seen) in enumerate(zip(found[stage]["curves"], found[stage]["validation"])):
                steps, shares = zip(*curve)
                window = max(1, len(shares) // 15)
                smooth = [statistics.mean(shares[max(0, i - window) : i + 1]) for i in range(len(shares))]
                axes.plot(steps, smooth, color=f"C{number}", alpha=0.6, linewidth=1)
                axes.plot(*zip(*seen), color=f"C{number}", marker="o", markersize=3, linewidth=1.5)
            if stage == "grpo":
                axes.axhline(found["before"], color="grey", linestyle="--", linewidth=1)
            axes.set(title=f"{title}, {part}", xlabel="steps", ylabel=f"share of {what}", ylim=(-0.02, 1.02))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    figure.suptitle("a colour a seed; thin: training, marked: held out, dashed: before", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", help="a model that talks about stories, such as runs/quickstart/chat")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(arguments.output.read_text()), arguments.draw)
        return
    torch.set_num_threads(arguments.threads)
    bases = {"sums": None} | ({"stories": arguments.chat} if arguments.chat else {})
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "machine": environment(), "threads": arguments.threads,
        "recipe": {"shape": SHAPE, **{part: PARTS[part] for part in bases}}, "parts": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for part, base in bases.items():
            seeds = 1 if arguments.smoke else arguments.seeds
            results["parts"][part] = measure(part, seeds, Path(folder), base, arguments.smoke)
    for part, found in results["parts"].items():
        row = [f"{part}: before {found['before']:.3f}"]
        for stage in ("dpo", "rpo", "grpo"):
            spread = found[stage]["deviation"]
            row.append(f"{stage} {found[stage]['mean']:.3f}" + (f" ± {spread:.3f}" if spread is not None else ""))
        print(", ".join(row))
    if not arguments.smoke:
        arguments.output.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
