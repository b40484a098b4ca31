"""Folders for Ollama, MLX and Spaces, run in the programs that they are for."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from slmkit import SLMConfig, SLMForCausalLM, SLMTokenizer, UserError
from slmkit.export.folders import (
    IN_MLX,
    expect_mlx,
    go_template,
    quantized,
    stops,
    write_mlx,
    write_ollama,
    write_space,
)
from slmkit.export.runtimes import Loaded, load
from slmkit.model.files.directory import load_decoder
from slmkit.tokenizer.chat_pieces import chat_pieces
from tests.parity.configurations import DRAW, VOCAB
from tests.parity.twins import twins_of
from tests.tokenizer.test_chat_pieces import DATED, DEFAULT, LOOP, TALK, THINKS
from tests.tokenizer.test_kinds import TEMPLATES

HERE = Path(__file__).parent
CHILD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}


def run(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, env=os.environ | CHILD, **more
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a ChatML template."""
    folder = tmp_path_factory.mktemp("model") / "fox"
    torch.manual_seed(0)
    config = SLMConfig(vocab_size=260, max_position_embeddings=96, eos_token_id=[0, 3], **SHAPE)
    SLMForCausalLM(config).save_pretrained(folder)
    SLMTokenizer(260).save_pretrained(folder)
    return folder


def changed(model: Path, folder: Path, template: str | None = "", **generation: Any) -> Path:
    """A copy with another chat template (None: none) and another generation_config.json."""
    shutil.copytree(model, folder)
    if template != "":
        tokenizer = SLMTokenizer.from_pretrained(model)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


# -- Ollama -----------------------------------------------------------------------------------------------------------

GO = """
package main
import ("encoding/json"; "fmt"; "os"; "text/template")
type Message struct { Role, Content, Thinking string }
func main() {
    var jobs []struct { Template string; Messages []Message }
    if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil { panic(err) }
    var answers []string
    for _, job := range jobs {
        made, err := template.New("").Option("missingkey=zero").Parse(job.Template)
        if err != nil { fmt.Fprintln(os.Stderr, err); os.Exit(1) }
        file, _ := os.CreateTemp("", "rendered")
        if err := made.Execute(file, map[string]any{"Messages": job.Messages, "Response": ""}); err != nil {
            answers = append(answers, "ERROR " + err.Error())
        } else {
            text, _ := os.ReadFile(file.Name())
            answers = append(answers, string(text))
        }
        os.Remove(file.Name())
    }
    json.NewEncoder(os.Stdout).Encode(answers)
}
"""


def modelfile(folder: Path) -> dict[str, list[str]]:
    """The commands of a Modelfile, by the rules of Ollama's parser: a value ends at the first line end, or at a white
    space after three quotes, and what cannot be printed is dropped from it.
    """
    text = re.sub(r"^#.*\n", "", (folder / "Modelfile").read_text(), flags=re.MULTILINE)
    value = r'"""(.*?)"""(?=\s)|"([^"\n]*)"|([^\n]*)'
    commands: dict[str, list[str]] = {}
    for name, *parts in re.findall(rf"^(FROM|TEMPLATE|PARAMETER \w+) +(?:{value})$", text, re.MULTILINE | re.DOTALL):
        said = "".join(parts)
        commands.setdefault(name, []).append("".join(one for one in said if one.isprintable() or one in "\n\t\r"))
    assert re.sub(rf"^(FROM|TEMPLATE|PARAMETER \w+) +(?:{value})$", "", text, flags=re.M | re.S).strip() == ""
    return commands


