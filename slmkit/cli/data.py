"""`slm data prepare|inspect`."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmkit.cli.help import add_command, new_app

if TYPE_CHECKING:
    from slmkit.data import TokenShards
    from slmkit.tokenizer import SLMTokenizer

app = new_app("Prepare text and conversations, and look at them.", add_completion=False)

CLEAN = (
    "Documents to leave out: exact_duplicates=true, near_duplicates=0.8, min_characters, max_characters, min_words, "
    "max_words, scripts=[Latin], min_script_share, min_letter_share, evaluation=[FILE], evaluation_words=13. "
    "May be given several times."
)


def prepare(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE", help="Files, folders, URLs or data sets of the hub.")
    ],
    tokenizer: Annotated[str, typer.Option(help="A tokenizer or model directory, or a run.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Where the shards go.")],
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source", help="A setting of the sources, such as text_column=body; may be given several times."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="The sources hold conversations; the assistant's turns are marked to be learned.")
    ] = False,
    shuffle: Annotated[int | None, typer.Option(help="Shuffle all documents, with this seed.")] = None,
    clean: Annotated[list[str] | None, typer.Option(help=CLEAN)] = None,
    length: Annotated[
        int | None, typer.Option(help="With --chat: count the conversations that are longer than so many tokens.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Threads; default: one for each core.")] = None,
    shard_characters: Annotated[int, typer.Option(help="Characters of text in a shard.")] = 1 << 26,
    ray: Annotated[str | None, typer.Option(help="Prepare on this Ray cluster: an address, auto, or local.")] = None,
) -> None:
    """Tokenize text once, into files to train from.

    The result (shards) is a folder that several runs can read. If it was stopped, the same command goes on.

    Example: slm data prepare books/ --tokenizer tokenizers/book -o shards/books --shuffle 0
    Example: slm data prepare chats.jsonl --chat --tokenizer runs/book -o shards/chats
    """
    from slmkit.cli.progress import PreparationProgress
    from slmkit.cli.show import TerminalReporter, counted
    from slmkit.config import load_settings
    from slmkit.data import prepare_text
    from slmkit.data.cleaning.settings import CleaningSettings
    from slmkit.data.many_sources import Reading
    from slmkit.data.prepare import write_conversations
    from slmkit.data.source_settings import SourceSettings
    from slmkit.find import find_tokenizer_directory
    from slmkit.tokenizer import SLMTokenizer

    _check_options(chat, of_text=bool(clean or ray or shuffle is not None), of_chat=length is not None)
    cleaning = load_settings(CleaningSettings, {}, clean or [])
    settings = [load_settings(SourceSettings, {"path": path}, source or []) for path in sources]
    directory = find_tokenizer_directory(tokenizer)
    loaded = SLMTokenizer.from_pretrained(directory)
    options: dict[str, Any] = {"shuffle_seed": shuffle, "cleaning": cleaning, "shard_characters": shard_characters}
    reading = Reading(settings)
    with PreparationProgress("tokenizing", reading.fraction) as progress:
        if chat:
            encoded = reading.conversations(loaded, length)
            shards = write_conversations(encoded, loaded, output, sources=reading.descriptions, progress=progress)
        elif ray:
            from slmkit.data.cluster import prepare_text_on_ray

            shards = prepare_text_on_ray(settings, directory, output, address=ray, progress=progress, **options)
        else:
            shards = prepare_text(
                reading.documents(), loaded, output, sources=reading.descriptions, progress=progress,
                workers=workers, **options,
            )  # fmt: skip
    for line in reading.report():
        TerminalReporter().warn(line)
    _print_cleaning(shards)
    print(f"{counted(shards.header.documents, 'document')}, {len(shards):,} tokens in {output}")


def _check_options(chat: bool, of_text: bool, of_chat: bool) -> None:
    from slmkit.config import UserError

    if chat and of_text:
        raise UserError("--chat: conversations are not cleaned, shuffled or sent to a cluster; leave those options out")
    if of_chat and not chat:
        raise UserError("--length: only conversations are cut at the end of a row; leave it out, or add --chat")


def inspect(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="A folder of shards, such as runs/book/data/train.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Show documents too, decoded by this tokenizer, model or run.")
    ] = None,
    documents: Annotated[int, typer.Option(help="With --tokenizer: how many documents to show.")] = 2,
    length: Annotated[int | None, typer.Option(help="Count the documents that are longer than so many tokens.")] = None,
) -> None:
    """Show what a folder of shards holds.

    Counts, lengths and duplicates; with --tokenizer also the first documents, of conversations with what is learned.

    Example: slm data inspect runs/book/data/train --tokenizer runs/book
    """
    from slmkit.data import TokenShards
    from slmkit.data.shard_facts import find_facts
    from slmkit.find import find_tokenizer_directory
    from slmkit.tokenizer import SLMTokenizer

    opened = TokenShards.open(shards)
    header, facts = opened.header, find_facts(opened, length)
    order = "as they came" if header.shuffle_seed is None else f"shuffled by seed {header.shuffle_seed}"
    print(f"documents        {header.documents:,}, {order}")
    print(f"tokens           {header.tokens:,} as {header.dtype}, in {len(header.shards):,} shards")
    print(f"bytes per token  {header.text_bytes / max(1, header.tokens):.2f}")
    print(f"lengths          longest {facts.longest:,} tokens, median {facts.median_length:,}")
    print(f"duplicates       {facts.duplicates:,} documents are copies of one before them")
    print(f"tokenizer        {header.tokenizer[:12]}, {header.vocab_size:,} tokens")
    if facts.truncated is not None:
        print(f"truncated        {facts.truncated:,} documents are longer than {length:,} tokens")
    if length is not None and header.masked:
        _print_packing(opened, length)
    if facts.trained is not None:
        print(f"learned          {facts.trained:,} tokens ({facts.trained / max(1, len(opened)):.1%})")
    if header.perfect_loss is not None:
        print(f"perfect loss     {header.perfect_loss:.4f} nats per token")
    _print_cleaning(opened)
    if tokenizer is not None:
        loaded = SLMTokenizer.from_pretrained(find_tokenizer_directory(tokenizer))
        opened.check_tokenizer(loaded)
        _print_documents(opened, loaded, documents)


def _print_cleaning(shards: TokenShards) -> None:
    report = shards.header.cleaning
    if report is not None:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items()) or "none"
        print(f"cleaning         {report['kept']:,} of {report['documents']:,} documents kept; dropped: {dropped}")


def _print_packing(shards: TokenShards, length: int) -> None:
    """How conversations fill rows, and which of them teach nothing there."""
    from slmkit.data import ChatRows

    rows = ChatRows(shards, length)
    filled = rows.tokens / (rows.rows_in_epoch * length)
    print(f"packed           {rows.rows_in_epoch:,} rows of {length:,} tokens, {filled:.1%} of them filled")
    for line in rows.report():
        print(f"                 {line}")


def _print_documents(shards: TokenShards, tokenizer: SLMTokenizer, count: int, most: int = 400) -> None:
    """The first tokens of the first documents; what is learned of conversations is green and underlined."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    starts = [0, *shards.document_ends[:count].tolist()]
    for number, (start, end) in enumerate(pairwise(starts), start=1):
        console.print(f"\n--- document {number}, {end - start:,} tokens", markup=False)
        stop = min(end, start + most)
        ids = shards.tokens_in(start, stop)
        if not shards.header.masked:
            console.print(tokenizer.decode(ids.tolist()), markup=False, soft_wrap=True)
            continue
        trained = shards.trained_in(start, stop)
        borders = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
        parts = [
            (tokenizer.decode(ids[a:b].tolist()), "green underline" if trained[a] else "") for a, b in pairwise(borders)
        ]
        console.print(Text.assemble(*parts), soft_wrap=True)


add_command(app, "prepare", prepare)
add_command(app, "inspect", inspect)
