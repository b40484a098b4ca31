"""Standard tasks by `EngineLM` and by lm-eval's Hugging Face backend: the same requests, weights and threads, in turn.

python -m benchmarks.evaluation MODEL --task-data FOLDER            # agreement: 200 items a task; speed: 50 items
python -m benchmarks.evaluation --random --task-data FOLDER         # a Llama of 37 M parameters, 16,384 tokens
python -m benchmarks.evaluation MODEL --task-data FOLDER --tasks gsm8k --items 0     # the speed of one task alone

Agreement: each answer of the two is compared, in float32. Speed: tokens of the requests by processor time of one
thread, since wall-clock time on a shared machine measures the others too; the Hugging Face backend with the batch size
of 1, 8, 32 and 64, in float32 and bfloat16, that is the fastest on a part of the work. Ratios are of one round; their
medians and spread of all rounds go to benchmarks/results/evaluation.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from slmkit.adapt.load import load_model
from slmkit.evaluation.harness import EngineLM
from slmkit.evaluation.tasks import load_tasks
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer

RESULTS = Path(__file__).parent / "results" / "evaluation.json"
SCORED = ["hellaswag", "arc", "piqa", "winogrande", "openbookqa", "lambada"]
GENERATED = "gsm8k"
BATCHES, DTYPES = (1, 8, 32, 64), ("float32", "bfloat16")
Requests = dict[str, list[Any]]  # of each kind of request


def requests_of(lm: EngineLM, tasks: Mapping[str, Any], items: int) -> Requests:
    """The requests that lm-eval makes of the first documents of each task."""
    found: Requests = {}
    for task in tasks.values():
        task.prepare(lm, items, 1234)
        task.build_all_requests(limit=items, rank=0, world_size=1)
        for one in task.instances:
            found.setdefault(one.request_type, []).append(one)
    return found


def random_model(folder: Path, texts: Iterator[str]) -> Path:
    tokenizer = SLMTokenizer(16_384)
    tokenizer.train(texts)
    config = SLMConfig(
        vocab_size=16_384, hidden_size=512, intermediate_size=1408, num_hidden_layers=9, num_attention_heads=8,
        max_position_embeddings=1024,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    save_decoder(build_decoder(config, seed=1), config, folder)
    return folder


def theirs_of(model: Path, batch: int, dtype: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model), device="cpu", batch_size=batch, dtype=dtype)


def answers(lm: Any, requests: Requests) -> tuple[dict[str, list[Any]], float]:
    """The answers to each kind of request, and the seconds of processor time."""
    start = time.process_time()
    found = {kind: getattr(lm, kind)(asked, disable_tqdm=True) for kind, asked in requests.items()}
    return found, time.process_time() - start


def tokens_of(lm: EngineLM, requests: Requests) -> int:
    """Tokens of contexts and continuations, each request by itself; of generation, of the prompts alone."""
    arguments = (one.args for asked in requests.values() for one in asked)
    texts = ("".join(part for part in parts if isinstance(part, str)) for parts in arguments)
    return sum(len(lm.tok_encode(text)) for text in texts)


def agreement(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    if isinstance(ours[0], str):
        return {"requests": len(ours), "same_texts": sum(a == b for a, b in zip(ours, theirs))}
    return {
        "requests": len(ours),
        "largest_difference": max(abs(a[0] - b[0]) for a, b in zip(ours, theirs)),
        "largest_relative_difference": max(abs(a[0] - b[0]) / max(1, abs(b[0])) for a, b in zip(ours, theirs)),
        "other_is_greedy": sum(a[1] != b[1] for a, b in zip(ours, theirs)),
    }


def compared(
    model: Path, data: Path, names: Sequence[str], items: int, speed_items: int, rounds: int
) -> dict[str, Any]:
    decoder, _ = load_model(model, torch.device("cpu"))
    tokenizer, result = SLMTokenizer.from_pretrained(model), {"agreement": {}, "speed": {}}
    theirs = theirs_of(model, 32, "float32")
    for name in names if items else ():
        count = min(20, items) if name == GENERATED else items
        lm = EngineLM(decoder, tokenizer, max_new_tokens=48)
        requests = requests_of(lm, load_tasks([name], data=data, shots=0), count)
        for one in requests.get("generate_until", []):
            one.arguments[1]["max_gen_toks"] = 48
        ours, _ = answers(lm, requests)
        expected, _ = answers(theirs, requests)
        result["agreement"][name] = [agreement(ours[kind], expected[kind]) for kind in requests]
        print(name, result["agreement"][name], flush=True)
    for name, shots in ((SCORED[0], 0), ("arc", 0), ("arc", 5), ("piqa", 0), ("lambada", 0), (GENERATED, 0)):
        if name not in names:
            continue
        few = 20 if name == GENERATED else speed_items
        lm = EngineLM(decoder, tokenizer, max_new_tokens=48)
        requests = requests_of(lm, load_tasks([name], data=data, shots=shots), few)
        for one in requests.get("generate_until", []):
            one.arguments[1]["max_gen_toks"] = 48
        part = {kind: asked[: max(32, len(asked) // 3)] for kind, asked in requests.items()}
        tried = {(b, d): answers(theirs_of(model, b, d), part)[1] for b in BATCHES for d in DTYPES}
        best = min(tried, key=tried.__getitem__)
        theirs, ratios = theirs_of(model, *best), []
        size, speeds = tokens_of(EngineLM(decoder, tokenizer), requests), []
        for _ in range(rounds):
            ours_seconds = answers(EngineLM(decoder, tokenizer), requests)[1]
            theirs_seconds = answers(theirs, requests)[1]
            ratios.append(theirs_seconds / ours_seconds)
            speeds.append(size / ours_seconds)
        result["speed"][f"{name}, {shots} shots"] = {
            "requests": sum(map(len, requests.values())), "tokens": size, "backend": f"batches of {best[0]}, {best[1]}",
            "tokens_per_second": statistics.median(speeds), "ratio": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
        }  # fmt: skip
        print(name, shots, result["speed"][f"{name}, {shots} shots"], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--random", action="store_true", help="a random Llama of 37 M parameters instead")
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=[*SCORED, GENERATED])
    parser.add_argument("--items", type=int, default=200, help="of each task, for agreement; 0: none")
    parser.add_argument("--speed-items", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if args.random:
            tasks = load_tasks(["hellaswag", "lambada"], data=args.task_data, shots=0)
            docs = [str(doc) for task in tasks.values() for doc in task.eval_docs]
            model = random_model(Path(folder), iter(docs))
        found = compared(model, args.task_data, args.tasks, args.items, args.speed_items, args.rounds)
    key = "random 37M" if args.random else "quickstart"
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    versions = {name: version(name) for name in ("torch", "transformers", "lm-eval")}
    before = stored.get(key, {})
    parts = {part: before.get(part, {}) | figures for part, figures in found.items()}
    stored[key] = {"date": datetime.date.today().isoformat(), "versions": versions, **parts}
    RESULTS.write_text(json.dumps(stored, indent=2) + "\n")


if __name__ == "__main__":
    main()
