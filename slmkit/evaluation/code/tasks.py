"""Code tasks of lm-eval (HumanEval, MBPP and their kin) with our sandbox in place of Hugging Face's `code_eval`.

lm-eval's prompts, stop strings and rules for taking the code out of an answer stay. `code_eval` would run the programs
with the rights of the user, in the process that also says the verdict.
"""

from __future__ import annotations

import ast
import builtins
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from math import comb
from threading import Event
from typing import Any

from slmkit.evaluation.code.sandbox import Limits, run, sandbox_kind

SAMPLES = (1, 10, 100)  # the k of pass@k
# Where an answer ends, if the text of a special token is in it.
SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|<(end_of_turn|eos|/s)>\s*$")


def pass_at_k(n: int, c: int, k: int) -> Fraction | None:
    """Probability that at least one of k samples passes, estimated without bias from n samples of which c pass.

    1 − C(n−c, k)/C(n, k) (Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1); None if n < k.
    """
    return None if n < k else 1 - Fraction(comb(n - c, k), comb(n, k))


def with_sandbox(
    task_config: Mapping[str, Any],
    *,
    unsafe: bool = False,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] = lambda done, programs: None,
) -> dict[str, Any]:
    """The configuration of a code task of lm-eval, as `load_yaml(path, resolve_func=False)` gives it, ready to run.

    The filtered answer to a request is a list, one dict a sample: `program`, `passed`, `reason`, `seconds`. The metrics
    are pass@k for k = 1, 10, 100 and the k of the configuration, up to `repeats`; without sampling pass@1 alone.
    `progress` gets the programs that have a verdict, and all of them.

    Raises `UserError` where there is no sandbox, unless `unsafe`.
    """
    sandbox, limits = sandbox_kind(unsafe), limits or Limits()
    config = dict[str, Any](_with_functions(dict(task_config)))
    filters = config.get("filter_list") or [{"name": "none", "filter": []}]
    build = next(
        (step["filter_fn"] for step in filters[0]["filter"] if "filter_fn" in step), lambda answers, docs: answers
    )
    # The prompt ends in a line with a fence. lm-eval leaves out the end of that line, and would take the first word of
    # an answer ("def") for the name of a language.
    start = "\n" if (config.get("gen_prefix") or "").endswith("```python\n") else ""
    ks = {*SAMPLES, *(k for metric in config["metric_list"] for k in metric.get("k", ()))}
    most = config.get("repeats", 1) if config.get("generation_kwargs", {}).get("do_sample") else 1
    ks = {k for k in ks if k <= most}

    def judged(answers: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """answers [document][sample] → verdicts [document][sample]"""
        programs = build([[start + SPECIAL_TOKEN.split(answer)[0] for answer in several] for several in answers], docs)
        tests = [tests_for(doc, config["doc_to_target"]) for doc in docs]
        asked = [[(program, test) for program in several] for several, test in zip(programs, tests, strict=True)]
        found = verdicts_of([pair for several in asked for pair in several], limits, unsafe, progress)
        return [[{"program": pair[0], **found[pair]} for pair in several] for several in asked]

    def values(doc: dict[str, Any], results: list[list[dict[str, Any]]]) -> dict[str, float]:
        passed = [verdict["passed"] for verdict in results[0]]
        return {f"pass@{k}": float(pass_at_k(len(passed), sum(passed), k) or 0) for k in ks if k <= len(passed)}

    return config | {
        "unsafe_code": False,  # lm-eval's word for: runs programs with no sandbox
        "filter_list": [{"name": filters[0]["name"], "filter": [{"function": "custom", "filter_fn": judged}]}],
        "process_results": values,
        "metric_list": [{"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in sorted(ks)],
        "metadata": {**(config.get("metadata") or {}), "sandbox": sandbox, "limits": asdict(limits)},
    }


def verdicts_of(
    pairs: Sequence[tuple[str, str]], limits: Limits, unsafe: bool, progress: Callable[[int, int], None]
) -> dict[tuple[str, str], dict[str, Any]]:
    """The verdict on each program and its tests, as many at a time as there are cores."""
    found, stop = dict[tuple[str, str], dict[str, Any]](), Event()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = {pair: pool.submit(run, *pair, limits, unsafe=unsafe, stop=stop) for pair in dict.fromkeys(pairs)}
        try:
            for done, (pair, verdict) in enumerate(waiting.items(), 1):
                found[pair] = asdict(verdict.result())
                progress(done, len(waiting))
        finally:
            stop.set()  # after Ctrl-C: not the rest of them
            pool.shutdown(cancel_futures=True)
    return found


def tests_for(doc: Mapping[str, Any], target: str) -> str:
    """The tests of a document as a program: its set-up, the functions that its prompt gives, and lm-eval's target."""
    from lm_eval.utils import apply_template

    parts = [*(doc.get("test_imports") or ()), doc.get("test_setup_code") or ""]
    if "entry_point" in doc:  # HumanEval's prompt: imports, helpers, and last the beginning of the function asked for
        parts += [
            ast.unparse(node)
            for node in ast.parse(doc["prompt"]).body
            if getattr(node, "name", "") != doc["entry_point"]
        ]
    hidden = {*dir(builtins), *sys.stdlib_module_names}
    asked = [getattr(node, "name", "") for node in ast.parse(doc.get("code") or "").body]
    parts += [f"from program import {name}" for name in asked if name in hidden]
    return "\n".join([*parts, apply_template(target, dict(doc))]).replace("\r", "")


def _with_functions(value: Any) -> Any:
    """`FOLDER/utils.NAME`, which stands for a function in lm-eval's task files, as that function."""
    if isinstance(value, dict):
        return {key: _with_functions(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_functions(part) for part in value]
    if not isinstance(value, str) or not re.fullmatch(r"/[^\n]*/utils\.\w+", value):
        return value
    from lm_eval.tasks._yaml_loader import _import_fun_from_str

    # The modules load `code_eval` from the hub when they are imported.
    code_eval = types.SimpleNamespace(compute=lambda **arguments: ({"pass@1": 0.0}, {}))
    before = sys.modules.get("evaluate")
    sys.modules["evaluate"] = types.ModuleType("evaluate")
    sys.modules["evaluate"].__dict__["load"] = lambda name: code_eval
    try:
        return _import_fun_from_str(value)
    finally:
        sys.modules.pop("evaluate")
        if before:
            sys.modules["evaluate"] = before
