"""`slm data prepare|inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmkit.cli.options import SourceOptions, new_app, sources_of

if TYPE_CHECKING:
    from slmkit.data.prepare.preview import PreviewRow
    from slmkit.data.settings import Reads
    from slmkit.data.shards.reader import TokenShards
    from slmkit.tokenizer import SLMTokenizer

CLEAN = (
    "Documents to leave out: exact_duplicates=true, near_duplicates=0.8, min_characters, max_characters, min_words, "
    "max_words, scripts=[Latin], min_script_share, min_letter_share, evaluation=[FILE], evaluation_words=13. "
    "May be given several times."
)


def prepare(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help="Files, folders, URLs, data sets of the hub.")],
    tokenizer: Annotated[str, typer.Option(help="A tokenizer or model directory, or a run.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Where the shards go.")],
    source: SourceOptions = None,
    chat: Annotated[bool, typer.Option(help="The sources hold conversations (objective sft).")] = False,
    pairs: Annotated[bool, typer.Option(help="They hold pairs of answers, chosen and rejected (dpo).")] = False,
    judged: Annotated[bool, typer.Option(help="They hold answers labelled good or bad (kto).")] = False,
    shuffle: Annotated[int | None, typer.Option(help="Shuffle all documents, with this seed.")] = None,
    clean: Annotated[list[str] | None, typer.Option(help=CLEAN)] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Count conversations longer than this, in tokens.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one for each core.")] = None,
    shard_characters: Annotated[int, typer.Option(min=1, help="Characters of text in a shard.")] = 1 << 26,
    ray: Annotated[str | None, typer.Option(help="Prepare on this Ray cluster: an address, auto, or local.")] = None,
) -> None:
    """Tokenize text once, into files to train from.

    The result (shards) is a folder that several runs can read. If it was stopped, the same command goes on.

    Example: slm data prepare books/ --tokenizer tokenizers/book -o shards/books --shuffle 0
    Example: slm data prepare chats.jsonl --chat --tokenizer runs/book -o shards/chats
    """
    from slmkit.cli.show import TerminalReporter, counted, progress_bar
    from slmkit.config import load_settings
    from slmkit.data.settings import CleaningSettings
    from slmkit.files.find import find_tokenizer_directory

    reads = _kind_of_rows(chat, pairs, judged, bool(clean or ray or shuffle is not None), length)
    cleaning = load_settings(CleaningSettings, {}, clean or [])
    settings, directory = sources_of(sources, source), find_tokenizer_directory(tokenizer)
    from slmkit.data.prepare.conversations import encoded_rows, write_conversations  # imports torch: after the checks
    from slmkit.data.prepare.open_sources import items_of, share_read
    from slmkit.data.prepare.ray import prepare_text_on_ray
    from slmkit.data.prepare.text_to_shards import prepare_text
    from slmkit.data.shards.folder import claim
    from slmkit.data.sources import open_together
    from slmkit.tokenizer import SLMTokenizer

    loaded = SLMTokenizer.from_pretrained(directory)
    options: dict[str, Any] = {"shuffle_seed": shuffle, "cleaning": cleaning, "shard_characters": shard_characters}
    opened = open_together(settings)
    claim(output, {"sources": settings, "reads": reads, "tokenizer": loaded.fingerprint, **options})
    described = opened.describe()
    with progress_bar("tokenizing") as show:

        def progress(documents: int, tokens: int, text_bytes: int) -> None:
            show(f"{counted(documents, 'document')}, {tokens:,} tokens", share_read(opened, described), text_bytes)

        told: dict[str, Any] = {"sources": described, "progress": progress}
        if reads is not None:
            shards = write_conversations(encoded_rows(opened, reads, loaded, length), loaded, output, **told)
        elif ray:
            shards = prepare_text_on_ray(settings, directory, output, address=ray, progress=progress, **options)
        else:
            shards = prepare_text(items_of(opened, "text"), loaded, output, workers=workers, **told, **options)
    for line in opened.report():
        TerminalReporter().say(line)
    _print_cleaning(shards)
    print(f"{counted(shards.header.documents, 'document')}, {counted(len(shards), 'token')} in {output}")


def _kind_of_rows(chat: bool, pairs: bool, judged: bool, of_text: bool, length: int | None) -> Reads | None:
    """The kind of rows, None for text. Raises `UserError` for options that exclude each other."""
    from slmkit.config import UserError

    kinds: dict[Reads, bool] = {"conversations": chat, "pairs": pairs, "judgements": judged}
    named = [kind for kind, is_named in kinds.items() if is_named]
    if len(named) > 1:
        raise UserError("--chat, --pairs and --judged are three kinds of rows: name one")
    if named and of_text:
        raise UserError("conversations and answers are not cleaned, shuffled or sent to a cluster: omit those options")
    if length is not None and not chat:
        raise UserError("--length: only conversations are cut at the end of a row; leave it out, or add --chat")
    return named[0] if named else None


def inspect(
    shards: Annotated[str, typer.Argument(metavar="PATH", help="A file or folder of text or rows, or shards.")],
    tokenizer: Annotated[str | None, typer.Option(help="The tokenizer to show documents with.")] = None,
    documents: Annotated[int, typer.Option(min=0, help="How many documents or rows to show.")] = 2,
    source: SourceOptions = None,
    length: Annotated[int | None, typer.Option(min=1, help="Count the documents longer than this, in tokens.")] = None,
) -> None:
    """Show what a file, folder or shards hold.

    What is read and not learned stands in ⟦brackets⟧.

    Example: slm data inspect chats.jsonl --tokenizer runs/book
    Example: slm data inspect runs/book/data/train --tokenizer runs/book
    """
    settings = sources_of([shards], source)[0]
    from slmkit.data.prepare.open_sources import is_shards
    from slmkit.data.prepare.preview import (  # imports torch: after the arguments were checked
        samples_of_shards,
        samples_of_source,
    )
    from slmkit.data.shards.reader import TokenShards
    from slmkit.files.find import find_tokenizer_directory
    from slmkit.tokenizer import SLMTokenizer

    loaded = None if tokenizer is None else SLMTokenizer.from_pretrained(find_tokenizer_directory(tokenizer))
    if is_shards(settings):
        opened = TokenShards.open(shards)
        _print_facts(opened, length)
        if loaded is not None:
            opened.check_tokenizer(loaded)
            _print_samples(samples_of_shards(opened, documents), loaded)
        return
    if loaded is None:
        print("shown with ChatML, a byte a token; --tokenizer shows it with a tokenizer of your own")
        loaded = SLMTokenizer(260)
    read, samples = samples_of_source(settings, loaded, documents)
    _print_samples(samples, loaded)
    print()
    for line in read.report():
        print(line)


def _print_facts(shards: TokenShards, length: int | None) -> None:
    from slmkit.cli.show import counted
    from slmkit.data.prepare.preview import find_facts
    from slmkit.data.stream import ChatRows

    header, facts = shards.header, find_facts(shards, length)
    order = "as they came" if header.shuffle_seed is None else f"shuffled by seed {header.shuffle_seed}"
    print(f"documents        {header.documents:,}, {order}")
    print(f"tokens           {header.tokens:,} as {header.dtype}, in {counted(len(header.shards), 'shard')}")
    print(f"bytes per token  {header.text_bytes / max(1, header.tokens):.2f}")
    print(f"lengths          longest {facts.longest:,} tokens, median {facts.median_length:,}")
    copies = f"{counted(facts.duplicates, 'document')} {'is a copy' if facts.duplicates == 1 else 'are copies'}"
    print(f"duplicates       {copies} of one before")
    print(f"tokenizer        {header.tokenizer[:12]}, {header.vocab_size:,} tokens")
    if facts.truncated is not None:
        print(f"truncated        {facts.truncated:,} of the documents are longer than {length:,} tokens")
    if length is not None and header.masked and not header.judged:
        rows = ChatRows(shards, length)
        filled = rows.tokens / (rows.rows_in_epoch * length)
        print(f"packed           {rows.rows_in_epoch:,} rows of {length:,} tokens, {filled:.1%} of them filled")
        for line in rows.report():
            print(f"                 {line}")
    if facts.trained is not None:
        print(f"learned          {facts.trained:,} tokens ({facts.trained / max(1, len(shards)):.1%})")
    if header.judged:
        print(f"labels           {shards.labels.sum():,} good, {(~shards.labels).sum():,} bad")
    if header.perfect_loss is not None:
        print(f"perfect loss     {header.perfect_loss:.4f} nats per token")
    _print_cleaning(shards)


def _print_cleaning(shards: TokenShards) -> None:
    report = shards.header.cleaning
    if report is not None:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items()) or "none"
        print(f"cleaning         {report['kept']:,} of {report['documents']:,} documents kept; dropped: {dropped}")


def _print_samples(samples: Iterable[PreviewRow], tokenizer: SLMTokenizer) -> None:
    """Print the first and last tokens of each; tokens that are not learned are in brackets."""
    from rich.console import Console

    from slmkit.training.diagnostics.xray_page import LEGEND, rendered, vocabulary_of

    console, vocabulary = Console(highlight=False), vocabulary_of(tokenizer, len(tokenizer))
    console.print(LEGEND, markup=False, soft_wrap=True)
    for title, ids, trained in samples:
        console.print(f"\n--- {title}", markup=False)
        console.print(rendered(ids, trained, vocabulary, head=400, tail=100), soft_wrap=True)


app = new_app("Prepare text and conversations, and look at them.", prepare, inspect, add_completion=False)
