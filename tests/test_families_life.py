"""Every family goes through the same life: a recipe, training, resuming, a checkpoint, text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slmkit import SLMForCausalLM
from slmkit.training.recipe.recipe import load_recipe
from slmkit.workflows.train import resume_run, train_recipe
from tests.cli.helpers import slm
from tests.model.test_cache import UNLIKE
from tests.test_life import Silent

SIZES = ["model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=4"]
CHOICES = {
    "deepseek_v3": [
        "model.kv_lora_rank=12",
        "model.qk_rope_head_dim=4",
        "model.qk_nope_head_dim=6",
        "model.v_head_dim=5",
    ],
    "mistral": ["model.sliding_window=7"],
    "gemma3_text": ["model.sliding_window=7", "model.num_key_value_heads=1"],
    "slm": ["model.qk_norm=head", "model.norm=layer", "model.attn_logit_softcapping=5", "data.separate_documents=true"],
}


@pytest.mark.usefixtures("without_plan_and_pictures")  # slow, and no family's own
@pytest.mark.parametrize("family", UNLIKE)
def test_a_family_is_trained_resumed_and_talks(family: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"data": {"source": "stories", "documents": 40}}))
    keys = [
        f"output_dir={tmp_path / 'run'}", f"model.model_type={family}", "model.max_position_embeddings=64",
        *SIZES, *CHOICES.get(family, []), "tokenizer.vocab_size=400", "data.validation_documents=5",
        "train.max_steps=4", "train.tokens_per_step=256", "train.device=cpu", "train.precision=float32",
        "train.sample_tokens=4", "train.eval_steps=2", "train.save_total_limit=9", "train.gradient_checkpointing=2",
    ]  # fmt: skip
    run = train_recipe(load_recipe(tmp_path / "recipe.yaml", keys), Silent())
    whole = SLMForCausalLM.from_pretrained(run.root / "latest")
    (run.root / "latest").unlink()
    last = run.root / "checkpoints" / "step-000004"
    last.rename(tmp_path / "last")
    resume_run(run.root, Silent())
    again = SLMForCausalLM.from_pretrained(run.root / "checkpoints" / "step-000004")
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)
    prompts = torch.tensor([[3, 4, 5], [9, 9, 6]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    together = whole.generate(prompts, attention_mask=mask, max_new_tokens=5, eos_token_id=399)
    alone = whole.generate(prompts[1:, 1:], max_new_tokens=5, eos_token_id=399)
    assert torch.equal(together[1:, 3:], alone[:, 2:])


def test_inspect_says_how_large_a_preset_is() -> None:
    done = slm("inspect", "quickstart", "--batch", "2")
    assert done.returncode == 0, done.stderr
    said = {line.strip().rsplit("  ", 1)[0].strip(): line.split() for line in done.stdout.splitlines() if line.strip()}
    assert "1,377,408" in said["all"]
    for row in ("embedding", "forward, matrices", "multi-head", "training with adamw", "running in bfloat16"):
        assert any(label.startswith(row) for label in said), done.stdout


def test_inspect_of_nothing_and_of_too_long_a_text_is_one_line() -> None:
    both = (["nothing"], "neither a preset nor a directory"), (["quickstart", "--length", "600"], "context of 512")
    for arguments, words in both:
        done = slm("inspect", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
