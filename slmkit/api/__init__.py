"""The few classes a script wants, put together from the rooms below; the commands stand on the same functions."""

from slmkit.api.causal_lm import SLMForCausalLM
from slmkit.api.ensemble import SLMEnsemble
from slmkit.api.quickstart import train_quickstart
from slmkit.api.runs import RunFigures, evaluate_run, resume_run, train_recipe
from slmkit.api.trainer import SLMTrainer

__all__ = [
    "RunFigures",
    "SLMEnsemble",
    "SLMForCausalLM",
    "SLMTrainer",
    "evaluate_run",
    "resume_run",
    "train_quickstart",
    "train_recipe",
]
