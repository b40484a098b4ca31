"""Models of the hub by its real client, from a local server: read, refused when it fails, recorded, published."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slmkit import SLMConfig, SLMEnsemble, SLMForCausalLM, SLMTokenizer, UserError
from slmkit.adapt.merge_recipe import MergeRecipe
from slmkit.cli.show import load_for_generation
from slmkit.config import load_settings
from slmkit.files.find import find_model_directory, find_tokenizer_directory
from slmkit.files.hub import HubName, at_commit, hub_name
from slmkit.model.files.adapter_directory import base_of
from slmkit.training.recipe.recipe import Recipe, load_recipe
from slmkit.workflows.context import SILENCE
from slmkit.workflows.merge import prepare_merge, write_merge
from slmkit.workflows.plan import inspect_model
from slmkit.workflows.push import push_model
from slmkit.workflows.train import resume_run, train_recipe
from tests.data.hub_server import Fault, HubServer

huggingface_hub = pytest.importorskip("huggingface_hub")
TINY = "someone/tiny"
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = SLMConfig(vocab_size=260, max_position_embeddings=32, eos_token_id=0, **SHAPE)
    SLMForCausalLM(config).save_pretrained(folder)
    SLMTokenizer(vocab_size=260).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"README.md": b"tiny", "onnx/model.onnx": b"other", "onnx/config.json": b"{}", "rust_model.ot": b"x"}


@pytest.fixture
def hub(
    model_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> Iterator[HubServer]:
    """A server with one model, as the client's endpoint; an empty cache, no token, and no waiting between tries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with HubServer() as server:
        server.commit(TINY, "main", model_files)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        yield server


