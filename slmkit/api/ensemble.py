"""`SLMEnsemble`: several models, used as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slmkit.api.causal_lm import GeneratingModel, SLMForCausalLM
from slmkit.config import methods_checked
from slmkit.find import find_model_directory
from slmkit.generation import Ensemble, common_tokenizer


@methods_checked
class SLMEnsemble(GeneratingModel):
    """Models of one tokenizer, whose probabilities are averaged; `forward` and `generate` as `SLMForCausalLM` has them.

    What ends a text, what pads one, and which ids may be generated, is as for the first model.
    """

    decoder: Ensemble

    def __init__(self, models: Sequence[SLMForCausalLM], weights: Sequence[float] | None = None) -> None:
        """Raises `UserError` as `Ensemble` does. That the models share a tokenizer is the caller's word."""
        decoder = Ensemble([model.decoder for model in models], weights)
        super().__init__(models[0].config, decoder)
        self.__dict__["known_ids"] = models[0].known_ids

    @classmethod
    def from_pretrained(
        cls, directories: Sequence[str | Path], weights: Sequence[float] | None = None, device: str = "cpu"
    ) -> SLMEnsemble:
        """Read model directories, runs or models of the hub, each with its tokenizer.

        Raises `UserError`, also where their tokenizers differ.
        """
        found = [find_model_directory(directory) for directory in directories]
        common_tokenizer(found)
        return cls([SLMForCausalLM.from_pretrained(directory, device) for directory in found], weights).eval()
