"""Reads sources for the tests in a process of its own, in which `HF_ENDPOINT` is set before anything is imported.

One request a line on standard input, one answer a line on standard output, both JSON. Nobody really waits: neither the
clock of slmkit nor that of `huggingface_hub`, whose own tries come first.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import huggingface_hub.utils._http

from slmkit.config import UserError
from slmkit.data.sources import RetryPolicy, open_source
from slmkit.data.sources.settings import SourceSettings


class Clock:
    """Moves on when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.slept.append(seconds)


def answer(settings: dict[str, Any], start: Any, conversations: bool) -> dict[str, Any]:
    clock, said = Clock(), []
    wanted = SourceSettings(**settings)
    retries = RetryPolicy(wanted.retry_for, now=clock.now, sleep=clock.sleep, say=said.append)
    result: dict[str, Any] = {"items": [], "said": said, "slept": clock.slept, "error": None, "skipped": {}}
    try:
        source = open_source(wanted, retries=retries)
        result["files"] = [part.describe()["path"] for part in source.parts]
        items = source.read(start, "conversations" if conversations else "text")
        for item, position in items:
            result["items"].append([item if conversations else item.text, position])
        result["skipped"] = source.skipped
    except UserError as error:
        result["error"] = str(error)
    return result


if __name__ == "__main__":
    huggingface_hub.utils._http.time.sleep = lambda seconds: None
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)
