"""The model card: what it says of a run, that its commands work, and that nothing in a run can forge it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slmkit import SLMConfig, SLMForCausalLM, SLMTokenizer
from slmkit.cli import app
from slmkit.config import load_settings
from slmkit.export.gguf import write_gguf
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.context import SILENCE
from slmkit.workflows.push import Known, card_of, markdown, model_card
from slmkit.workflows.train import train_recipe

CONFIG = SLMConfig(
    vocab_size=280, max_position_embeddings=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, eos_token_id=[0, 3],
)  # fmt: skip
METRICS = [
    {"step": 10, "tokens": 5_000, "loss": 2.5, "validation_loss": 2.0},
    {"step": 20, "tokens": 10_000, "loss": 2.0, "validation_loss": 2.25},
]
RECIPE: dict[str, Any] = {
    "objective": "pretrain", "seed": 7, "train": {"optimizer": "muon", "learning_rate": 0.01},
    "data": {
        "sources": [{"path": "someone/stories", "weight": 3.0}, {"path": "hf://someone/songs", "weight": 1.0}],
        "phases": [
            {"until_tokens": 4000, "weights": {"stories": 1.0}}, {"until_tokens": None, "weights": {"songs": 2.0}},
        ],
    },
}  # fmt: skip


def header_of(card: str) -> dict[str, Any]:
    """The YAML at the beginning; the hub's own reader accepts it too."""
    hub = pytest.importorskip("huggingface_hub")
    found = yaml.safe_load(card.split("\n---\n")[0])
    assert hub.ModelCard(card).data.to_dict()["library_name"] == found["library_name"]
    return found


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def test_a_card_says_what_the_run_knows() -> None:
    environment = {"device_name": "H200", "packages": {"torch": "2.13.0"}, "data": {"train": {"documents": 1234}}}
    card = model_card(
        "me/fox",
        Known(CONFIG, license="apache-2.0", curve="loss.png", recipe=RECIPE, metrics=METRICS, environment=environment),
    )
    for part in (
        "# fox", "llama, 1 layers of width 32, 280 tokens, a context of 96", "Made by pretraining.",
        "Licence: apache-2.0", "![Loss by training tokens](loss.png)", "| trained tokens | 10,000 |",
        "| documents | 1,234 |", "| optimizer | muon |", "| someone/stories | 3.0 |",
        "Until 4,000 tokens: stories 1.0.", "After that: songs 2.0.", "| device | H200 |",
        "| validation loss | 2 | 10 |", "| validation perplexity | 7.389 | 10 |",
    ):  # fmt: skip
        assert part in card, part
    header = header_of(card)
    assert header["license"] == "apache-2.0"
    assert header["pipeline_tag"] == "text-generation"
    assert header["datasets"] == ["someone/stories"]
    assert header["tags"] == ["slmkit", "llama", "pretrain"]
    result = header["model-index"][0]["results"][0]
    assert {"type": "validation loss", "value": 2.0} in result["metrics"]
    assert "base_model" not in header


