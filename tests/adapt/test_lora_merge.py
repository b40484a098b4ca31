"""`slm merge MODEL --adapter A`, and an adapter wherever a MODEL is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slmkit import SLMForCausalLM
from slmkit.adapt.adapter import load_adapter, trained_tensors
from slmkit.adapt.load import load_model, start_adapter
from slmkit.adapt.lora import fold
from slmkit.config import UserError
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.files.directory import load_decoder, save_decoder
from slmkit.model.sizes import parameter_count
from slmkit.tokenizer import SLMTokenizer
from slmkit.workflows.merge import merge_adapters
from slmkit.workflows.plan import inspect_model
from tests.adapt.helpers import adapted, base_in, config_of, logits, save_adapter, shake
from tests.cli.helpers import slm
from tests.training.helpers import TOKENIZER


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base_in(tmp_path / "base", config_of("llama", vocab_size=260))
    TOKENIZER.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base: Path, name: str, **settings: object) -> Path:
    decoder, config = load_decoder(base)
    chosen = adapted(decoder, config, **settings)
    save_adapter(decoder, config, chosen, base, base.parent / name)
    return base.parent / name


def test_a_folded_model_says_what_the_adapter_said(base: Path) -> None:
    one = adapter(base, "one", use_dora=True)
    folded = merge_adapters(base, [one])
    assert folded == base.parent / "base-merged"
    assert not any(path.name.startswith(".partial") for path in base.parent.iterdir())
    decoder, config = load_decoder(folded)
    assert config == load_decoder(base)[1]
    assert (logits(decoder) - logits(load_model(one)[0])).abs().max() <= 1e-4
    assert SLMTokenizer.from_pretrained(folded).fingerprint == TOKENIZER.fingerprint
    assert merge_adapters(base, [one]) == base.parent / "base-merged-2"
    with pytest.raises(UserError, match="base-merged: exists already and is not overwritten"):
        merge_adapters(base, [one], folded)


def test_several_are_folded_one_after_another(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = [adapter(base, "one"), adapter(base, "two", target_modules=["down_proj"], r=2)]
    decoder, config = load_decoder(base)
    for directory in found:
        decoder, config, _ = load_adapter(decoder, config, directory)
        fold(decoder)
    folded = merge_adapters(base, found, base.parent / "both")
    assert torch.equal(logits(load_decoder(folded)[0]), logits(decoder))
    on_top = merge_adapters(found[0], found[1:], base.parent / "on top")  # an adapter is a model too
    assert torch.equal(logits(load_decoder(on_top)[0]), logits(decoder))
    assert any(
        line.startswith(f"{found[0]}: an adapter, which is folded into {base} first") for line in caplog.messages
    )


def known_adapter(base: Path, name: str, **settings: object) -> Path:
    """As a run writes it: with the fingerprint of its base."""
    decoder, _, files = start_adapter(base, LoRASettings(r=4, **settings))
    shake(trained_tensors(decoder))
    files.write(decoder, files.tensors(decoder), base.parent / name)
    return base.parent / name


def test_an_adapter_is_refused_on_another_step_of_its_base(base: Path) -> None:
    one, two = known_adapter(base, "one"), known_adapter(base, "two", use_dora=True)
    other = base.parent / "later"
    shutil.copytree(base, other)
    decoder, config = load_decoder(base)
    with torch.no_grad():
        decoder.blocks[1].mlp.down.weight[3, 5] += 1e-3  # a single number of all
    save_decoder(decoder, config, other)
    words = r"/(one|two)/adapter_model.safetensors: it was trained on other weights than this model"
    for adapters in ([one], [two, one]):
        with pytest.raises(UserError, match=words):
            merge_adapters(other, adapters)
    base.rename(base.parent / "kept")
    other.rename(base)  # as where a run's best model has become another one
    for act in (load_model, SLMForCausalLM.from_pretrained, lambda one: start_adapter(one, LoRASettings(r=4))):
        with pytest.raises(UserError, match=words):
            act(one)
    base.rename(other)
    (base.parent / "kept").rename(base)
    assert not [path for path in base.parent.iterdir() if "merged" in path.name or "partial" in path.name]
    both = merge_adapters(base, [one, two], base.parent / "both")
    on_top = known_adapter(both, "on top")  # trained on what the first two made
    assert merge_adapters(base, [one, two, on_top], base.parent / "three").is_dir()


def test_a_base_stored_otherwise_is_the_same_and_pefts_adapters_do_not_say(base: Path) -> None:
    one = known_adapter(base, "one")
    expected = logits(load_model(one)[0])
    tensors = load_file(base / "model.safetensors")
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    for number, half in enumerate(halves):
        save_file(half, base / f"part-{number}.safetensors")
    weight_map = {name: f"part-{number}.safetensors" for number, half in enumerate(halves) for name in half}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "model.safetensors").unlink()
    assert torch.equal(logits(load_model(one)[0]), expected)
    save_file(load_file(one / "adapter_model.safetensors"), one / "adapter_model.safetensors")  # as peft writes them
    save_file({name: tensor * 1.01 for name, tensor in halves[0].items()}, base / "part-0.safetensors")
    load_model(one)


def test_an_adapter_of_an_adapter_says_so(base: Path) -> None:
    one = known_adapter(base, "one")
    two = known_adapter(base, "two")
    path = two / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(one)}))
    with pytest.raises(UserError, match="its base .*one' is an adapter itself: fold that into its model with"):
        load_model(two)


@pytest.mark.parametrize("broken", ["base", "one"])
def test_numbers_that_are_none_are_refused_by_name(base: Path, broken: str) -> None:
    one = adapter(base, "one")
    path = next((base.parent / broken).glob("*model.safetensors"))
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name][0] = float("nan")
    save_file(tensors, path)
    words = rf"{broken}/{path.name}: '{name}' has numbers that are not finite"
    with pytest.raises(UserError, match=words):
        merge_adapters(base, [one])
    with pytest.raises(UserError, match=words):
        load_model(one)


def test_few_bits_and_plain_models_are_refused_and_nothing_is_left(base: Path) -> None:
    one = adapter(base, "one")
    before = sorted(base.parent.iterdir())
    with pytest.raises(UserError, match="base: a model and no adapter: expected a directory with an adapter_config"):
        merge_adapters(base, [base])
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"made_by": "slmkit"}}))
    with pytest.raises(UserError, match="weights are quantized, .*: name the full model that it was made from"):
        merge_adapters(base, [one])
    assert sorted(base.parent.iterdir()) == before


def test_an_adapter_is_a_model_for_a_script_and_for_inspection(base: Path) -> None:
    one = adapter(base, "one")
    decoder, config = load_model(one)
    model = SLMForCausalLM.from_pretrained(one)
    assert torch.equal(logits(model.decoder), logits(decoder))
    report = inspect_model(one, rows=1, length=16)
    stored = sum(4 * (a + b) for a, b in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)])
    assert report.parameters["adapter"] == config.num_hidden_layers * stored
    assert report.parameter_count == parameter_count(decoder.architecture) + report.parameters["adapter"]
    whole = inspect_model(base, rows=1, length=16)
    saved = whole.memory["training with adamw"] - report.memory["training with adamw"]
    own = 4 * 4 * report.parameters["adapter"]  # weights, gradients and two moments
    assert saved > 2 * sum(p.nbytes for p in decoder.parameters()) - own  # two moments of every frozen weight
    model.save_pretrained(base.parent / "whole")
    assert torch.equal(logits(load_decoder(base.parent / "whole")[0]), logits(decoder))


def test_commands_take_an_adapter_for_a_model(base: Path) -> None:
    one = adapter(base, "one")
    TOKENIZER.save_pretrained(one)
    merged = slm("merge", str(base), "--adapter", str(one), "-o", str(base.parent / "merged"))
    assert merged.returncode == 0, merged.stderr
    texts = [
        slm("generate", str(model), "Ann", "--temperature", "0", "--max-new-tokens", "8", "--device", "cpu")
        for model in (one, base.parent / "merged", base)
    ]
    assert [text.returncode for text in texts] == [0, 0, 0], texts[0].stderr
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout
    (base / "config.json").unlink()
    gone = slm("generate", str(one), "Ann")
    assert gone.returncode == 2
    assert "is not there: put the model back, or its new place in base_model_name_or_path" in gone.stderr
    assert gone.stderr.count("\n") == 1
