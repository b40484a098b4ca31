"""The X-ray of a run that is about to begin, with the tokenizer that training itself does not know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from slmkit.config import UserError
from slmkit.data.shards import TokenShards
from slmkit.data.sources.documents import SPELLINGS
from slmkit.data.stream import Batches
from slmkit.training.xray import Vocabulary, XRay, examine
from slmkit.training.xray_page import LEGEND, excerpts, write_xray


def look(
    stream: Batches,
    tokenizer: Any,
    vocab_size: int,
    root: Path,
    say: Callable[[str | Text], None],
    train: Sequence[TokenShards] = (),
    validation: Sequence[TokenShards] = (),
    is_chat: bool = False,
    is_padded: bool = False,
    force: bool = False,
) -> XRay:
    """Show what is about to be fed and learned, and leave it as `xray.md` in `root`.

    Raises `UserError` with the reason where something is off, unless `force`.
    """
    vocabulary = vocabulary_of(tokenizer, vocab_size)
    xray = examine(stream, vocabulary, train, validation, is_chat, is_padded)
    write_xray(xray, vocabulary, root / "xray.md")
    say(xray.summary())
    for row in excerpts(xray.rows, vocabulary):
        say(Text.assemble("  ", row))
    say(f"  {LEGEND}")
    for line in (*xray.notes, *xray.findings):
        say(f"x-ray: {line}")
    if is_chat and hasattr(tokenizer, "prompt_is_history") and not tokenizer.prompt_is_history():
        say(
            "x-ray: with this tokenizer the chat template's prompt ends in other tokens than stand before the answers "
            "it is trained on (as in transformers): chatml, whose prompt ends in one line end, avoids that"
        )
    if xray.findings and not force:
        more = f" (and {len(xray.findings) - 1} more)" if len(xray.findings) > 1 else ""
        raise UserError(f"training not started: {xray.findings[0]}{more}; --force trains anyway")
    return xray


def vocabulary_of(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """What the X-ray wants of a tokenizer: of an `SLMTokenizer` everything, of another whatever it has."""
    specials = getattr(tokenizer, "special_tokens", {})
    eos = getattr(tokenizer, "eos_token_id", None)
    return Vocabulary(
        decode=tokenizer.decode,
        size=vocab_size,
        end_ids=getattr(tokenizer, "stop_token_ids", {eos} if eos is not None else set()),
        special_ids=set(specials.values()) if isinstance(specials, dict) else set(),
        spellings={*SPELLINGS, *specials},
        bos_id=getattr(tokenizer, "bos_token_id", None),
        pad_id=getattr(tokenizer, "pad_token_id", None),
        encode=tokenizer.encode if hasattr(tokenizer, "fingerprint") else None,
        fingerprint=getattr(tokenizer, "fingerprint", None),
    )
