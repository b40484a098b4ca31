"""Rows as text: learned tokens in green, others dim and in brackets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text

from slmkit.config import UserError
from slmkit.data.packing import IGNORED
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources.documents import SPELLINGS
from slmkit.data.stream import Batches
from slmkit.training.diagnostics.xray import SampledRows, Vocabulary, XRay, examine

SHOWN = 2  # rows
HEAD, TAIL = 100, 40  # tokens shown of each row: at its beginning and its end
LEGEND = "In ⟦brackets⟧: read, not learned. Behind a \\ : text that spells a special token and is none."
BEFORE, LENGTH = 12, 48  # tokens of an excerpt: before the first learned one, and in total
LEARNED, READ, SPECIAL = "green", "dim", "bold reverse"


def write_xray(xray: XRay, vocabulary: Vocabulary, path: Path) -> None:
    """Write the X-ray as Markdown."""
    lines = ["# What is fed and what is learned", ""]
    lines += [f"- {name}: {value}" for name, value in xray.figures.items()]
    lines += [f"- **{finding}**" for finding in xray.findings]
    lines += [f"- note: {note}" for note in xray.notes]
    lines += ["", LEGEND, ""]
    for row in rendered_rows(xray.rows, vocabulary):
        lines += ["```", row.plain.replace("```", "'''"), "```", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def excerpts(rows: SampledRows, vocabulary: Vocabulary) -> list[Text]:
    """One-line excerpts around the first learned token: of the first row, or of both rows of a pair."""
    in_line = replace(vocabulary, decode=lambda ids: vocabulary.decode(ids).replace("\n", "↵"))
    found = []
    for row in range(2 if rows.kinds else 1):
        start = max(0, int(rows.learned[row].argmax()) - BEFORE)
        excerpt = replace(rows.part(slice(row, row + 1), slice(start, start + LENGTH)), kinds=())
        kind = Text(f"{rows.kinds[row]}: " if rows.kinds else "", "bold")
        found.append(Text.assemble(kind, "… " if start else "", rendered_rows(excerpt, in_line)[0], " …"))
    return found


def rendered_rows(rows: SampledRows, vocabulary: Vocabulary, count: int = SHOWN) -> list[Text]:
    """The first `count` rows as styled text, with brackets around tokens that are not learned."""
    found = []
    for row, (ids, labels, padding) in enumerate(zip(rows.ids[:count], rows.labels, rows.padding.sum(axis=1).tolist())):
        end = len(ids) - padding  # a token is learned if it is the label of the position before it
        tokens, learned = ids[:end].tolist(), [False, *(labels[: end - 1] != IGNORED).tolist()]
        if not padding and labels[-1] != IGNORED:  # the last label follows the row's last token
            tokens, learned = [*tokens, int(labels[-1])], [*learned, True]
        kind = Text(f"{rows.kinds[row]}: " if rows.kinds else "", "bold")
        filler = Text(f"⟦padding × {padding:,}⟧" if padding else "", READ)
        found.append(Text.assemble(kind, rendered(tokens, learned, vocabulary), filler))
    return found


def rendered(
    tokens: list[int], learned: list[bool], vocabulary: Vocabulary, head: int = HEAD, tail: int = TAIL
) -> Text:
    """Tokens as text in the style of `LEGEND`; of long sequences the first `head` and last `tail` tokens."""
    text = Text()
    if len(tokens) <= head + tail:
        _append(text, tokens, learned, vocabulary)
    else:
        _append(text, tokens[:head], learned[:head], vocabulary)
        text.append(f" … {len(tokens) - head - tail:,} tokens … ", READ)
        _append(text, tokens[-tail:], learned[-tail:], vocabulary)
    return text


def _append(text: Text, tokens: list[int], learned: list[bool], vocabulary: Vocabulary) -> None:
    """Append decoded tokens; adjacent ones of a kind are decoded together, since a character may span several."""
    specials = {*vocabulary.special_ids, *vocabulary.end_ids}
    for is_learned, group in groupby(zip(tokens, learned), key=lambda pair: pair[1]):
        span = Text(style=LEARNED if is_learned else READ)
        for is_special, part in groupby((token for token, _ in group), key=lambda token: token in specials):
            decoded = vocabulary.decode(list(part))
            shown = decoded if is_special else vocabulary.spelled.sub(r"\\\g<0>", decoded)
            span.append(shown, SPECIAL if is_special else None)
        text.append_text(span if is_learned else Text.assemble(("⟦", READ), span, ("⟧", READ)))


def check_data(
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
    """Check the first batches, print what will be learned, and write it to `xray.md` in `root`.

    Raises `UserError` with the reason if a check fails, unless `force`.
    """
    vocabulary = vocabulary_of(tokenizer, vocab_size)
    xray = examine(stream, vocabulary, train, validation, is_chat, is_padded)
    write_xray(xray, vocabulary, root / "xray.md")
    say(xray.summary())
    say(f"  {LEGEND}")
    for row in excerpts(xray.rows, vocabulary):
        say(Text.assemble("  ", row))
    for line in (*xray.notes, *xray.findings):
        say(f"x-ray: {line}")
    if is_chat and hasattr(tokenizer, "prompt_is_prefix") and not tokenizer.prompt_is_prefix():
        say(
            "x-ray: with this tokenizer the chat template's prompt ends in other tokens than stand before the answers "
            "it is trained on (as in transformers): chatml, whose prompt ends in one line end, avoids that"
        )
    if xray.findings and not force:
        more = f" (and {len(xray.findings) - 1} more)" if len(xray.findings) > 1 else ""
        raise UserError(f"training not started: {xray.findings[0]}{more}; --force trains anyway")
    return xray


def vocabulary_of(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """The `Vocabulary` of an `SLMTokenizer`, or of another tokenizer by the attributes that it has."""
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
