"""The work of `slmkit/workflows/bench.py` by `datasets`, `transformers` and `litdata`, where they are installed.

litdata pins packages that may not go with these: SLMKIT_LITDATA_PYTHON names an interpreter that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.tokenizer import SLMTokenizer
from slmkit.workflows.bench import ROW, ROWS, corpus, loading_speed, seconds, talks_of

Result = dict[str, Any]

LITDATA = """
import json, os, sys, time
import numpy, torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

tokens, folder, row, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def parts(_):
    yield torch.from_numpy(numpy.fromfile(tokens, dtype="uint16").astype("int32"))

if __name__ == "__main__":
    optimize(parts, [0], folder, num_workers=1, chunk_bytes="64MB", item_loader=TokensLoader())
    data = StreamingDataset(folder, item_loader=TokensLoader(block_size=row + 1), shuffle=True, drop_last=True)
    best = 0
    for _ in range(3):
        seen, started = 0, time.perf_counter()
        for batch in StreamingDataLoader(data, batch_size=rows, num_workers=0):
            seen += batch[:, :-1].long().numel() + 0 * batch[:, 1:].long().numel()
        best = max(best, seen / (time.perf_counter() - started))
    print("RESULT", json.dumps({"M tokens/s": round(best / 1e6, 2)}))
"""

MASKED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


def measure_peers(megabytes: float = 20) -> Iterator[tuple[str, Result]]:
    """Each peer's figures by its name, or the reason why there are none; ours on the same text stand beside."""
    texts, tokenizer = corpus(megabytes)
    with tempfile.TemporaryDirectory(prefix="slmkit-bench-") as name:
        folder = Path(name)
        prepared = seconds(lambda: prepare_text(texts, tokenizer, folder / "shards"))
        size = sum(map(len, texts)) / 1e6
        ours = round(loading_speed(folder / "shards")["M tokens/s"], 1)
        yield "slmkit", {"preparation MB/s": round(size / prepared, 2), "loading M tokens/s": ours}
        yield "datasets.map and DataLoader", _datasets(texts, tokenizer, folder, size)
        yield "litdata", _litdata(folder)
        yield "conversations by datasets.map", _conversations(texts, tokenizer, folder)


def plain_tokenizer(tokenizer: SLMTokenizer) -> Tokenizer:
    """The same vocabulary as a tokenizer of the `tokenizers` library."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return Tokenizer.from_file(f"{folder}/tokenizer.json")


def _datasets(texts: list[str], tokenizer: SLMTokenizer, folder: Path, size: float) -> Result:
    try:
        import datasets
        from torch.utils.data import DataLoader
    except ImportError:
        return {"skipped": "pip install datasets"}
    datasets.disable_progress_bars()
    plain = plain_tokenizer(tokenizer)

    def packed(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        encoded = plain.encode_batch(rows["text"], add_special_tokens=False)
        ids = list(chain.from_iterable([*one.ids, 0] for one in encoded))
        return {"ids": [ids[start : start + ROW + 1] for start in range(0, len(ids) - ROW, ROW)]}

    source = datasets.Dataset.from_dict({"text": texts})
    prepared = {}

    def prepare() -> None:
        prepared["rows"] = source.map(
            packed, batched=True, remove_columns=["text"], num_proc=os.cpu_count(),
            cache_file_name=str(folder / "map.arrow"),
        )  # fmt: skip

    taken = seconds(prepare)
    loader = DataLoader(prepared["rows"].with_format("torch"), batch_size=ROWS, shuffle=True, drop_last=True)
    tokens = 0

    def load() -> None:
        nonlocal tokens
        for batch in loader:
            tokens += batch["ids"][:, :-1].numel()

    loaded = seconds(load)
    return {"preparation MB/s": round(size / taken, 2), "loading M tokens/s": round(tokens / loaded / 1e6, 2)}


def _conversations(texts: list[str], tokenizer: SLMTokenizer, folder: Path) -> Result:
    """As `trl` has them tokenized: by `transformers`, with the mask that `{% generation %}` in the template gives."""
    try:
        import datasets
        from transformers import AutoTokenizer
    except ImportError:
        return {"skipped": "pip install datasets transformers"}
    datasets.disable_progress_bars()
    talks = talks_of(texts)
    size = sum(len(message["content"]) for talk in talks for message in talk) / 1e6
    tokenizer.save_pretrained(folder / "tokenizer")
    theirs: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    theirs.chat_template = MASKED_CHATML

    def tokenized(row: dict[str, Any]) -> dict[str, Any]:
        return {**theirs.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)}

    source, kept = datasets.Dataset.from_dict({"messages": talks}), str(folder / "talks.arrow")
    taken = seconds(lambda: source.map(tokenized, num_proc=os.cpu_count(), cache_file_name=kept))
    prepared = seconds(lambda: prepare_chat(talks, tokenizer, folder / "chat"))
    return {
        "conversations/s": round(len(talks) / taken),
        "MB/s": round(size / taken, 2),
        "slmkit conversations/s": round(len(talks) / prepared),
        "slmkit MB/s": round(size / prepared, 2),
    }


def _litdata(folder: Path) -> Result:
    interpreter = os.environ.get("SLMKIT_LITDATA_PYTHON")
    if not interpreter:
        return {"skipped": "SLMKIT_LITDATA_PYTHON names no interpreter that has litdata"}
    script = folder / "with_litdata.py"
    script.write_text(LITDATA)
    tokens = folder / "shards" / "00000.tokens"
    command = [interpreter, str(script), str(tokens), str(folder / "lit"), str(ROW), str(ROWS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, env=_without_our_path())
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"skipped": " ".join(done.stderr.split())[-300:]}
    return {"loading " + name: value for name, value in json.loads(lines[-1].removeprefix("RESULT ")).items()}


def _without_our_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
