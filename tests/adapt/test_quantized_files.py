"""Directories of quantized models: as they were saved, as transformers reads them, and as others publish them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slmkit import SLMForCausalLM, SLMTokenizer, SLMTrainer, TextDataset
from slmkit.adapt.adapter import trained_tensors
from slmkit.adapt.load import load_model, start_adapter
from slmkit.adapt.quantize import LARGEST, quantized_modules, round_to, to_quantize
from slmkit.adapt.quantized_files import load_quantized, save_quantized
from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import LoRASettings
from slmkit.model.files.directory import empty_decoder, load_decoder
from slmkit.model.initialization import build_decoder
from tests.model.test_cache import FAMILIES, UNLIKE, config, ids

every_kind = pytest.mark.parametrize("kind", LARGEST)
every_embedding = pytest.mark.parametrize("embedding", ["bfloat16", "int8"])


def quantized(shape: SLMConfig, kind: str, embedding: str = "bfloat16", group: int = 32) -> Decoder:
    decoder = build_decoder(shape, seed=3).eval()
    with torch.no_grad():  # what is stored in bfloat16 should come back as it was
        for parameter in decoder.parameters():
            parameter.copy_(parameter.bfloat16())
    round_to(decoder, to_quantize(decoder, kind, group, embedding), group)
    return decoder


def write(directory: Path, kind: str, embedding: str = "bfloat16", **changes: object) -> Path:
    shape = config("llama").model_copy(update=changes)
    save_quantized(quantized(shape, kind, embedding), shape, directory)
    return directory


@pytest.mark.parametrize("family", UNLIKE)
@every_kind
@every_embedding
def test_every_family_comes_back_bit_for_bit(family: str, kind: str, embedding: str, tmp_path: Path) -> None:
    shape = config(family)
    decoder = quantized(shape, kind, embedding)
    save_quantized(decoder, shape, tmp_path)
    found, read = load_model(tmp_path)
    assert read == shape
    state = decoder.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name
    with torch.no_grad():
        assert torch.equal(found.logits(found(ids())), decoder.logits(decoder(ids())))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"slm"}))
@every_kind
def test_transformers_reads_the_directory_and_computes_the_same(family: str, kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "compressed_tensors")
    shape = config(family)
    decoder = quantized(shape, kind)
    save_quantized(decoder, shape, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    if family == "gpt2" and kind != "nf4":
        assert said["why_not_for_transformers"] == "transformers reads no integers in this family's transposed matrices"
        with pytest.raises(ValueError, match="quant_method"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        return
    assert said["quant_method"] == ("bitsandbytes" if kind == "nf4" else "compressed-tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        in_16_bits = theirs(ids()).logits.float()
        if kind != "nf4":
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.nn.Module.float(theirs)  # bitsandbytes' linears take the precision of their input
        for module in theirs.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # or they compute in bfloat16 all the same
        wanted = decoder.logits(decoder(ids()))
        torch.testing.assert_close(theirs(ids()).logits, wanted, atol=2e-3 if "gemma" in family else 1e-4, rtol=0)
    assert (in_16_bits - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_head_of_its_own_is_int8_and_transformers_reads_that(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    write(tmp_path, kind, tie_word_embeddings=False)
    decoder, _ = load_model(tmp_path)
    assert quantized_modules(decoder)["head"].kind == "int8"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, decoder.logits(decoder(ids())), atol=1e-4, rtol=0)


@every_kind
def test_transformers_refuses_a_quantized_embedding(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write(tmp_path, kind, "int8")
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["why_not_for_transformers"] == "transformers reads no quantized embedding"
    assert said["modules"]["model.embed_tokens"] == "int8, groups of 32"
    with pytest.raises(ValueError, match="quant_method"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


# -- directories of other programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "strategy"), [(4, "group"), (8, "group"), (4, "channel"), (8, "channel")])
def test_what_compressed_tensors_writes_is_read(bits: int, strategy: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    compressed = pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config

    shape = config("llama")
    full = build_decoder(shape, seed=3)
    SLMForCausalLM(shape, full).save_pretrained(tmp_path / "full")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    arguments = {"num_bits": bits, "symmetric": True, "strategy": strategy}
    arguments |= {"group_size": 32} if strategy == "group" else {}
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    apply_quantization_config(theirs, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in theirs.modules():
        if hasattr(module, "quantization_scheme"):
            groups = module.weight.detach().unflatten(1, (module.weight_scale.size(1), -1))
            module.weight_scale.data.copy_(groups.abs().amax(-1) / (2 ** (bits - 1) - 1))
            module.quantization_status = compressed.quantization.QuantizationStatus.FROZEN
    x = ids()
    compressor = compressed.compressors.ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    compressor.update_config(str(tmp_path / "theirs"))
    with torch.no_grad():
        wanted = theirs(x).logits
        decoder, _ = load_model(tmp_path / "theirs")
        assert len(quantized_modules(decoder)) == 28
        torch.testing.assert_close(decoder.logits(decoder(x)), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("double", [False, True])
def test_what_bitsandbytes_writes_is_read(double: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    shape = config("llama").model_copy(update={"hidden_size": 64, "intermediate_size": 128})
    SLMForCausalLM(shape, build_decoder(shape, seed=3)).save_pretrained(tmp_path / "full")
    wanted = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=wanted, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    decoder, _ = load_model(tmp_path / "theirs")
    assert len(quantized_modules(decoder)) == 28
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(decoder(ids())), theirs(ids()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("where", "changes", "words"),
    [
        ("config", {"format": "float-quantized"}, "format is 'float-quantized': only 'pack-quantized'"),
        ("config", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        ("config", {"config_groups": {"group_0": 3}}, "config_groups.group_0: expected an object, found '3'"),
        ("config", {"config_groups": []}, r"config_groups: expected an object, found '\[\]'"),
        ("config", {"quant_method": "gptq"}, r"only compressed-tensors \(pack-quantized\) and bitsandbytes \(nf4\)"),
        ("config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_4bit is 'None': only True"),
        ("config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_type is 'None': only 'nf4'"),
        ("group", {"input_activations": {"num_bits": 8}}, "group_0: input_activations is"),
        ("group", {"weights": [4]}, r"group_0.weights: expected an object, found '\[4\]'"),
        ("weights", {"symmetric": False}, "group_0.weights: symmetric is 'False': only True"),
        ("weights", {"num_bits": 3}, "num_bits is '3': only 4 or 8"),
        ("weights", {"type": "float"}, "type is 'float': only 'int'"),
        ("weights", {"strategy": "block"}, "strategy is 'block': only 'group' or 'channel'"),
        ("weights", {"group_size": 0}, "group_0.weights: group_size is '0': expected a whole number above 0"),
        ("weights", {"group_size": -1}, "group_size is '-1': expected a whole number above 0"),
        ("weights", {"group_size": "x"}, "group_size is 'x': expected a whole number above 0"),
        ("weights", {"group_size": None}, "group_size is 'None': expected a whole number above 0"),
        ("weights", {"group_size": True}, "group_size is 'True': expected a whole number above 0"),
        ("weights", {"group_size": 32, "strategy": "channel"}, "group_size is '32': expected null, for .* 'channel'"),
        ("group", {"targets": 5}, "group_0: targets is '5': expected a list of names"),
        ("config", {"ignore": 5}, "quantization_config: ignore is '5': expected a list of names"),
        ("config", {"ignore": ["lm_head", 5]}, r"ignore is .*: expected a list of names"),
        ("weights", {"actorder": "group"}, "actorder is 'group': only None or 'static' or 'weight'"),
    ],
)
def test_another_quantization_is_refused_by_name(where: str, changes: dict, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, "int4") / "config.json"
    content = json.loads(path.read_text())
    said = content["quantization_config"]
    group = said["config_groups"]["group_0"]
    {"config": said, "group": group, "weights": group["weights"]}[where].update(changes)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


# -- damage -----------------------------------------------------------------------------------------------------------


def damaged(directory: Path, kind: str, **tensors: torch.Tensor | None) -> str:
    """The error for a directory of which one matrix's tensors are replaced, or removed (None)."""
    write(directory, kind)
    path, name = directory / "model.safetensors", "model.layers.1.mlp.up_proj"
    stored = load_file(path) | {f"{name}.{key.replace('__', '.', 1)}": value for key, value in tensors.items()}
    save_file({key: value for key, value in stored.items() if value is not None}, path)
    with pytest.raises(UserError) as caught:
        load_model(directory)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("strategy", [{"group_size": 64}, {"strategy": "channel", "group_size": None}])