def refusal(name: str) -> str:
    with pytest.raises(UserError) as error:
        find_model_directory(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_is_read_by_name_everywhere(hub: HubServer) -> None:
    ids = torch.arange(9)[None]
    model = SLMForCausalLM.from_pretrained(TINY)
    assert model.directory is not None
    assert model.directory.name == hub.shas[TINY, "main"]
    assert {path.name for path in model.directory.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    with torch.no_grad():
        assert torch.equal(SLMForCausalLM.from_pretrained(f"hf://{TINY}")(ids).logits, model(ids).logits)
        assert torch.equal(SLMForCausalLM.from_pretrained(f"{TINY}@main")(ids).logits, model(ids).logits)
        ensemble = SLMEnsemble.from_pretrained([TINY, TINY])
        torch.testing.assert_close(ensemble(ids).logits.softmax(-1), model(ids).logits.softmax(-1))
    assert SLMConfig.from_pretrained(TINY).hidden_size == 16
    assert len(SLMTokenizer.from_pretrained(TINY)) == 260
    assert load_for_generation(TINY, "cpu", [TINY])[1].fingerprint == SLMTokenizer.from_pretrained(TINY).fingerprint
    assert inspect_model(TINY).parameter_count == sum(p.numel() for p in model.parameters())


def test_what_needs_no_weights_downloads_none(hub: HubServer) -> None:
    find_tokenizer_directory(TINY)
    inspect_model(TINY)
    SLMConfig.from_pretrained(TINY)
    assert not any("safetensors" in request for request in hub.requests)


def test_what_is_local_comes_first(hub: HubServer, tmp_path: Path) -> None:
    config = SLMConfig(vocab_size=260, **SHAPE)
    SLMForCausalLM(config).save_pretrained(tmp_path / TINY)
    assert find_model_directory(TINY) == Path(TINY)
    assert not hub.requests
    assert "cache" in str(find_model_directory(f"hf://{TINY}"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "book").mkdir()
    hub.requests.clear()
    assert refusal("runs/boook").startswith("runs/boook: no such directory; did you mean 'runs/book'?")
    assert not hub.requests, "a name in a local folder is a local one"
    for path, name in (
        ("a/b", HubName("a/b", None)), ("a/b@v1/x", HubName("a/b", "v1/x")), ("hf://a/b@c", HubName("a/b", "c")),
        ("a", None), ("a/b/c", None), ("./b", None), ("../b", None), ("/a/b", None), ("runs/x", None),
    ):  # fmt: skip
        assert hub_name(path) == name, path


FAILURES = {
    "401": (Fault("", status=401, times=99), ["(401)", "hf auth login"]),
    "403, gated": (
        Fault("", status=403, headers={"X-Error-Code": "GatedRepo"}, times=99),
        ["gated", "accept its terms on its page", "hf auth login"],
    ),
    "403": (Fault("", status=403, times=99), ["not allowed (403)", "hf auth login"]),
    "404": (Fault("", status=404, headers={"X-Error-Code": "RepoNotFound"}, times=99), ["not found", "check the name"]),
    "429": (Fault("", status=429, times=99), ["too many requests (429)", "try again"]),
    "500": (Fault("", status=500, times=99), ["the server answers 500", "try again"]),
    "503": (Fault("", status=503, times=99), ["the server answers 503", "try again"]),
    "cut in mid-file": (Fault("GET /someone/tiny/resolve", cut=30, times=99), ["the connection broke", "try again"]),
    "500 in mid-download": (Fault("model.safetensors", status=500, times=99), ["the server answers 500", "try again"]),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_is_one_line_that_says_what_to_do_and_leaves_nothing_broken(hub: HubServer, name: str) -> None:
    fault, words = FAILURES[name]
    hub.faults.append(Fault(fault.match, fault.status, fault.headers, fault.cut, times=fault.times))
    line = refusal(TINY)
    assert all(word in line for word in (TINY, *words)), line
    hub.faults.clear()
    assert SLMForCausalLM.from_pretrained(TINY).config.hidden_size == 16


def test_a_short_failure_is_got_over(hub: HubServer) -> None:
    hub.faults += [Fault("model.safetensors", status=503, times=1), Fault("tokenizer.json", cut=20, times=1)]
    assert SLMForCausalLM.from_pretrained(TINY).config.hidden_size == 16


def test_wrong_names_are_told_with_what_is_meant(hub: HubServer) -> None:
    assert "did you mean 'HuggingFaceTB/SmolLM2-135M'?" in refusal("HuggingFaceTB/SmolLM2-135")
    assert "did you mean 'openai-community/gpt2'?" in refusal("openai/gpt2")
    assert refusal("gpt2") == "gpt2: a preset is a shape without weights; trained ones are on the hub: " \
                              "openai-community/gpt2"  # fmt: skip
    assert f"{TINY}@v9: no such branch, tag or commit" in refusal(f"{TINY}@v9")
    assert "and there is no directory run/book" in refusal("run/book")


def test_offline_a_cached_model_is_read_and_another_one_said_to_be_missing(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    find_tokenizer_directory(TINY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "incomplete" in refusal(TINY), "the weights were never downloaded"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    find_model_directory(TINY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert SLMForCausalLM.from_pretrained(TINY).config.hidden_size == 16
    assert not hub.requests
    assert "offline" in refusal("someone/else")


def test_a_copy_that_was_cut_short_in_the_cache_is_noticed(hub: HubServer) -> None:
    weights = (find_model_directory(TINY) / "model.safetensors").resolve()
    whole = weights.read_bytes()
    for kept in (len(whole) - 1, 100, 4, 0):
        weights.write_bytes(whole[:kept])
        line = refusal(TINY)
        assert "in the cache" in line
        assert f"delete {weights} and run this again" in line
    weights.unlink()
    assert SLMForCausalLM.from_pretrained(TINY).config.hidden_size == 16


def test_pickles_are_never_read(hub: HubServer, model_files: dict[str, bytes]) -> None:
    others = {name: content for name, content in model_files.items() if not name.endswith(".safetensors")}
    hub.commit("someone/old", "main", others | {"pytorch_model.bin": b"pickled"})
    assert "its weights are pickles (pytorch_model.bin)" in refusal("someone/old")
    assert not any("pytorch_model.bin" in request for request in hub.requests)
    hub.commit("someone/none", "main", others)
    assert "no weights in safetensors" in refusal("someone/none")
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    part = {"model-00001-of-00002.safetensors": model_files["model.safetensors"]}
    hub.commit("someone/part", "main", others | part | {"model.safetensors.index.json": index.encode()})
    assert "model-00002-of-00002.safetensors is missing" in refusal("someone/part")
    hub.commit("someone/text", "main", {"README.md": b"", "vocab.txt": b""})
    assert "no config.json" in refusal("someone/text")


def test_without_the_package_one_line_names_the_extra(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install slmkit[hub]" in refusal(TINY)


def recipe(folder: Path, **changes: Any) -> Recipe:
    text = folder / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"The fox number {n} has a red kite and a blue drum." for n in range(80)))
    content = {
        "output_dir": str(folder / "run"),
        "model": {"path": TINY},
        "data": {"source": str(text)},
        "train": {"sequence_length": 16, "tokens_per_step": 64, "max_steps": 2, "device": "cpu", "sample_tokens": 4},
    } | changes
    return load_settings(Recipe, content)


def test_a_run_records_the_commit_and_goes_on_with_the_same_model(
    hub: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    first = hub.shas[TINY, "main"]
    run = train_recipe(recipe(tmp_path), SILENCE, force=True)
    assert load_recipe(run.recipe).model.path == f"hf://{TINY}@{first}"
    changed = model_files | {
        "config.json": model_files["config.json"].replace(b'"hidden_size": 16', b'"hidden_size": 99')
    }
    hub.commit(TINY, "main", changed)
    assert at_commit(TINY) == f"hf://{TINY}@{hub.shas[TINY, 'main']}" != f"hf://{TINY}@{first}"
    resume_run(run.root, SILENCE)


def test_models_of_the_hub_are_merged_and_the_result_says_which(hub: HubServer, tmp_path: Path) -> None:
    merge = MergeRecipe(
        merge_method="linear", models=[{"model": TINY}, {"model": f"{TINY}@main"}], output_dir=str(tmp_path / "merged")
    )
    output = write_merge(prepare_merge(merge))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        merged, one = (SLMForCausalLM.from_pretrained(name)(ids).logits for name in (output, TINY))
    torch.testing.assert_close(merged, one)
    assert f"hf://{TINY}@{hub.shas[TINY, 'main']}" in (output / "merge.yaml").read_text()


def test_an_adapter_for_a_model_of_the_hub_names_it_as_peft_does(hub: HubServer, tmp_path: Path) -> None:
    run = train_recipe(recipe(tmp_path, lora={"r": 2}), SILENCE, force=True)
    directory = find_model_directory(run.root)
    content = json.loads((directory / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], content["revision"]) == (TINY, hub.shas[TINY, "main"])
    assert base_of(directory).name == hub.shas[TINY, "main"]
    assert SLMForCausalLM.from_pretrained(run.root).config.hidden_size == 16
    os.environ["HF_TOKEN"] = "hf_right"
    try:
        push_model(run.root, "me/adapter")
    finally:
        del os.environ["HF_TOKEN"]
    assert "base_model: someone/tiny" in hub.commits["me/adapter", "main"]["README.md"].decode()
    assert SLMForCausalLM.from_pretrained("me/adapter").config.hidden_size == 16


def test_a_run_is_published_with_its_card_and_read_again(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_recipe(recipe(tmp_path), SILENCE, force=True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    page = push_model(run.root, "me/fox", private=True)
    assert page == f"{hub.url}/me/fox"
    assert hub.private["me/fox"]
    published = hub.commits["me/fox", "main"]
    checkpoint = find_model_directory(run.root)
    assert published.keys() == {
        "README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert published["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    card = published["README.md"].decode()
    for part in ("base_model: someone/tiny", 'from_pretrained("me/fox")', "slm chat me/fox",
                 "| objective | pretrain |", "| text.txt |", "| learning_rate |", "| steps | 2 |", "(loss.png)",
                 "| validation loss |"):  # fmt: skip
        assert part in card, part
    assert str(tmp_path) not in card, "nobody else has this machine's folders"
    ids = torch.arange(9)[None]
    with torch.no_grad():
        ours, theirs = (SLMForCausalLM.from_pretrained(name)(ids).logits for name in (run.root, "me/fox"))
    assert torch.equal(ours, theirs)
    push_model(run.root, "me/fox", revision="v1")
    assert SLMForCausalLM.from_pretrained("me/fox@v1").config.hidden_size == 16
    assert len(huggingface_hub.ModelCard(card).data.to_dict()["tags"]) == 4
    assert "license" not in huggingface_hub.ModelCard(card).data.to_dict()
    push_model(run.root, "me/fox", license="cc0-1.0")
    assert "\nlicense: cc0-1.0\n" in hub.commits["me/fox", "main"]["README.md"].decode()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("/commit/", status=500, times=99), "the server answers 500; try again"),
        (Fault("/repos/create", status=403, times=99), r"not allowed \(403\)"),
        (Fault("PUT /lfs", status=503, times=99), "the server answers 503; try again"),
    ],
)
def test_what_fails_in_publishing_is_one_line_and_nothing_half_is_published(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, words: str
) -> None:
    directory = find_model_directory(TINY)
    with pytest.raises(UserError, match=r"me/fox: not allowed .*\(401\): log in with `hf auth login`"):
        push_model(directory, "me/fox")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.faults.append(Fault(fault.match, fault.status, times=fault.times))
    with pytest.raises(UserError, match=words):
        push_model(directory, "me/fox")
    assert not hub.commits.get(("me/fox", "main"))
    hub.faults.clear()
    push_model(directory, "me/fox")
    assert "model.safetensors" in hub.commits["me/fox", "main"]


def test_what_cannot_be_published_is_refused(hub: HubServer, tmp_path: Path) -> None:
    for name in ("fox", "a/b/c", "me/fo x", "me/fox@a@b"):
        with pytest.raises(UserError, match="expected OWNER/NAME"):
            push_model(TINY, name)
    with pytest.raises(UserError, match="no such directory"):
        push_model(tmp_path / "none", "me/fox")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="which is only on this machine: publish that first"):
        push_model(adapter, "me/adapter")
