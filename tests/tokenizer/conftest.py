"""A tokenizer trained on a little text of many kinds, and tokenizers such as others make them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from slmkit.tokenizer import ChatTokens, SLMTokenizer
from slmkit.tokenizer.encoder import rows_to_learn

TEXTS = [
    "Once upon a time there was a little cat. The cat sat by the sea, and the sea sang to the cat.\n\n",
    "It's 12345 o'clock; they'll say we've no time!  def f(x):\n\treturn x ** 2 + f(x - 1)\r\n",
    "Les élèves étaient là, à côté de la forêt. Die Straße ist schön. 猫が海のそばに座った。猫が歌った。",
    "the user said <|im_end|> and <|im_start|>assistant, and the assistant said hello there hello there",
] * 4

LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] not in ['user', 'assistant'] -%}{{ raise_exception('no such role') }}{%- endif -%}
    {%- set name = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + name + '\n' + (first if loop.first else '') }}{{ message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""


@pytest.fixture(scope="session")
def tokenizer() -> SLMTokenizer:
    """Trained to more tokens than the bytes; not to be changed by a test."""
    tokenizer = SLMTokenizer(400)
    tokenizer.train(TEXTS)
    assert len(tokenizer) == 400
    return tokenizer


def save_foreign(directory: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def gpt2_directory(tmp_path: Path) -> Path:
    """As OpenAI's: bytes first, `<|endoftext|>` last, a config that names no token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
        ),
    )
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=True)])
    config = {"model_max_length": 1024, "tokenizer_class": "GPT2Tokenizer"}
    return save_foreign(tmp_path / "gpt2", tokenizer, config)


def byte_level_with(special: list[str], bos: str) -> Tokenizer:
    """As Llama 3's: a regular expression of its own, special tokens last, `bos` put before every text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


@pytest.fixture
def llama_directory(tmp_path: Path) -> Path:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"content": "<|end_of_text|>", "__type": "AddedToken"},
        "chat_template": LLAMA_TEMPLATE,
    }
    return save_foreign(tmp_path / "llama", byte_level_with(special, "<|begin_of_text|>"), config)


@pytest.fixture
def gemma_directory(tmp_path: Path) -> Path:
    """Its template in a file of its own, as transformers 5 saves it."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "chat_template": "an older one",
    }
    directory = save_foreign(tmp_path / "gemma", byte_level_with(special, "<bos>"), config)
    (directory / "chat_template.jinja").write_text(GEMMA_TEMPLATE)
    return directory


@pytest.fixture
def sentencepiece_directory(tmp_path: Path) -> Path:
    """As Llama 2's: not byte-level, spaces written as `▁`, unknown characters as byte tokens."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for token in ["▁", "t", "h", "e", "▁t", "he", "▁the"]:
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return save_foreign(tmp_path / "sentencepiece", tokenizer, config)


def learned_rows(tokenizer: SLMTokenizer, messages: list[dict]) -> list[ChatTokens]:
    """The rows that are trained on, as the data's preparation makes them."""
    (rows,) = tokenizer.encode_rendered([tokenizer.render_chat(messages)])
    return [row.to_lists() for row in rows_to_learn(rows)]
