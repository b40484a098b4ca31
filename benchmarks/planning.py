"""What was foretold of a run's memory and what it took, for every objective: `plan.json` of short real runs.

python -m benchmarks.planning            # some ten minutes on two cores
python -m benchmarks.planning --smoke    # two minutes, at a size that says nothing

A base and a teacher are made first; then each run is a process of its own, as `slm train` starts it, on stories, talks
and questions that are made up. Memory is the most that the process held. What it held before training, which is the
interpreter and its libraries, is taken off all figures: `counted` by arithmetic before the first step, `predicted` once
some steps were seen, and `real` at the end.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from slmkit.device import find_device
from slmkit.training.logging.metrics_log import environment

RESULTS = Path(__file__).parent / "results" / "planning.json"
STORIES = {"data.source": "stories", "data.documents": 300, "data.validation_documents": 20}
SUMS = {"data.source": "sums", "data.documents": 400, "data.validation_documents": 32}
ADAPTER = {"objective": "sft", "model.path": "BASE", "lora.r": 16, **STORIES}
TAUGHT = {"objective": "distill", "distillation.teacher": "TEACHER", "distillation.temperature": 1.0, **STORIES}
GRPO = {
    "objective": "grpo", "model.path": "BASE", "grpo.prompts_per_step": 16, "grpo.num_generations": 8,
    "grpo.max_new_tokens": 24, "grpo.reward": "number", **SUMS,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "pretrain": {**STORIES, "tokenizer.vocab_size": 4_096},
    "fine-tuning": {"objective": "sft", "model.path": "BASE", **STORIES},
    "LoRA": ADAPTER,
    "LoRA, base in nf4": ADAPTER | {"lora.base_weights": "nf4"},
    "distill, teacher in memory": TAUGHT,
    "distill, hidden states too": TAUGHT | {"distillation.hidden_weight": 1.0},
    "distill, stored": TAUGHT | {"distillation.cache": "CACHE"},
    "dpo": {"objective": "dpo", "model.path": "BASE", **STORIES},
    "grpo": GRPO,
    "grpo, beta 0.04": GRPO | {"grpo.beta": 0.04},
}
# Of base, student and teacher; rows of a step.
WHOLE = {"width": 320, "depth": 6, "teacher": 640, "length": 256, "rows": 16, "steps": 12}
SMOKE = {"width": 64, "depth": 2, "teacher": 128, "length": 256, "rows": 4, "steps": 12}


def shape(width: int, depth: int, length: int) -> dict[str, Any]:
    sizes = {
        "hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": depth,
        "num_attention_heads": width // 32, "max_position_embeddings": length,
    }  # fmt: skip
    return {f"model.{name}": value for name, value in sizes.items()}


def slm(command: str, folder: Path, values: dict[str, Any]) -> None:
    recipe = folder / "empty.yaml"
    recipe.write_text("{}\n")
    overrides = [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in values.items()]
    ran = subprocess.run(
        [sys.executable, "-m", "slmkit.cli", command, str(recipe), *overrides], capture_output=True, text=True
    )
    if ran.returncode:
        raise SystemExit(f"{values}: {ran.stderr}")


def measure(name: str, folder: Path, size: dict[str, int]) -> dict[str, Any]:
    """A run of this kind, and what its plan.json says."""
    root = folder / name.replace(" ", "-").replace(",", "")
    places = {"BASE": str(folder / "base"), "TEACHER": str(folder / "teacher"), "CACHE": str(folder / "cache")}
    values: dict[str, Any] = {
        "train.sequence_length": size["length"], "train.tokens_per_step": size["rows"] * size["length"],
        "train.max_steps": size["steps"], "train.eval_steps": size["steps"] // 2, "train.sample_tokens": 8,
    }  # fmt: skip
    values |= RUNS[name]
    if "model.path" not in values:
        values |= shape(size["width"], size["depth"], size["length"])
    values = {key: places.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    if "distillation.cache" in values:
        slm("distill-cache", folder, values)
    slm("train", folder, values | {"output_dir": str(root)})
    plan = json.loads((root / "plan.json").read_text())
    held = plan["memory_before_bytes"]
    predicted, real = plan["predicted"], plan["real"]
    counted, said, came = (
        size - held for size in (plan["counted_memory_bytes"], predicted["memory_bytes"], real["memory_bytes"])
    )
    return {
        "counted_bytes": counted,
        "predicted_bytes": said,
        "real_bytes": came,
        "counted_ratio": round(counted / came, 3),
        "predicted_ratio": round(said / came, 3),
        "held_before_bytes": held,
        "probed_bytes": plan["probe"]["memory_bytes"] - held,
        "predicted_disk_bytes": predicted["disk_bytes"],
        "real_disk_bytes": real["disk_bytes"],
    }


def main() -> None:
    is_smoke = "--smoke" in sys.argv
    size, found = SMOKE if is_smoke else WHOLE, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, width in (("base", size["width"]), ("teacher", size["teacher"])):
            made = {**STORIES, **shape(width, size["depth"], size["length"]), "tokenizer.vocab_size": 4_096}
            made |= {"train.max_steps": 2, "train.sample_tokens": 8}
            slm("train", folder, made | {"output_dir": str(folder / model)})
        for kind in RUNS:
            if len(sys.argv) > 2 and kind not in sys.argv[2:]:
                continue
            found[kind] = measure(kind, folder, size)
            line = found[kind]
            counted, said, came = (line[f"{what}_bytes"] / 2**20 for what in ("counted", "predicted", "real"))
            print(
                f"{kind:<28} counted {counted:7,.0f} MiB ({counted / came:.2f})   predicted {said:7,.0f} MiB "
                f"({said / came:.2f})   real {came:7,.0f} MiB",
                flush=True,
            )
    if not is_smoke:
        content = {"date": f"{datetime.date.today()}", "size": size, **environment(), **find_device().describe()}
        RESULTS.write_text(json.dumps(content | {"runs": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
