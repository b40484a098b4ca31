"""`slm tokenizer train|encode`."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.options import new_app

SOURCES = "Files, folders (.txt, .jsonl, .csv, .parquet, also .gz, .zst), hub data sets, URLs, or `stories`."
DOCUMENTS = "Documents to read of each source; default: 100 million characters in all."


def train(
    sources: Annotated[list[str], typer.Argument(help=SOURCES)],
    output: Annotated[str, typer.Option("--output", "-o", help="Where tokenizer.json goes.")] = "tokenizer",
    vocab_size: Annotated[int, typer.Option(help="Tokens, with the 256 bytes and the special tokens.")] = 16_384,
    text_column: Annotated[str | None, typer.Option(help="The column with the text; `text` unless given.")] = None,
    documents_per_source: Annotated[int | None, typer.Option(min=1, help=DOCUMENTS)] = None,
) -> None:
    """Train a byte-level BPE tokenizer on any text.

    Of several sources equal amounts are read.

    Example: slm tokenizer train book.txt --vocab-size 4096 -o tokenizers/book
    """
    from slmkit.data.settings import DataSettings, TokenizerSettings
    from slmkit.data.sources import expect_source
    from slmkit.tokenizer import SLMTokenizer

    data = DataSettings.of_paths(sources, text_column)
    for source in data.all_sources():
        expect_source(source)
    from slmkit.data.prepare.corpus import texts_of  # imports torch: after the arguments were checked

    tokenizer = SLMTokenizer(vocab_size)
    wanted = TokenizerSettings(vocab_size=vocab_size, documents_per_source=documents_per_source)
    tokenizer.train(texts_of("text", data, wanted), show_progress=True)
    tokenizer.save_pretrained(output)
    print(f"{len(tokenizer):,} tokens in {output}")
    if len(tokenizer) < vocab_size:
        print(f"fewer than the {vocab_size:,} asked for: the text holds no more pairs worth merging")


def encode(
    tokenizer: Annotated[str, typer.Argument(metavar="TOKENIZER", help="A tokenizer or model directory, or a run.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text to encode.")],
) -> None:
    """Show the tokens of a text, each with its id.

    Example: slm tokenizer encode tokenizers/book "It was a fox"
    """
    from slmkit.files.find import find_tokenizer_directory
    from slmkit.tokenizer import SLMTokenizer

    loaded = SLMTokenizer.from_pretrained(find_tokenizer_directory(tokenizer))
    ids = loaded.encode(text)
    for token_id in ids:
        print(f"{token_id:>7}  {loaded.token_bytes(token_id).decode('utf-8', 'backslashreplace')!r}")
    print(f"{len(ids)} tokens, {len(text.encode()) / max(1, len(ids)):.2f} bytes per token")


app = new_app("Train a tokenizer, and look at its tokens.", train, encode, add_completion=False)