def test_groups_of_another_size_than_the_config_says_are_refused(strategy: dict, tmp_path: Path) -> None:
    path = write(tmp_path, "int4") / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["config_groups"]["group_0"]["weights"].update(strategy)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"groups of 32, where config.json says group_size {strategy['group_size']}"):
        load_model(tmp_path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    width, wide = config("llama").hidden_size, config("llama").intermediate_size
    packed, scales = torch.zeros(wide, width // 8, dtype=torch.int32), torch.ones(wide, width // 32)
    assert "cannot be read: packed" in damaged(tmp_path, "int4", weight_packed=packed[:-1].clone())
    assert "cannot be read: packed" in damaged(tmp_path, "int4", weight_packed=packed.float())
    assert "cannot be read: packed" in damaged(tmp_path, "int4", weight_scale=scales[:-1].clone())
    assert "cannot be read: packed" in damaged(tmp_path, "int4", weight_shape=torch.tensor([wide, width + 1]))
    assert "not a multiple of 32" in damaged(tmp_path, "int4", weight_scale=torch.ones(wide, width // 16))
    assert "numbers that are not finite" in damaged(tmp_path, "int4", weight_scale=scales * torch.nan)
    assert "weight_scale' is missing" in damaged(tmp_path, "int4", weight_scale=None)
    assert "unexpected" in damaged(tmp_path, "int4", weight_g_idx=torch.zeros(width, dtype=torch.int32))
    assert "cannot be read" in damaged(tmp_path, "int4", weight_scale=torch.ones(3))
    assert "weight_scale is zero everywhere, or empty" in damaged(tmp_path, "int4", weight_scale=scales[:, :0].clone())
    assert "weight_scale is zero everywhere" in damaged(tmp_path, "int4", weight_scale=scales * 0)
    for dtype in (torch.bool, torch.complex64, torch.int8):
        assert f"weight_scale is {dtype}, not of floating" in damaged(tmp_path, "int4", weight_scale=scales.to(dtype))
        absmax = torch.ones(wide * width // 32).to(dtype)
        assert f"weight.absmax is {dtype}, not of floating-point" in damaged(tmp_path, "nf4", weight__absmax=absmax)
    assert "cannot be read" in damaged(tmp_path, "nf4", weight__absmax=torch.ones(0))
    assert "not that of nf4" in damaged(tmp_path, "nf4", weight__quant_map=torch.linspace(-1, 1, 16))
    assert "cannot be read" in damaged(tmp_path, "nf4", weight__absmax=torch.ones(7))
    state = {"weight__quant_state.bitsandbytes__nf4": torch.tensor([1, 2], dtype=torch.uint8)}
    assert "cannot be read" in damaged(tmp_path, "nf4", **state)
    write(tmp_path, "int4")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_model(tmp_path)


# -- what else reads it -----------------------------------------------------------------------------------------------


@every_kind
def test_a_script_loads_saves_and_generates(kind: str, tmp_path: Path) -> None:
    model = SLMForCausalLM.from_pretrained(write(tmp_path / "one", kind, "int8"))
    model.save_pretrained(tmp_path / "two")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    new = model.generate(ids()[:, :5], max_new_tokens=4, do_sample=False)
    assert new.shape == (2, 9)
    assert load_quantized(tmp_path / "two")[0].embedding.kind == "int8"


@every_kind
def test_an_adapter_of_a_quantized_model_is_saved_and_loaded_on_top_of_it(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "base", kind)
    decoder, _, files = start_adapter(tmp_path / "base", LoRASettings(r=4))
    with torch.no_grad():
        for parameter in trained_tensors(decoder).values():
            parameter.add_(0.1)
    files.write(decoder, files.tensors(decoder), tmp_path / "adapter")
    found, _ = load_model(tmp_path / "adapter")
    assert quantized_modules(found).keys() == quantized_modules(decoder).keys()
    with torch.no_grad():
        assert torch.equal(found.logits(found(ids())), decoder.eval().logits(decoder(ids())))
    with pytest.raises(UserError, match="which would get more tokens: its weights are quantized"):
        start_adapter(tmp_path / "base", LoRASettings(), prepare=lambda *both: both)


def test_a_trainer_refuses_it_without_an_adapter(tmp_path: Path) -> None:
    model = SLMForCausalLM.from_pretrained(write(tmp_path, "int4", vocab_size=260))
    data = TextDataset(["The fox had a red kite."] * 9, SLMTokenizer(260), max_length=16)
    with pytest.raises(UserError, match=r"only an adapter \(lora\) can be trained on it: its weights are quantized"):
        SLMTrainer(model.config, model, SLMTokenizer(260), data)
    full = build_decoder(model.config)
    for counted in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**counted) == SLMForCausalLM(model.config, full).num_parameters(**counted)


def test_only_models_in_full_precision_are_changed(tmp_path: Path) -> None:
    write(tmp_path, "int4")
    with pytest.raises(UserError, match="its weights are quantized, too coarsely to be changed: name the full model"):
        load_decoder(tmp_path)


# -- how large --------------------------------------------------------------------------------------------------------


def expected_bytes(shape: SLMConfig, kind: str, group: int, embedding: str) -> int:
    """Bytes of all tensors, from shapes alone."""
    decoder, size = empty_decoder(shape), 0
    chosen = to_quantize(decoder, kind, group, embedding)
    for name, parameter in decoder.named_parameters():
        module, _, last = name.rpartition(".")
        if module not in chosen or last != "weight":
            size += 2 * parameter.numel()
        elif chosen[module] == "nf4":
            state = {"quant_type": "nf4", "blocksize": group, "dtype": "float32", "shape": [*parameter.shape]}
            size += parameter.numel() // 2 + 4 * parameter.numel() // group + 64 + len(json.dumps(state))
        else:
            size += parameter.numel() * (1 if chosen[module] == "int8" else 0.5) + 2 * parameter.numel() // group + 16
    return int(size)


@every_kind
@every_embedding
def test_a_file_is_as_large_as_its_shapes_say(kind: str, embedding: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind, embedding, vocab_size=4001) / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    shape = config("llama").model_copy(update={"vocab_size": 4001})
    assert path.stat().st_size - header == expected_bytes(shape, kind, 32, embedding)


def test_the_page_says_how_large_a_model_of_1_2_billion_parameters_is() -> None:
    page = (Path(__file__).parents[2] / "docs/quantization.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(int8|int4|nf4)( --embedding int8)?` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == 6
    shape = SLMConfig.from_preset("llama-3.2-1b")
    for kind, embedding, *sizes in rows:
        for group, size in zip((32, 64, 128), sizes):
            found = expected_bytes(shape, kind, group, embedding.split()[-1] if embedding else "bfloat16")
            assert f"{found / 1e9:.3f}" == size
    assert f"{expected_bytes(shape, 'int4', 32, 'bfloat16') / 1e9:.1f}" == "1.1"  # what the documents claim
