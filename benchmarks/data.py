"""Preparing and feeding text, beside `tokenizers`, `datasets` and `litdata`, in one run.

python benchmarks/data.py            # three minutes on two cores; SLMKIT_LITDATA_PYTHON names a Python with litdata
"""

from __future__ import annotations

import datetime
import json
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from benchmarks.data_peers import measure_peers
from slmkit.training.logging.metrics_log import environment
from slmkit.workflows.bench import ROUNDS, measure

RESULTS = Path(__file__).parent / "results" / "data.json"


def main() -> None:
    result: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "what": f"built-in stories, vocabulary of 4,096, rows of 1,024 tokens; {ROUNDS} rounds in turn",
        "environment": environment() | {name: version(name) for name in ("datasets", "tiktoken")},
    }
    for name, figures in chain(measure(), measure_peers()):
        result[name] = figures
        print(f"{name}: {json.dumps(figures)}", flush=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
