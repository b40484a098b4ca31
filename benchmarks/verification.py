"""`slm verify` of a model of each family, as the tables of docs/export.md.

    python -m benchmarks.verification [MODEL] [--only NAME]

The families' models are small and random, with weights large enough for order and positions to matter, and contexts
that go past their windows and past the context that RoPE was made for. MODEL is a trained one, as `slm quickstart` has.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import tempfile
from pathlib import Path
from typing import Any

from slmkit.workflows.export import Verdict, verify
from tests.export.small_model import write_small

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
BEGIN, END = "<!-- verified: made by benchmarks/verification.py -->", "<!-- /verified -->"
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT-2": {
        "model_type": "gpt2", "intermediate_size": 256, "num_key_value_heads": 4, "rope_parameters": PLAIN,
        "tie_word_embeddings": True,
    },
    "Llama, `llama3` scaling (context of 64 made 192)": {},
    "Gemma 3, window of 32, read at 192": {
        "model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16,
        "sliding_window": 32, "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": PLAIN | {"rope_theta": 1e6}, "sliding_attention": PLAIN,
        },
    },
    "Qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_parameters": PLAIN},
    "OLMo 2": {"model_type": "olmo2", "rope_parameters": PLAIN},
    "SmolLM3": {"model_type": "smollm3", "num_hidden_layers": 4, "rope_parameters": PLAIN},
}  # fmt: skip


def table(verdicts: list[Verdict]) -> str:
    """A table in Markdown, and a line for each runtime that was not compared."""
    lines = [
        "| runtime | weights | MB | ids | prompts | nats apart | divergence | greedy | tokens/s | |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    left_out = []
    for one in verdicts:
        if one.parity is None:
            left_out.append(f"- {one.runtime} {one.kind}: {one.problem}")
            continue
        ids, chats, _, predicted, greedy, *_ = one.parity.checks.values()
        same = (f"{each['compared'] - each['different']:,}/{each['compared']:,}" for each in (ids, chats))
        apart = (f"{predicted[name]:.2g}" for name in ("max_abs", "mean_kl"))
        cells = [
            one.runtime, one.kind, f"{one.parity.size / 1e6:,.1f}", *same, *apart,
            f"{greedy['equal']}/{greedy['compared']}", f"{one.parity.tokens_per_second:,.0f}",
            "**differs**" if one.is_wrong else "same",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
        left_out += [f"- {one.runtime} {one.kind}: {one.problem}"] if one.problem else []
    return "\n".join([*lines, *([""] if left_out else []), *left_out]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a trained model, such as runs/quickstart/chat")
    parser.add_argument("--only", default="", help="part of the name of the families to verify")
    parser.add_argument("--output", help="a file for the tables; default: their place in docs/export.md")
    options = parser.parse_args()
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        models = {"The chat model of `slm quickstart`": options.model} if options.model else {}
        for number, (name, changes) in enumerate(FAMILIES.items()):
            if options.only.lower() in name.lower():
                models[name] = str(write_small(Path(scratch, str(number)), **changes))
        for name, model in models.items():
            print(name, flush=True)
            parts.append(f"### {name}\n\n{table(verify(model, say=print))}")
            print(parts[-1], flush=True)
    packages = ("torch", "transformers", "xllamacpp", "onnxruntime", "mlx-lm", "playwright")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    text = "\n".join([*parts, f"Versions: {versions}.\n"])
    if options.output:
        Path(options.output).write_text(text, encoding="utf-8")
        return
    page = PAGE.read_text(encoding="utf-8")
    whole = f"{BEGIN}\n\n{text}\n{END}"
    PAGE.write_text(
        re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: whole, page, flags=re.DOTALL), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
