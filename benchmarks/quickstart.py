"""The quickstart as a user runs it, for several seeds: loss above a perfect model's, right answers, repetition.

    taskset -c 0 python -m benchmarks.quickstart --seeds 0 1 2    # a machine of one core
    python -m benchmarks.quickstart --seeds 0 1 2 --minutes 5     # all cores
    python -m benchmarks.quickstart --measure runs/quickstart     # one that is there

Loss: of the run on stories, over its 100 validation stories, above that of a perfect model. Questions: 400 of the
held-out split, answered word for word. Repetition: of 20 stories that are asked for by held-out pairs of hero and thing
and sampled as `slm chat` does, those with a word three times in a row or a sentence of four words or more twice. Of
3,000 stories of the generator none has either. What is measured after the run is not in its minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from slmkit.cli.show import open_model
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources import STORY_WORLDS
from slmkit.data.stories import held_out_questions, tell
from slmkit.data.stories.sentences import SENTENCE_END
from slmkit.data.stories.talk import story_request
from slmkit.data.stories.teller import random_stream
from slmkit.evaluation import ask
from slmkit.generation.chat import ChatSession
from slmkit.generation.sampling_settings import USUAL
from slmkit.training.logging.metrics_log import MetricsLog, environment
from slmkit.training.recipe.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "quickstart.json"
QUESTIONS, STORIES, LONGEST = 400, 20, 300
THRICE = re.compile(r"\b(\w+) \1 \1\b", re.IGNORECASE)
FEWEST_WORDS = 4  # of a sentence that may not be said twice: "Hic!" may


def repeats(story: str) -> bool:
    """Whether a word stands three times in a row, or a sentence of some length twice."""
    sentences = Counter(text for text in SENTENCE_END.split(story) if len(text.split()) >= FEWEST_WORDS)
    return THRICE.search(story) is not None or max(sentences.values(), default=0) > 1


def told(chat: Path, world: float) -> list[str]:
    """Stories by the chat model, sampled with its own settings."""
    found = []
    for index in range(STORIES):
        decoder, tokenizer, settings, _ = open_model(str(chat), None, "cpu", USUAL, {"seed": index})
        request = story_request(random_stream("asked for", index), tell(0, index, "heldout", world))[0]["content"]
        found.append("".join(ChatSession(decoder, tokenizer, settings, max_new_tokens=LONGEST).reply(request)))
    return found


def measure(root: Path) -> dict[str, Any]:
    """Figures of the quickstart in a folder."""
    logs = {part: MetricsLog(root / part / "metrics.jsonl").read() for part in ("primer", "stories", "chat")}
    loss = min(line["validation_loss"] for line in logs["stories"] if "validation_loss" in line)
    perfect = TokenShards.open(root / "stories" / "data" / "validation").header.perfect_loss
    assert perfect is not None
    decoder, tokenizer, *_ = open_model(str(root / "chat"), None, "cpu", USUAL, {"seed": 0})
    source = str(load_recipe(root / "stories" / "recipe.yaml").data.source)
    world = STORY_WORLDS[source]
    answers = ask(decoder, tokenizer, held_out_questions(QUESTIONS, world=world))
    stories = told(root / "chat", world)
    return {
        "source": source,
        "steps": {part: lines[-1]["step"] for part, lines in logs.items()},
        "loss": round(loss, 4),
        "above": round(loss / perfect - 1, 4),
        "right": round(answers.share_right, 4),
        "repeating": sum(map(repeats, stories)),
        "stories": stories[:3],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--measure", type=Path, help="a folder of runs that is there already")
    parser.add_argument("--keep", type=Path, help="where the runs are written; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure), indent=2))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory() as temporary:
        for seed in arguments.seeds:
            root = (arguments.keep or Path(temporary)) / f"cores-{cores}-seed-{seed}"
            command = [sys.executable, "-m", "slmkit", "quickstart", "-o", root, "--seed", seed]
            began = time.monotonic()
            subprocess.run([*map(str, command), "--minutes", str(arguments.minutes)], check=True)
            taken = round(time.monotonic() - began)
            row = {"seed": seed, "cores": cores, "minutes": arguments.minutes, "seconds": taken} | measure(root)
            print(json.dumps(row), flush=True)
            found = json.loads(arguments.output.read_text()) if arguments.output.is_file() else []
            row |= {"date": datetime.date.today().isoformat(), "torch": torch.__version__} | environment()
            arguments.output.write_text(json.dumps([*found, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
