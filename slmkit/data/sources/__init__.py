"""Sources of text: files and folders, hub data sets, URLs, and the built-in corpus, read as streams.

Kinds of files: see `files.py`. A text file is one long text, or documents separated by lines with `<|endoftext|>`, as
in TinyStories' files. Every item comes with a position from which reading can continue, and every error names file and
place.
"""

from slmkit.data.sources.built_in import BUILT_IN, STORIES, STORY_WORLDS, SUMS, WORLDS
from slmkit.data.sources.documents import PIECE, BadRow, Document, Judged, Message, Pair, Position, cut_point, tools_of
from slmkit.data.sources.remote import RetryPolicy
from slmkit.data.sources.source import Source, expect_source, open_source, open_together

__all__ = [
    "BUILT_IN", "PIECE", "STORIES", "STORY_WORLDS", "SUMS", "WORLDS", "BadRow", "Document", "Judged",
    "Message", "Pair", "Position", "RetryPolicy", "Source", "cut_point", "expect_source", "open_source",
    "open_together", "tools_of",
]  # fmt: skip
