"""`slm data prepare|inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="Make token shards, and look into them.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Text files or folders.")],
    tokenizer: Annotated[str, typer.Option(help="A tokenizer or model directory, or a run.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Where the shards go.")],
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
) -> None:
    """Tokenize files once, into shards that are read as memory.

    Example: slm data prepare books/ --tokenizer tokenizers/book -o shards/books
    """
    from slmkit.cli.show import TerminalReporter
    from slmkit.data import describe_sources, prepare_text, read_documents
    from slmkit.tokenizer import SLMTokenizer
    from slmkit.training.run import find_tokenizer_directory

    shards = prepare_text(
        read_documents(sources, text_column),
        SLMTokenizer.from_pretrained(find_tokenizer_directory(tokenizer)),
        output,
        sources=describe_sources(sources),
        progress=TerminalReporter().counter("tokenizing"),
    )
    print(f"{shards.header.documents:,} documents, {len(shards):,} tokens in {output}")


@app.command()
def inspect(
    shards: Annotated[str, typer.Argument(help="A directory of shards, such as runs/book/data/train.")],
    tokenizer: Annotated[str | None, typer.Option(help="Also show documents, decoded by this tokenizer.")] = None,
    documents: Annotated[int, typer.Option(help="How many documents to show.")] = 2,
) -> None:
    """Say what a directory of shards holds.

    Example: slm data inspect runs/book/data/train --tokenizer runs/book
    """
    from slmkit.data import TokenShards
    from slmkit.tokenizer import SLMTokenizer
    from slmkit.training.run import find_tokenizer_directory

    opened = TokenShards.open(shards)
    header = opened.header
    print(f"documents        {header.documents:,}")
    print(f"tokens           {header.tokens:,} as {header.dtype}")
    print(f"bytes per token  {header.text_bytes / max(1, header.tokens):.2f}")
    print(f"tokenizer        {header.tokenizer[:12]}, {header.vocab_size:,} tokens")
    if header.perfect_loss is not None:
        print(f"perfect loss     {header.perfect_loss:.4f} nats per token")
    if tokenizer is None:
        return
    loaded = SLMTokenizer.from_pretrained(find_tokenizer_directory(tokenizer))
    opened.check_tokenizer(loaded)
    for number, end in enumerate(opened.document_ends[:documents].tolist(), start=1):
        start = int(opened.document_ends[number - 2]) if number > 1 else 0
        print(f"\n--- document {number}, {end - start:,} tokens")
        print(loaded.decode(opened.tokens_in(start, min(end, start + 400)).tolist()))
