"""Task files that tests write, and a language model whose answers are known."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM

Row = Mapping[str, Any]


def write(path: Path, rows: list[Row] | str) -> Path:
    """A text, or rows as .jsonl, .jsonl.gz, .jsonl.zst, .json (one row) or .parquet, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zst":
        import zstandard

        path.write_bytes(zstandard.compress(text.encode()))
    else:
        path.write_text(text, "utf-8")
    return path


def by_hash(context: str, continuation: str) -> float:
    """A log-probability (nats) between −11 and −1 that depends on the texts alone."""
    return -1 - hashlib.sha256(f"{context}|{continuation}".encode()).digest()[0] / 25.6


class KnownLM(TemplateLM):
    """One token a character. Scores by a function of (context, continuation), and answers by one of the prompt."""

    context = 100_000
    max_new_tokens: int | None = None
    tokenizer_name = "characters"

    def __init__(
        self, score: Callable[[str, str], float] = by_hash, answer: Callable[[str], str] = lambda prompt: ""
    ) -> None:
        super().__init__()
        self.score, self.answer = score, answer
        self.requests: list[tuple[Any, ...]] = []

    @property
    def eot_token_id(self) -> int:
        return 0

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        return [*map(ord, string)]

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.requests += [request.args for request in requests]
        return [(self.score(*request.args), self.score(*request.args) > -2) for request in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        self.requests += [request.args for request in requests]
        return [-float(len(request.args[0])) for request in requests]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        self.requests += [request.args for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        turns = "".join(f"<{one['role']}>{one['content']}" for one in chat_history)
        return turns + "<assistant>" if add_generation_prompt else turns
