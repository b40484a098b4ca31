"""`SLMForCausalLM` as code written for transformers uses it: its output, its loss, its trainers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slmkit import SLMConfig, SLMEnsemble, SLMForCausalLM, SLMTokenizer, UserError
from slmkit.generation.ensemble import Ensemble
from slmkit.model.families import FAMILIES
from tests.parity.configurations import DRAW, VOCAB
from tests.parity.twins import twins

SHAPE = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def small(**changes: Any) -> SLMForCausalLM:
    torch.manual_seed(0)
    return SLMForCausalLM(SLMConfig(**(SHAPE | {"intermediate_size": 64} | changes)))


def padded_batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention_mask and labels [4, 20]: whole, padded on the left, on the right, and with a hole."""
    ids = torch.randint(VOCAB, (4, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[1, :7], mask[2, 15:], mask[3, 9:11] = 0, 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 5:9] = -100
    return ids, mask, labels


@pytest.mark.parametrize(("family", "number"), list(itertools.product(DRAW, (0, 5))))
def test_logits_of_padded_rows_and_losses_are_those_of_transformers(family: str, number: int) -> None:
    pair, (ids, mask, labels) = twins(family, number), padded_batch()
    ours = SLMForCausalLM(pair.config, pair.ours)
    with torch.no_grad():
        a, b = (model(ids, attention_mask=mask) for model in (ours, pair.theirs))
        assert (a.logits - b.logits)[mask.bool()].abs().max() < 1e-4
        whole = {"labels": labels, "attention_mask": torch.ones_like(mask)}
        for more in ({}, {"num_items_in_batch": 11}, {"num_items_in_batch": torch.tensor(11)}):
            torch.testing.assert_close(ours(ids, **whole, **more).loss, pair.theirs(ids, **whole, **more).loss)
        one_side = {"attention_mask": mask[2:3], "labels": labels[2:3]}
        torch.testing.assert_close(ours(ids[2:3], **one_side).loss, pair.theirs(ids[2:3], **one_side).loss)


def test_gradients_of_a_padded_batch_are_those_of_transformers_and_finite_with_capped_scores() -> None:
    for family in ("llama", "gemma2"):
        pair, (ids, mask, labels) = twins(family, 1), padded_batch()
        ours = SLMForCausalLM(pair.config, pair.ours).train()
        ours(ids, attention_mask=mask, labels=labels).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
        if family == "llama":
            pair.theirs.zero_grad()
            pair.theirs(ids, attention_mask=mask, labels=labels).loss.backward()
            theirs = pair.theirs.get_input_embeddings().weight.grad
            torch.testing.assert_close(ours.get_input_embeddings().weight.grad, theirs, atol=1e-5, rtol=1e-4)
        ours.zero_grad()


def test_right_padding_costs_no_mask() -> None:
    """So that it takes the fused causal kernel, as a row without padding does."""
    model, (ids, mask, _) = small(), padded_batch()
    asked: list[Any] = []
    model.decoder.register_forward_pre_hook(lambda m, a, k: asked.append(k["attention_mask"]), with_kwargs=True)
    model(ids.clamp(max=59)[[0, 2]], attention_mask=mask[[0, 2]])
    model(ids.clamp(max=59)[[1]], attention_mask=mask[[1]])
    assert asked[0] is None
    assert asked[1] is not None


def test_an_output_is_read_as_one_of_transformers() -> None:
    model, ids = small(), torch.arange(12)[None]
    plain, taught = model(ids), model(ids, labels=ids)
    assert plain.loss is None
    assert plain[0] is plain.logits is plain["logits"] is plain.to_tuple()[0]
    assert plain.logits.dtype == torch.float32
    loss, logits = taught
    assert loss is taught.loss is taught[0] is taught["loss"]
    assert logits is taught.logits is taught[1] is taught[-1]
    assert taught[:1] == (loss,)
    assert list(taught.keys()) == ["loss", "logits"] == list(dict(taught))
    assert "loss" in taught
    assert "loss" not in plain
    with pytest.raises(AttributeError, match="loss, logits"):
        _ = taught.hidden_states
    with pytest.raises(KeyError):
        _ = plain["loss"]


def test_an_ensemble_has_the_same_output() -> None:
    models = [small().eval(), small(hidden_size=48).eval()]
    ensemble, (ids, mask, labels) = SLMEnsemble(models), padded_batch()
    ids, labels = ids.clamp(max=59), labels.clamp(max=59)
    with torch.no_grad():
        output = ensemble(ids, attention_mask=mask, labels=labels)
        each = [model(ids, attention_mask=mask).logits.softmax(-1) for model in models]
    torch.testing.assert_close(output.logits.softmax(-1)[mask.bool()], ((each[0] + each[1]) / 2)[mask.bool()])
    assert isinstance(ensemble.decoder, Ensemble)
    assert output.loss > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("assign", [False, True])
def test_a_model_is_built_on_the_meta_device_and_filled_later(family: str, assign: bool) -> None:
    config = SLMConfig(**SHAPE, model_type=family)
    torch.manual_seed(1)
    model = SLMForCausalLM(config).eval()
    with torch.device("meta"):
        empty = SLMForCausalLM(config).eval()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    ids = torch.zeros(2, 20, dtype=torch.long, device="meta")
    for mask in (None, torch.ones_like(ids)):
        output = empty(ids, attention_mask=mask, labels=ids)
        assert (output.logits.shape, output.loss.shape) == ((2, 20, 60), ())
    for call in (lambda: empty.generate(ids, max_new_tokens=2), lambda: empty.save_pretrained("nowhere")):
        with pytest.raises(UserError, match="^the model has no weights yet, it is on the meta device: to_empty"):
            call()
    with pytest.raises(UserError, match=r"^input_ids: on cpu, the model is on meta: input_ids.to\(model.device\)$"):
        empty(torch.arange(20)[None])
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(empty(ids).logits, model(ids).logits)


def test_half_precision_keeps_exact_rotations() -> None:
    model = small().bfloat16()
    assert model.dtype == torch.bfloat16
    assert model.decoder.rotary[0].frequencies.dtype == torch.float32


def test_more_tokens_get_rows_and_what_was_known_stays() -> None:
    for tied in (True, False):
        model, ids = small(tie_word_embeddings=tied).eval(), torch.arange(10)[None]
        before = model(ids).logits
        assert model.resize_token_embeddings(64) is model.get_input_embeddings()
        assert model.config.vocab_size == 64
        assert model.get_output_embeddings().weight.shape[0] == 64
        after = model(ids).logits
        torch.testing.assert_close(after[..., :60], before)
        with pytest.raises(UserError, match="the model has 64 tokens, and none is removed"):
            model.resize_token_embeddings(10)


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.arange(12), "labels": torch.arange(12)} for _ in range(count)]


