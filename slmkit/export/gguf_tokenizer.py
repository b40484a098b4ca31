"""A tokenizer in a GGUF: its tokens, how text is split and merged, its chat template and the tokens that end a text.

llama.cpp has its own code for each way to split text, by name (`tokenizer.ggml.pre`). The name here is that of the
same splitting; a splitting that llama.cpp does not have is refused, since under another's name text would silently
get other ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from slmkit.config import UserError
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.directory import QWEN

if TYPE_CHECKING:
    import gguf

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace("[LETTERS]", r"\p{L}").replace("LETTERS", r"\p{L}").replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
}


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: SLMTokenizer, directory: Path, rows: int) -> None:
    """Write the tokenizer's metadata. `rows`: of the model's embedding; `directory`: the model's.

    Raises `UserError` for a tokenizer that llama.cpp does not have, and for ids without a row.
    """
    from gguf import TokenType

    library = tokenizer._whole()
    content = json.loads(library.to_str())
    vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
    beyond = {token: index for token, index in vocabulary.items() if index >= rows}
    if beyond:
        raise UserError(f"{directory}: the model has {rows:,} rows, and none for {beyond}")
    texts = [f"[UNUSED_{index}]" for index in range(rows)]
    types = [TokenType.UNUSED] * rows
    for token, index in vocabulary.items():
        texts[index], types[index] = token, TokenType.NORMAL
    for index in tokenizer.added_words.values():
        types[index] = TokenType.USER_DEFINED
    for index in tokenizer.special_tokens.values():
        types[index] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    _add_ends(writer, tokenizer)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _add_ends(writer: gguf.GGUFWriter, tokenizer: SLMTokenizer) -> None:
    begins = tokenizer.bos_token_id
    writer.add_bos_token_id(tokenizer.eos_token_id if begins is None else begins)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.end_of_turn_id != tokenizer.eos_token_id:
        writer.add_eot_token_id(tokenizer.end_of_turn_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(bool(tokenizer.beginning) and tokenizer.chat_template is None)
