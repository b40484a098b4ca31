"""The self-test of exact-match and code tasks: a right answer must score 100 %, a wrong one 0 %.

Both go where a model's answers go: the same prompts, stop strings, filters, normalisation and sandbox. A task that
fails (a filter that never matches, a template that cuts the answer, a sandbox that fails every program) would give a
figure that says nothing about the model. It imports lm-eval: import it where it is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text

from slmkit.config import UserError
from slmkit.evaluation.answers import expected_answers, normalised, only_number
from slmkit.evaluation.results import TaskResult

TESTED = re.compile(r"(exact_match|number|math_verify|pass@\d+)(,.*)?")  # metrics that a right answer has 1 in
# Forms of an answer. The first that the task reads right is used: `solution` is what the data have as one.
FORMS = (
    "{solution}", "{target}", "{solution}\nThe answer is {target}.", "{solution}\nThe final answer is {target}",
    "{solution}\nFinal Answer: The final answer is ${target}$. I hope it is correct.", "({target})",
    "\\boxed{{{target}}}",
    "```python\n{solution}\n```", "\n{solution}\n```",
)  # fmt: skip
_passed: set[str] = set()


class StoredAnswers(LM):
    """An lm-eval `LM` that gives the right answers of `tasks`, or plausible wrong ones of the same form.

    `like`: the model whose tokens, context, chat template and special tokens decide about prompts; None: any length.
    Only generation is answered: raises `UserError` for other tasks.
    """

    max_new_tokens, context, max_length, tokenizer, tokenizer_name = None, 1 << 40, 1 << 40, None, "bytes"

    def __init__(self, tasks: Mapping[str, Any], *, right: bool, like: Any = None) -> None:
        super().__init__()
        self.tasks, self.right = {task.config.task: task for task in tasks.values()}, right
        self.forms, self.targets = dict[str, str](), dict[str, list[str]]()
        for name in ("max_new_tokens", "context", "max_length", "tokenizer", "tok_encode", "apply_chat_template"):
            if hasattr(like, name):
                setattr(self, name, getattr(like, name))

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return [*text.encode()]

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in chat_history)

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        return [cut(self.answer(request.task_name, request.doc), request.args[1]) for request in requests]

    def loglikelihood(self, requests: list[Instance], **_: Any) -> Any:
        raise UserError(f"{requests[0].task_name}: stored answers are for exact-match and code tasks only")

    loglikelihood_rolling = loglikelihood

    def answer(self, name: str, doc: Mapping[str, Any]) -> str:
        """The stored answer to a document of a task."""
        task = self.tasks[name]
        if name not in self.forms:
            options = task.config.generation_kwargs
            read = (form for form in FORMS if reads(task, doc, cut(form.format(**stored(task, doc)), options)))
            self.forms[name] = next(read, FORMS[0])
        facts = stored(task, doc)
        return self.forms[name].format(**facts if self.right else self._wrong(name, doc, facts))

    def _wrong(self, name: str, doc: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, str]:
        solution, target, task = facts["solution"], facts["target"], self.tasks[name]
        if is_code(doc):
            names = re.findall(r"^def (\w+)", solution, re.MULTILINE)
            bodies = [f"def {name}(*values, **named):\n    return None" for name in names]
            return {"solution": "\n".join(bodies) or "    return None\n", "target": ""}
        if (number := only_number(target)) is not None:
            wrong = str(number + 1 if number.denominator == 1 else number + Fraction(1, 2))
        else:
            if name not in self.targets:
                self.targets[name] = [stored(task, other)["target"] for _, other in zip(range(100), task.eval_docs)]
            accepted = {normalised(one) for one in expected_answers(task, doc)}
            wrong = next((other for other in self.targets[name] if normalised(other) not in accepted), f"{target} not")
        before, found, after = solution.rpartition(target)
        return {"solution": f"{before}{wrong}{after}" if found else wrong, "target": wrong}


def cut(answer: str, options: Mapping[str, Any] | None) -> str:
    """`answer` up to the first stop string."""
    return postprocess_generated_text(answer, (options or {}).get("until") or [], None)


def is_code(doc: Mapping[str, Any]) -> bool:
    return "canonical_solution" in doc or ("code" in doc and "test_list" in doc)


def stored(task: Any, doc: Mapping[str, Any]) -> dict[str, str]:
    """The right answer that the data of a document have: a whole solution, and what is to be found in it."""
    target = expected_answers(task, doc)[0]
    if is_code(doc):
        return {"target": target, "solution": doc.get("canonical_solution") or doc["code"]}
    solutions = (doc.get("solution"), doc.get("answer"), target)
    return {"target": target, "solution": next(one for one in solutions if isinstance(one, str) and target in one)}


def reads(task: Any, doc: Mapping[str, Any], answer: str) -> bool:
    """Whether every filter of the task finds the answer right."""
    asked = Instance("generate_until", dict(doc), ("", {}), 0, (task.config.task, 0, 1), resps=[answer])
    for one in task._filters:
        one.apply([asked])
    values = [task.process_results(doc, [found]) for found in asked.filtered_resps.values()]
    return all(value == 1 for each in values for metric, value in each.items() if TESTED.fullmatch(metric))


def self_test(
    tasks: Mapping[str, Any], run: Callable[[LM, Mapping[str, Any]], Sequence[TaskResult]], like: Any, recipe: str = ""
) -> None:
    """Refuse tasks whose right answers do not all score 1, or whose wrong ones do not all score 0.

    `run` gives the results of an `LM` on tasks, over all the documents that will be evaluated. `like`: the model to be
    evaluated; it is not asked anything. `recipe`: what else the outcome depends on; with the task's configuration and
    data the key by which a passed test is not repeated in this process. Raises `UserError` with the first document.
    """
    for name, task in tasks.items():
        key = repr((task.dump_config(), getattr(task, "about", None), recipe, getattr(like, "max_new_tokens", None)))
        tested = any(TESTED.fullmatch(metric) for metric in task._metric_fn_list)
        if task.OUTPUT_TYPE != "generate_until" or not tested or key in _passed:
            continue
        for kind in ("right", "wrong"):
            for result in run(StoredAnswers(tasks, right=kind == "right", like=like), {name: task}):
                if failed := first_failure(result, int(kind == "right")):
                    why = f"this recipe cannot measure it: the {kind} answer {failed}"
                    raise UserError(f"{name}: not run, because {why}")
        _passed.add(key)


def first_failure(result: TaskResult, due: int) -> str:
    """The first document of which a tested metric is not `due`; empty if there is none."""
    for item in result.items:
        for metric, (above, below) in item.values.items():
            if TESTED.fullmatch(metric) and above != below * due:
                return f"stored for document {item.id} scores {above / below:g} in {metric}, not {due}"
    return ""