def test_transformers_trainer_trains_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def trainer(model: SLMForCausalLM, **changes: Any) -> Any:
        settings = {
            "max_steps": 16, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
            "eval_strategy": "steps", "eval_steps": 8, "save_steps": 8, "use_cpu": True, "report_to": [],
            "disable_tqdm": True,
        } | changes  # fmt: skip
        arguments = transformers.TrainingArguments(str(tmp_path / "theirs"), **settings)
        return transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(4))

    model = small()
    one = trainer(model)
    before = one.evaluate()["eval_loss"]
    one.train()
    after = one.evaluate()["eval_loss"]
    assert after < before / 2
    assert one.predict(rows(4)).predictions.shape == (4, 12, 60)
    torch.testing.assert_close(
        model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.item(), after, atol=1e-5, rtol=0
    )
    again = trainer(small())
    again.train(resume_from_checkpoint=str(tmp_path / "theirs" / "checkpoint-8"))
    torch.testing.assert_close(again.model.state_dict(), model.state_dict())
    recomputed = trainer(small(), activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 2})
    recomputed.train()
    assert recomputed.model.decoder.recompute_every == 2
    torch.testing.assert_close(recomputed.model.state_dict(), model.state_dict())
    model.save_pretrained(tmp_path / "mine")
    assert torch.equal(SLMForCausalLM.from_pretrained(tmp_path / "mine")(torch.arange(9)[None]).logits,
                       model.eval()(torch.arange(9)[None]).logits)  # fmt: skip


