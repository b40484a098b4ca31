"""What is learned of a conversation is what `trl` learns of it (`assistant_only_loss`), token for token."""

from __future__ import annotations

import random
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from slmkit.tokenizer import SLMTokenizer
from tests.tokenizer.conftest import TEXTS, byte_level_with, save_foreign

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

CONVERSATIONS = 100

# trl learns what stands between `generation` and `endgeneration`: the built-in templates once more, so marked.
MARKED = {
    "chatml": """\
{%- for m in messages -%}
{{- '<|im_start|>' ~ m.role ~ '\n' -}}
{%- if m.role == 'assistant' -%}
{%- generation -%}{{- m.content ~ '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- m.content ~ '<|im_end|>' -}}{%- endif -%}
{{- '\n' -}}
{%- endfor -%}""",
    "llama3": """\
{%- for m in messages -%}
{{- bos_token if loop.first -}}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' -}}
{%- if m.role == 'assistant' -%}
{%- generation -%}{{- m.content.strip() ~ '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}{{- m.content.strip() ~ '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}""",
    "gemma": """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<start_of_turn>model\n' -}}
{%- generation -%}{{- m.content.strip() ~ '<end_of_turn>' -}}{%- endgeneration -%}
{{- '\n' -}}
{%- elif m.role == 'user' -%}
{{- '<start_of_turn>user\n' -}}
{%- if loop.index0 == 1 and messages[0].role == 'system' -%}{{- messages[0].content ~ '\n\n' -}}{%- endif -%}
{{- m.content.strip() ~ '<end_of_turn>\n' -}}
{%- endif -%}
{%- endfor -%}""",
}


@pytest.fixture(params=["own", "foreign"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> SLMTokenizer:
    """Of no template but ChatML, or of none: the tokens of the others are added."""
    if request.param == "own":
        tokenizer = SLMTokenizer(400)
        tokenizer.train(TEXTS)
        return tokenizer
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    directory = save_foreign(tmp_path / "foreign", byte_level_with(["<s>", "</s>"], "<s>"), config)
    return SLMTokenizer.from_pretrained(directory)


def random_text(chance: random.Random) -> str:
    """Words, digits, punctuation, code and other scripts, with white space at either end."""
    words = " ".join(TEXTS[:3]).split(" ")
    said = " ".join(chance.choices(words, k=chance.randint(1, 25)))
    return chance.choice(["", " ", "  "]) + (said.strip() or "yes") + chance.choice(["", "\n", " "])


def random_conversation(chance: random.Random) -> list[dict[str, str]]:
    """One to five exchanges, the last one sometimes without an answer, behind a system message or none."""
    system = [{"role": "system", "content": random_text(chance)}] if chance.random() < 0.5 else []
    turns = [{"role": role, "content": random_text(chance)} for role in ("user", "assistant") * chance.randint(1, 5)]
    unanswered = len(turns) > 2 and chance.random() < 0.2
    return [*system, *(turns[:-1] if unanswered else turns)]


def learned_by_trl(directory: Path, conversations: list[Any]) -> list[tuple[list[int], list[bool]]]:
    """Ids and masks of trl's trainer, of whole conversations and as its collator hands them to the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    trainer = trl.SFTTrainer(
        model=transformers.LlamaForCausalLM(config),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"messages": messages} for messages in conversations]),
        args=trl.SFTConfig(
            output_dir=str(directory / "trl"),
            assistant_only_loss=True,
            chat_template_path=None,
            max_length=None,
            packing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            eos_token=tokenizer.eos_token,
        ),
    )
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        found.append((batch["input_ids"][0].tolist(), (batch["labels"][0] != -100).tolist()))
    return found


def texts(tokenizer: SLMTokenizer, ids: list[int], trained: list[bool]) -> list[tuple[str, bool]]:
    """The text of each run of tokens that are all learned or all not."""
    runs = groupby(zip(ids, trained), key=lambda pair: pair[1])
    return [(tokenizer.decode(index for index, _ in run), is_trained) for is_trained, run in runs]


@pytest.mark.parametrize("name", MARKED)
def test_a_hundred_random_conversations_have_the_masks_of_trl(name: str, base: SLMTokenizer, tmp_path: Path) -> None:
    chance = random.Random(name)
    conversations = [random_conversation(chance) for _ in range(CONVERSATIONS)]
    ours = base.extended(chat_template=name)
    marked = ours.extended()
    marked.chat_template = MARKED[name]
    marked.save_pretrained(tmp_path / "marked")
    theirs = learned_by_trl(tmp_path / "marked", conversations)
    assert len(theirs) == CONVERSATIONS
    for messages, (ids, trained) in zip(conversations, theirs):
        chat = ours.encode_chat(messages)
        learned = texts(ours, ids, trained)
        assert texts(ours, chat.ids, chat.trained) == learned
        assert (chat.ids, chat.trained) == (ids, trained)
        assert sum(trained) > 0
