"""Sources of text: files and folders, hub data sets, URLs, and the built-in corpus, read as streams.

Formats: `.txt`, `.jsonl` (or `.json`: one object per line) and `.csv`, plain or as `.gz` or `.zst`, and `.parquet`. A
`.txt` file is one long text, or documents separated by lines with `<|endoftext|>`, as in TinyStories' files. Every item
comes with a position from which reading can continue, and every error names file and place.
"""

from slmkit.data.sources.built_in import BUILT_IN, PRIMER, STORIES, SUMS
from slmkit.data.sources.documents import PIECE, BadRow, Document, Message, Position, cut_point, tools_of
from slmkit.data.sources.files import Paths
from slmkit.data.sources.folders import describe_sources, find_files
from slmkit.data.sources.open import open_source, read_conversations, read_documents
from slmkit.data.sources.pair_formats import Judged, Pair
from slmkit.data.sources.remote import RetryPolicy
from slmkit.data.sources.source import Source

__all__ = [
    "BUILT_IN", "PIECE", "PRIMER", "STORIES", "SUMS", "BadRow", "Document", "Judged", "Message", "Pair", "Paths",
    "Position", "RetryPolicy", "Source", "cut_point", "describe_sources", "find_files", "open_source",
    "read_conversations", "read_documents", "tools_of",
]  # fmt: skip