def test_accelerate_trains_and_saves(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator, model = accelerate.Accelerator(cpu=True), small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(rows(24), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path, is_main_process=accelerator.is_main_process, save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )  # fmt: skip
    again = SLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.decoder.embedding.weight, accelerator.unwrap_model(model).decoder.embedding.weight)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_a_config_answers_what_tools_for_transformers_ask() -> None:
    config = small().config
    config.use_cache = False  # transformers.Trainer sets it
    assert config.get_text_config() is config
    assert config.to_dict() == config.published()
    assert '"hidden_size": 32' in config.to_json_string()
    assert "use_cache" not in config.model_dump()


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        *[(wrong, {}, "input_ids: expected") for wrong in ([[1, 2]], "a", IDS[0], IDS.float(), IDS[:, :0], IDS.bool())],
        (IDS + 100, {}, "input_ids: found 111"),
        (IDS - 5, {}, "input_ids: found -5"),
        (IDS, {"attention_mask": torch.zeros(2, 1, 6, 6)}, "attention_mask: expected"),
        (IDS, {"attention_mask": torch.ones(2, 3)}, "attention_mask: expected"),
        (IDS, {"attention_mask": torch.ones(1, 6)}, "attention_mask: expected"),
        (IDS, {"labels": IDS[:, :3]}, "labels: expected the shape"),
        (IDS, {"labels": IDS.float()}, "labels: expected whole numbers"),
        (IDS, {"labels": IDS - 1}, "labels: found -1"),
        (IDS, {"seed": 2**63}, r"^seed: expected 0 or more and less than 2\^63, found"),
        (IDS, {"do_sample": 2}, "^do_sample: expected true or false, found 2"),
        (IDS, {"temperature": "0.5"}, "^temperature: expected a number, found '0.5'"),
        (IDS, {"top_k": 1.5}, "top_k: expected a whole number, found 1.5"),
        (IDS, {"eos_token_id": "a"}, "eos_token_id 'a'"),
        (IDS, {"eos_token_id": 60}, "eos_token_id 60: expected an id or a list of ids from 0 to 59"),
        (IDS, {"eos_token_id": [1, -1]}, r"eos_token_id \[1, -1\]: expected"),
        (IDS, {"pad_token_id": -1}, "pad_token_id -1: expected an id from 0 to 59"),
        (IDS, {"pad_token_id": [1]}, r"pad_token_id \[1\]: expected an id from"),
        (IDS, {"max_new_tokens": 0}, "^max_new_tokens 0: expected 1 or more"),
        (IDS, {"max_new_tokens": -1}, "^max_new_tokens -1: expected 1 or more"),
        (IDS, {"max_new_tokens": "3"}, "max_new_tokens '3'"),
    ],
)
def test_what_is_no_batch_of_ids_is_refused_in_one_line(ids: Any, options: dict, said: str) -> None:
    model = small()
    calls = [model] if options.keys() <= {"attention_mask", "labels"} else [model.generate]
    for call in [*calls, model.generate] if not options else calls:
        with pytest.raises(UserError, match=said) as raised:
            call(ids, **options)
        assert "\n" not in str(raised.value)


def test_do_sample_may_be_none_or_a_number_as_in_transformers() -> None:
    model = small()
    for given, same in ((None, False), (0, False), (1, True)):
        found, expected = (model.generate(IDS, max_new_tokens=9, do_sample=one, seed=1) for one in (given, same))
        assert torch.equal(found, expected)


def test_a_text_that_the_context_ends_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    assert model.generate(IDS, max_new_tokens=100, eos_token_id=[]).shape == (2, 64)
    assert model.generate(IDS, max_length=100, eos_token_id=[]).shape == (2, 64)
    assert [line.replace("94", "100") for line in caplog.messages] == [
        "the model's context of 64 tokens ends the text after 58 new ones, not 100"
    ] * 2
    caplog.clear()
    for options in ({}, {"max_new_tokens": 58}, {"max_length": 64}):
        assert model.generate(IDS, eos_token_id=[], **options).shape == (2, 64)
    assert model.generate(IDS, max_new_tokens=100, eos_token_id=list(range(60))).shape == (2, 7)
    assert not caplog.messages


def test_narrow_labels_are_read_as_narrow_ids_are() -> None:
    model = small()
    torch.testing.assert_close(model(IDS.int(), labels=IDS.int()).loss, model(IDS, labels=IDS).loss)


def test_what_is_no_model_and_no_device_is_one_line(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    for device in ("gpu", "cuda", "mps"):
        if device == "gpu" or not getattr(torch, device).is_available():
            with pytest.raises(UserError, match=f"^device '{device}' is not available; this machine has: .*cpu"):
                SLMForCausalLM.from_pretrained(tmp_path, device=device)
    for read in (SLMForCausalLM, SLMConfig, SLMTokenizer):
        with pytest.raises(UserError, match="^expected a directory or a name on the hub, found nothing$"):
            read.from_pretrained(None)
