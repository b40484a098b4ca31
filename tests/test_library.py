"""The script of the README runs as it stands, at a size that fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slmkit
from slmkit import SLMConfig, SLMForCausalLM, SLMTokenizer, SLMTrainer, TextDataset, UserError

TEXTS = ["The fox has a red kite. It flies over the hill."] * 6 + ["The owl has a blue drum. It sings all day."] * 6


def small(vocab_size: int, **changes: object) -> SLMConfig:
    shape = {
        "vocab_size": vocab_size, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "learning_rate": 5e-3, "warmup_steps": 5,
        "batch_size": 4,
    }  # fmt: skip
    return SLMConfig(**(shape | changes))


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Tokenizer, model, dataset and trainer, as in the script."""
    output = tmp_path_factory.mktemp("script") / "run"
    tokenizer = SLMTokenizer(vocab_size=400)
    tokenizer.train(TEXTS)
    config = small(len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = SLMForCausalLM(config)
    dataset = TextDataset(TEXTS, tokenizer, max_length=32, stride=16)
    trainer = SLMTrainer(
        config=config, model=model, tokenizer=tokenizer, train_dataset=dataset, eval_dataset=dataset,
        teacher_model=None, output_dir=str(output), device="cpu",
    )  # fmt: skip
    return {"tokenizer": tokenizer, "model": model, "figures": trainer.train(num_epochs=25), "output": output}


def test_the_trainer_learns_the_texts(life: dict) -> None:
    assert life["figures"]["loss"] < 0.3
    assert life["figures"]["validation_loss"] < 0.3


def test_the_model_says_what_it_learned(life: dict) -> None:
    tokenizer, model = life["tokenizer"], life["model"]
    input_ids = torch.tensor([tokenizer.encode("The fox has a")])
    output = model.generate(
        input_ids, max_length=32, temperature=0.7, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    assert tokenizer.decode(output[0].tolist(), skip_special_tokens=True) == TEXTS[0]


def test_the_model_survives_disk(life: dict, tmp_path: Path) -> None:
    model = life["model"]
    model.save_pretrained(tmp_path)
    again = SLMForCausalLM.from_pretrained(tmp_path)
    x = torch.randint(len(life["tokenizer"]), (2, 20))
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
        assert again(x).logits.shape == (2, 20, len(life["tokenizer"]))
    assert again(x).logits.dtype == torch.float32


def test_what_the_trainer_leaves_is_a_run_that_every_tool_loads(life: dict) -> None:
    transformers = pytest.importorskip("transformers")
    output: Path = life["output"]
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "latest", "best"} <= {
        path.name for path in output.iterdir()
    }
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output / "latest", dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(output / "latest")("The owl", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, life["model"](tokens).logits, atol=1e-4, rtol=0)
    assert SLMTokenizer.from_pretrained(output / "latest").fingerprint == life["tokenizer"].fingerprint
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_max_length_counts_the_prompt_and_max_new_tokens_does_not(life: dict) -> None:
    model, prompt = life["model"], torch.tensor([[5, 6, 7]])
    assert model.generate(prompt, max_length=10, eos_token_id=[]).shape[1] == 10
    assert model.generate(prompt, max_new_tokens=10, eos_token_id=[]).shape[1] == 13
    with pytest.raises(UserError, match="is not above the 3 tokens of the prompt"):
        model.generate(prompt, max_length=3)


def test_fresh_weights_follow_torchs_seed() -> None:
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(SLMForCausalLM(small(300)).decoder.embedding.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_tokenizer_larger_than_the_model_is_refused_before_training() -> None:
    tokenizer = SLMTokenizer(260)
    config = small(200)
    with pytest.raises(UserError, match="set vocab_size=260"):
        SLMTrainer(config, SLMForCausalLM(config), tokenizer, TextDataset(TEXTS, tokenizer, max_length=8))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import slmkit, sys; print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in slmkit.__all__:
        assert getattr(slmkit, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = slmkit.no_such_name


def test_tokenizing_loads_no_torch() -> None:
    """`slm tokenizer` and `slm data` would wait seconds for it."""
    code = "import slmkit.cli, slmkit.data, slmkit.tokenizer, slmkit.files.find, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