@pytest.mark.parametrize(
    ("known", "methods", "relation"),
    [
        ({"recipe": {"objective": "kto", "lora": {"r": 8}}}, "Kahneman-Tversky optimization (KTO), then LoRA of rank 8",
         "finetune"),
        ({"recipe": {"objective": "dpo"}}, "direct preference optimization (DPO)", "finetune"),
        ({"recipe": {"objective": "distill"}}, "distillation from a teacher", "finetune"),
        ({"merge": {"merge_method": "ties"}}, "merge (ties)", "merge"),
        ({"quantization": {"quant_method": "bitsandbytes"}}, "quantization (bitsandbytes)", "quantized"),
        ({"is_adapter": True}, "LoRA", "adapter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_card_names_method_and_base(known: dict[str, Any], methods: str, relation: str) -> None:
    card = model_card("me/fox", Known(CONFIG, bases=["someone/base"], **known))
    assert f"Made by {methods} from someone/base." in card
    header = header_of(card)
    assert (header["base_model"], header["base_model_relation"]) == ("someone/base", relation)
    assert header["library_name"] == ("peft" if known.get("is_adapter") else "transformers")


def test_a_licence_is_never_invented() -> None:
    card = model_card("me/fox", Known(CONFIG, recipe=RECIPE, metrics=METRICS))
    assert "license" not in header_of(card)
    assert "No licence is named" in card


EVIL = (
    "me/x\n---\nlicense: mit\n---\n# Gift", "me/[click](http://evil)", "me/<script>alert(1)</script>", "me/a|b|c",
    "me/`x` **bold** _it_",
    '"); import os; os.system("touch forged")  #', "$(touch forged) `touch forged`; touch forged",
    "me/{{ 7 * 7 }}{% raw %}", "me/```\n```bash\ntouch forged\n```", "- a: [b", "!!python/object/apply:os.system [ls]",
)  # fmt: skip


FAKES = "slm() { printf '%s\\0' \"$@\"; }; vllm() { :; }; llama-server() { :; }; ollama() { :; }"


@pytest.mark.parametrize("evil", EVIL)
def test_names_cannot_forge_the_card(evil: str, tmp_path: Path) -> None:
    plain = model_card(
        "me/fox", Known(CONFIG, bases=["b"], license="l", has_chat=True, recipe=recipe("s"), metrics=METRICS)
    )
    card = model_card(
        evil, Known(CONFIG, bases=[evil], license=evil, has_chat=True, recipe=recipe(evil), metrics=METRICS)
    )
    header, expected = header_of(card), header_of(plain)
    assert header.keys() == expected.keys()
    assert header["base_model"] == header["license"] == evil
    assert card.count("\n```") == plain.count("\n```")
    body, plain_body = (one.split("\n---\n", 2)[-1] for one in (card, plain))
    outside, plain_outside = (re.sub(r"^```.*?^```$", "```", one, flags=re.M | re.S) for one in (body, plain_body))
    assert shape(outside) == shape(plain_outside)
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(http", outside)
    for block in blocks(card, "python"):
        code = compile(block, "card", "exec")
        assert evil in code.co_consts, "the name is one string"
    for block in blocks(card, "bash"):
        words = subprocess.run(
            ["bash", "-c", f"{FAKES}\n{block}"],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert words.returncode == 0, words.stderr
        assert not words.stdout or " ".join(evil.split()) in words.stdout.split("\0")
    assert not [*tmp_path.iterdir()]


def recipe(name: str) -> dict[str, Any]:
    sources = [{"path": name, "weight": 1.0}]
    return {"objective": "sft", "data": {"sources": sources}, "train": {"optimizer": name}}


def shape(body: str) -> list[str]:
    """What each line is: a heading, a table row with its number of cells, a fence, or text."""
    kinds = []
    for line in body.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line))
        kinds.append(line.split(" ")[0] if line.startswith(("#", "```")) else f"{cells} cells" if cells else "text")
    return kinds


def test_markdown_shows_text_as_it_is() -> None:
    assert markdown("a_b*c`d`|<i>&[e](f)\n# g") == r"a\_b\*c\`d\`\|&lt;i&gt;&amp;\[e\](f) # g"


# -- its commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that talks, in a folder of a name with a space and quotes."""
    folder = tmp_path_factory.mktemp("cards") / 'it\'s a "fox"'
    torch.manual_seed(0)
    SLMForCausalLM(CONFIG).save_pretrained(folder)
    tokenizer = SLMTokenizer(280)
    tokenizer.train(["the cat sat by the sea, and the sea sang to the cat. Who are you? I am the cat of the sea."] * 9)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chats", [True, False])
def test_the_snippet_for_transformers_runs(
    folder: Path, chats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / folder.name
    shutil.copytree(folder, model)
    if not chats:
        tokenizer = SLMTokenizer.from_pretrained(model)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(model)
    (snippet,) = blocks(card_of(model, model, model.name), "python")
    assert ("apply_chat_template" in snippet) == chats
    monkeypatch.chdir(tmp_path)  # where the model is by its name
    found: dict[str, Any] = {}
    exec(snippet, found)
    assert 1 <= found["output"].shape[1] - found["inputs"]["input_ids"].shape[1] <= 50


def test_the_commands_of_the_card_are_ones(folder: Path) -> None:
    """slmkit's have only options that exist; the server of llama.cpp opens a file made as the card says."""
    card = card_of(folder, folder, folder.name)
    commands = [line for block in blocks(card, "bash") for line in block.splitlines()]
    assert [line.split()[0] for line in commands] == ["slm", "vllm", "slm", "llama-server", "slm", "ollama", "ollama"]
    names = {command.name or command.callback.__name__: command.callback for command in app.registered_commands}
    for line in commands:
        if line.startswith("slm "):
            options = set(re.findall(r" --([\w-]+)", line))
            hints = json.dumps([repr(hint) for hint in names[line.split()[1]].__annotations__.values()])
            arguments = {*names[line.split()[1]].__annotations__}
            assert all(option in arguments or f"--{option}" in hints for option in options), line
    assert commands[1] == f"vllm serve {commands[0].removeprefix('slm chat ')}"


def test_a_gguf_as_the_card_makes_it_answers_in_llama_cpp(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from slmkit.export.llama_cpp import LlamaCpp

    write_gguf(folder, tmp_path / "model.gguf", "Q8_0")
    with LlamaCpp(tmp_path / "model.gguf", 96) as runtime:
        tokenizer = SLMTokenizer.from_pretrained(folder)
        messages = [{"role": "user", "content": "Who are you?"}]
        ids = runtime.encode_chat(messages)
        assert ids == tokenizer.encode_chat_prompt(messages)
        assert len(runtime.greedy(ids, 8)) == 8


# -- a run ------------------------------------------------------------------------------------------------------------


def test_the_card_of_a_run_has_its_figures_and_its_licence(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"The fox number {n} has a red kite and a blue drum." for n in range(80)))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    content = {
        "output_dir": str(tmp_path / "run"), "license": "cc-by-4.0", "model": shape | {"max_position_embeddings": 32},
        "tokenizer": {"vocab_size": 260}, "data": {"source": str(text)},
        "train": {"sequence_length": 16, "tokens_per_step": 64, "max_steps": 2, "device": "cpu", "sample_tokens": 4},
    }  # fmt: skip
    run = train_recipe(load_settings(Recipe, content), SILENCE, force=True)
    card = card_of(run.root, run.latest, "me/fox")
    losses = [line["validation_loss"] for line in run.metrics.read() if "validation_loss" in line]
    assert f"| validation loss | {losses[-1]:.4g} | 2 |" in card, "of the checkpoint that is published"
    first = next(run.checkpoints.glob("step-000001"))
    assert f"| validation loss | {losses[0]:.4g} | 1 |" in card_of(run.root, first, "me/fox")
    assert header_of(card)["license"] == "cc-by-4.0"
    assert "Licence: mit" in card_of(run.root, run.latest, "me/fox", "mit")
    assert "| text.txt |" in card
    assert str(tmp_path) not in card, "nobody else has this machine's folders"
    assert ("(loss.png)" in card) == run.plot.is_file()