@pytest.mark.skipif(shutil.which("go") is None, reason="Ollama's template language needs go (Debian: golang-go)")
def test_gos_own_templates_render_what_jinja_does(tmp_path: Path) -> None:
    odd = LOOP.replace("CONTENT", "m.content").replace("<|end|>", '\t{{ "{{" }} """ \u00a0\u2028<|end|>\n')
    jobs, expected = [], []
    tokenizer = SLMTokenizer(260)
    for template in (tokenizer.chat_template, *TEMPLATES.values(), DEFAULT, DATED, odd, THINKS):
        tokenizer.chat_template = template
        pieces = chat_pieces(tokenizer)
        for messages in (TALK, TALK[1:], TALK[:2], TALK[1:2]):
            trimmed = [{**one, "content": one["content"].strip()} for one in messages]
            if pieces.drops_thinking:  # which Ollama does by itself
                trimmed = [{**one, "content": one["content"].rpartition("</think>\n\n")[2]} for one in trimmed]
            said = [{"Role": one["role"], "Content": one["content"]} for one in trimmed]
            jobs.append({"Template": go_template(pieces), "Messages": said})
            expected.append(tokenizer.apply_chat_template(trimmed, True, tokenize=False))
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + DEFAULT
    no_system = go_template(chat_pieces(tokenizer))
    jobs.append({"Template": no_system, "Messages": [{"Role": one["role"], "Content": "x"} for one in TALK]})
    (tmp_path / "render.go").write_text(GO)
    environment = os.environ | {"GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off", "GOFLAGS": "-p=1"}
    done = subprocess.run(
        ["go", "run", str(tmp_path / "render.go")], input=json.dumps(jobs), capture_output=True, text=True,
        env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *found, refused = json.loads(done.stdout)
    assert found == expected
    assert refused.startswith("ERROR")
    assert "the chat template of this model has no system message" in refused


def written_for_ollama(source: Path, folder: Path) -> dict[str, list[str]]:
    """The commands of the Modelfile."""
    folder.mkdir()
    write_ollama(load(source, folder / "whole"), folder, "F32")
    return modelfile(folder)


def test_a_modelfile_has_the_template_the_stops_and_the_settings(model: Path, tmp_path: Path) -> None:
    source = changed(
        model, tmp_path / "source", do_sample=True, temperature=0.6, top_k=20, max_new_tokens=50, eos_token_id=[0, 3]
    )
    folder = tmp_path / "ollama"
    commands = written_for_ollama(source, folder)
    assert commands["FROM"] == ["./model.gguf"]
    assert (folder / "model.gguf").is_file()
    assert commands["TEMPLATE"] == [go_template(chat_pieces(SLMTokenizer.from_pretrained(source)))]
    assert commands["PARAMETER stop"] == ["<|endoftext|>", "<|im_end|>"]
    numbers = {name.split()[1]: float(*value) for name, value in commands.items() if name.startswith("PARAMETER")
               and name != "PARAMETER stop"}  # fmt: skip
    assert numbers == {
        "num_ctx": 96, "temperature": 0.6, "top_k": 20, "top_p": 1, "min_p": 0, "typical_p": 1, "repeat_penalty": 1,
        "num_predict": 50,
    }  # fmt: skip


def test_greedy_advice_and_a_model_without_template(model: Path, tmp_path: Path) -> None:
    source = changed(model, tmp_path / "source", template=None, do_sample=False, temperature=0.6)
    commands = written_for_ollama(source, tmp_path / "ollama")
    assert commands["TEMPLATE"] == ["{{ .Prompt }}"]
    assert commands["PARAMETER temperature"] == ["0"]


ANSWERS = (  # none of these ends before its end
    "A user said: <|im_start|> is a tag.", "<s>old</s> <b>new</b>", "<|im_", "end of turn\n\nuser: hi",
)  # fmt: skip


def test_stops_neither_cut_answers_nor_miss_their_end(model: Path) -> None:
    tokenizer = SLMTokenizer.from_pretrained(model)
    keys = {"eos_token_id": 0, "eot_token_id": 3}
    found = stops(tokenizer, keys)
    assert not [text for text in ANSWERS for stop in found if stop in text]
    for index in tokenizer.stop_token_ids:
        assert tokenizer.decode([index]) in found
    assert all(tokenizer.encode(stop, allow_special=True) in [[i] for i in tokenizer.stop_token_ids] for stop in found)
    html = tokenizer.extended(additional_special_tokens=["</s>"])
    html.further_stops = {html.special_tokens["</s>"]}
    with pytest.raises(UserError, match=r"ends texts at '</s>' \(id 260\).*take it out of eos_token_id"):
        stops(html, keys)
    assert stops(html, keys | {"eos_token_id": 260}) == found, "llama.cpp ends at its id"
    newline = tokenizer.encode("\n")
    tokenizer.further_stops = {*newline}
    with pytest.raises(UserError, match=r"ends texts at '\\n'") as error:
        stops(tokenizer, keys)
    assert "\n" not in str(error.value)


def test_a_template_that_ollama_cannot_say_is_refused(model: Path, tmp_path: Path) -> None:
    source = changed(model, tmp_path / "source", template=LOOP.replace("CONTENT", "m.content | upper"))
    with pytest.raises(UserError, match="does not write the same text around every message"):
        write_ollama(load(source, tmp_path / "whole"), tmp_path, "F32")
    assert not (tmp_path / "Modelfile").exists()


# -- MLX --------------------------------------------------------------------------------------------------------------


def settings_for_mlx(family: str, number: int) -> tuple[str, dict[str, Any]]:
    """A drawn configuration, with what mlx-lm has no choice of replaced."""
    name, draw = DRAW[family]
    settings = draw(random.Random(f"{family} {number}"))
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    if number:
        rope = {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 500.0,
        }  # fmt: skip
    plain = {"rope_type": "default", "rope_theta": 500.0 if number else 1e4}
    act = {"gpt2": "activation_function", "gemma2": "hidden_activation", "gemma3_text": "hidden_activation"}
    settings |= {act.get(family, "hidden_act"): "silu", "rope_parameters": rope}
    if family == "gpt2":
        settings |= {"activation_function": "gelu_new", "n_inner": None, "tie_word_embeddings": True}
        del settings["rope_parameters"]
    if family in ("mistral", "qwen2", "qwen3", "gemma2"):
        settings |= {"sliding_window": 128}
    if family in ("qwen3", "gemma2", "gemma3_text"):
        settings |= {"attention_bias": False}
    if family.startswith("gemma"):  # the root of the width is exact in bfloat16, in which mlx-lm has it
        settings |= {"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 16, "attn_logit_softcapping": None}
        settings |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "gemma2":
        settings |= {"rope_parameters": plain, "tie_word_embeddings": True} | CAPS
    if family in ("olmo3", "gemma3_text"):
        settings |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
        settings |= {"sliding_window": 5, "final_logit_softcapping": None}
        base = 10.0 if family == "gemma3_text" else plain["rope_theta"]
        settings["rope_parameters"] = {"full_attention": rope, "sliding_attention": plain | {"rope_theta": base}}
    return name, settings


@pytest.fixture(scope="module")
def in_mlx(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of all families, after mlx-lm has run them; `expected.npy` in each has transformers' logits."""
    pytest.importorskip("mlx_lm")
    root = tmp_path_factory.mktemp("mlx")
    ids = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))
    np.save(root / "ids.npy", ids.numpy())
    np.save(root / "weight.npy", torch.randn(8, 128, generator=torch.Generator().manual_seed(2)).numpy())
    for number, family in enumerate(IN_MLX):
        twins = twins_of(*settings_for_mlx(family, number % 2))
        folder = root / family
        folder.mkdir()
        write_mlx(Loaded(family, twins.ours, twins.config, SLMTokenizer(260), root), folder)
        with torch.no_grad():
            np.save(folder / "expected.npy", twins.theirs(ids).logits.numpy())
    for name, bits in (("talks", None), ("talks-8", 8), ("talks-4", 4)):
        (root / name).mkdir()
        write_mlx(load(model, root / "whole"), root / name, bits)
    run(sys.executable, HERE / "mlx_child.py", root)
    return root


@pytest.mark.parametrize("family", IN_MLX)
def test_mlx_computes_the_logits_of_every_family(in_mlx: Path, family: str) -> None:
    found, expected = (np.load(in_mlx / family / f"{name}.npy") for name in ("logits", "expected"))
    assert np.abs(found - expected).max() < 1e-3
    assert np.abs(expected).max() > 0.5


def test_codes_are_those_of_mlx(in_mlx: Path) -> None:
    weight = torch.from_numpy(np.load(in_mlx / "weight.npy")).bfloat16()
    for bits in (2, 4, 8):
        for group in (32, 64):
            theirs, ours = np.load(in_mlx / f"quantized-{bits}-{group}.npz"), quantized(weight, bits, group)
            assert np.array_equal(theirs["codes"], ours["weight"].numpy())
            assert np.array_equal(theirs["scales"], ours["scales"].float().numpy())
            assert np.array_equal(theirs["biases"], ours["biases"].float().numpy())
            assert np.array_equal(ours["weight"].numpy().astype(np.int64) >> 32 - bits, theirs["codes"] >> 32 - bits)


def dequantized(model: Path, bits: int, group: int) -> SLMForCausalLM:
    """The model with matrices rounded as MLX does, dequantized."""
    whole = SLMForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.ndim < 2:
                continue
            parts = quantized(parameter.bfloat16(), bits, group)
            codes = torch.from_numpy(parts["weight"].numpy().astype(np.int64))
            values = torch.stack([codes >> place & 2**bits - 1 for place in range(0, 32, bits)], -1).flatten(1)
            scaled = (
                values.unflatten(1, (-1, group)) * parts["scales"].float()[..., None]
                + parts["biases"].float()[..., None]
            )
            parameter.copy_(scaled.flatten(1))
    return whole


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_folder_gives_the_logits_of_its_values(in_mlx: Path, model: Path, bits: int) -> None:
    config = json.loads((in_mlx / f"talks-{bits}/config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits}, "32 divides the 96 columns too"
    with torch.no_grad():
        ids = torch.from_numpy(np.load(in_mlx / "ids.npy"))
        rounded, whole = (
            one(ids).logits.numpy() for one in (dequantized(model, bits, 32), SLMForCausalLM.from_pretrained(model))
        )
    found = np.load(in_mlx / f"talks-{bits}/logits.npy")
    off = np.abs(found - rounded).mean() / np.abs(whole).mean()
    assert off < 0.02, "activations are bfloat16"
    if bits == 4:
        assert np.abs(found - whole).mean() / np.abs(whole).mean() > 2 * off


def test_mlx_reads_the_tokenizer(in_mlx: Path, model: Path) -> None:
    ids = json.loads((in_mlx / "ids.json").read_text())
    assert ids == SLMTokenizer.from_pretrained(model).encode_prompt("Where is the cat?")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "slm"}, "does not run slm: it runs gpt2, llama"),
        ({"hidden_act": "relu2"}, "hidden_act is relu2: mlx-lm's llama computes only silu"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window is 8: mlx-lm's mistral"),
        ({"model_type": "gemma2", **CAPS, "sliding_window": 8}, "sliding_window is 8: mlx-lm's gemma2"),
        ({"model_type": "gemma2", "sliding_window": None}, "attn_logit_softcapping is None: .* only capped scores"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is .*only default, linear or llama3"),
        ({"model_type": "gpt2", "intermediate_size": 96}, "intermediate_size is 96: .* only 4 × hidden_size"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_mlx_would_compute_otherwise_is_refused_by_name(settings: dict[str, Any], words: str) -> None:
    config = SLMConfig(vocab_size=260, max_position_embeddings=9000, **SHAPE | settings)
    with pytest.raises(UserError, match=words) as error:
        expect_mlx(config)
    assert "\n" not in str(error.value)


# -- Spaces -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def space(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "fox-space"
    folder.mkdir()
    write_space(model, folder)
    return folder


def test_a_space_has_all_that_it_needs(space: Path) -> None:
    assert {path.name for path in space.iterdir()} == {"app.py", "requirements.txt", "README.md", "model"}
    header = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert (header["sdk"], header["app_file"], header["title"]) == ("gradio", "app.py", "fox-space")
    assert re.fullmatch(r"\d+\.\d+\.\d+", header["sdk_version"])
    assert "slmkit" not in (space / "app.py").read_text()
    assert "slmkit" not in (space / "requirements.txt").read_text()
    decoder, _ = load_decoder(space / "model")
    assert decoder.vocab_size == 260


def test_a_family_that_transformers_lacks_is_refused(tmp_path: Path) -> None:
    SLMForCausalLM(SLMConfig(model_type="slm", vocab_size=260, **SHAPE)).save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match="transformers has no 'slm'"):
        write_space(tmp_path / "own", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio: make test-space")
@pytest.mark.parametrize("chats", [True, False])
def test_the_page_of_a_space_answers(space: Path, model: Path, chats: bool) -> None:
    if not chats:
        tokenizer = SLMTokenizer.from_pretrained(model)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(space / "model")
    environment = os.environ | CHILD | {"GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=space,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
            line = process.stdout.readline()
            assert line, said
            said += line
        name, text = ("chat", "Who are you?") if chats else ("continue", "Once upon a time")
        data = [text, *([[]] if chats else []), 0, 1, 20]
        answer = called(found[0], name, [data[0], *data[1 + chats :]])
        expected = by_transformers(space / "model", text, chats)
        assert answer == expected
        assert answer
    finally:
        process.terminate()
        process.wait(60)


def called(url: str, name: str, data: list[Any]) -> str:
    """The last of the texts that a function of the page streams."""
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(f"{url}/gradio_api/call/{name}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{url}/gradio_api/call/{name}/{event}", timeout=120) as response:
        events = response.read().decode()
    assert "event: complete" in events, events
    return json.loads(events.rsplit("data: ", 1)[1])[0]


def by_transformers(directory: Path, text: str, chats: bool) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    if chats:
        messages = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    more = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return more if chats else text + more
