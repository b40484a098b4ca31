"""What is held out for validation: documents and conversations by a hash of their text, or the end of a few texts."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from slmkit.config import UserError
from slmkit.data.shards.writer import disk_error
from slmkit.data.sources import Document, cut_point

T = TypeVar("T")
HELD_OUT = 10  # documents; a corpus with too few for that is cut in two instead


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a hash of the text selects it: copies of a document are on the same side of the split."""
    return hashed(text) < fraction


def hashed(text: str) -> float:
    """A pseudorandom number in [0, 1) determined by the text."""
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "little") / 2**48
    )


def written(conversation: object) -> str:
    """A conversation, pair or judged answer as a string, to be hashed."""
    return json.dumps(conversation, sort_keys=True)


def picked_by_hash(documents: Iterable[Document], fraction: float) -> Iterator[tuple[Document, bool]]:
    """Every document or piece, and whether it is held out; the first piece decides for the whole document."""
    begins, held_out = True, False
    for document in documents:
        if begins:
            held_out = is_held_out(document.text, fraction)
        begins = document.ends
        yield document, held_out


def split_validation(
    read: Callable[[], Iterable[Document]], fraction: float, folder: Path | None = None
) -> tuple[Iterator[Document], Iterator[Document]]:
    """Documents to train on, and about `fraction` of them held out, to be read after those; they wait in `folder`.

    `read` starts reading the corpus, twice: the first time only until it is known to be large. Many documents are split
    by a hash of their text, so that copies of a document are on one side. Few documents (one long text, say) are cut in
    two at a line end, and the last part is held out. Raises `UserError` for a text too short to cut, and if all
    documents are copies on one side.
    """
    documents = characters = 0
    many, sides = math.ceil(HELD_OUT / fraction), set[bool]()
    for document, held_out in picked_by_hash(read(), fraction):
        documents += document.ends
        characters += len(document.text)
        sides.add(held_out)
        if documents >= many and len(sides) == 2:
            return _in_two(lambda: picked_by_hash(read(), fraction), folder)
    if documents >= many:
        raise UserError(_copies(f"{documents:,} documents"))
    place = characters - math.ceil(characters * fraction)
    if place <= 0:
        raise UserError(
            f"too little text to hold any out: {characters} characters; add text or drop the validation split"
        )
    return _in_two(lambda: _cut_in_two(read(), place), folder)


def split_conversations(conversations: Sequence[T], fraction: float) -> tuple[list[T], list[T]]:
    """Conversations to train on, and about `fraction` of them (at least one) held out by a hash; copies stay together.

    Raises `UserError` if one side would be empty.
    """
    hashes = [hashed(written(conversation)) for conversation in conversations]
    limit = max(fraction, min(hashes, default=0.0))
    train = [one for one, number in zip(conversations, hashes) if number > limit]
    held_out = [one for one, number in zip(conversations, hashes) if number <= limit]
    if not train:
        what, are_copies = f"{len(conversations):,} conversations", len({*hashes}) < len(hashes)
        raise UserError(_copies(what) if are_copies else f"{what} are too few to hold any out; add some")
    return train, held_out


def _copies(what: str) -> str:
    return (
        f"the {what} are copies of one text, or of very few, so that none can be held out for validation: add other "
        "text, or name text of its own as data.validation"
    )


def _in_two(
    read: Callable[[], Iterable[tuple[Document, bool]]], folder: Path | None
) -> tuple[Iterator[Document], Iterator[Document]]:
    """The documents to train on, and those held out, which wait in a file of `folder` while the others are read."""
    waiting = tempfile.TemporaryFile("w+", encoding="ascii", dir=folder)  # noqa: SIM115 (both functions use it)
    all_read: list[bool] = []

    def training() -> Iterator[Document]:
        for document, held_out in read():
            if not held_out:
                yield document
                continue
            try:
                waiting.write(json.dumps(document) + "\n")
            except OSError as error:
                raise disk_error(error, folder or Path(tempfile.gettempdir())) from None
        all_read.append(True)

    def held_out() -> Iterator[Document]:
        if not all_read:
            raise RuntimeError("read the training documents first: those held out are found on the way")
        waiting.seek(0)
        yield from (Document(*json.loads(line)) for line in waiting)

    return training(), held_out()


def _cut_in_two(documents: Iterable[Document], place: int) -> Iterator[tuple[Document, bool]]:
    """Documents before and after the `place`-th character, cut at the last line end before it if its piece has one."""
    for document in documents:
        length = len(document.text)
        if place <= 0 or place >= length:
            yield document, place <= 0
        else:
            cut = cut_point(document.text, place)
            yield Document(document.text[:cut], ends=False), False
            yield Document(document.text[cut:], document.ends), True
        place -= length
