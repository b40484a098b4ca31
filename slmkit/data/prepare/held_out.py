"""What is held out for validation: documents and conversations by a hash of their text, or the end of a few texts."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from slmkit.config import UserError
from slmkit.data.shards.writer import disk_errors_named
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


@dataclass
class Survey:
    """How much a corpus holds, counted while it is read: what has to be known before it is split."""

    fraction: float  # to be held out
    documents: int = 0
    characters: int = 0
    sides: set[bool] = field(default_factory=set)  # of the split by hash, on which there are documents
    is_whole: bool = False  # everything was read

    @property
    def are_many(self) -> bool:
        return self.documents >= math.ceil(HELD_OUT / self.fraction)

    @property
    def is_done(self) -> bool:
        """Whether more reading would change nothing."""
        return self.is_whole or (self.are_many and len(self.sides) == 2)

    def over(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents, counted until enough is known."""
        for document, held_out in picked_by_hash(documents, self.fraction):
            if not self.is_done:
                self.documents += document.ends
                self.characters += len(document.text)
                self.sides.add(held_out)
            yield document
        self.is_whole = True


def split_validation(
    read: Callable[[], Iterable[Document]], fraction: float, folder: Path | None = None, survey: Survey | None = None
) -> tuple[Iterator[Document], Iterator[Document]]:
    """Documents to train on, and about `fraction` of them held out, to be read after those; they wait in `folder`.

    `read` starts reading the corpus. Unless an earlier `survey` is done, it is called twice: the first time only until
    the corpus is known to be large. Many documents are split by a hash of their text, so that copies of a document are
    on one side. Few documents (one long text, say) are cut in two at a line end, and the last part is held out. Raises
    `UserError` for a text too short to cut, and if all documents are copies on one side.
    """
    if survey is None or not survey.is_done:
        survey = Survey(fraction)
        for _ in survey.over(read()):
            if survey.is_done:
                break
    if survey.are_many and len(survey.sides) == 2:
        return _in_two(lambda: picked_by_hash(read(), fraction), folder)
    if survey.are_many:
        raise UserError(_copies(f"{survey.documents:,} documents"))
    place = survey.characters - math.ceil(survey.characters * fraction)
    if place <= 0:
        raise UserError(
            f"too little text to hold any out: {survey.characters} characters; add text or drop the validation split"
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
            with disk_errors_named(folder or Path(tempfile.gettempdir())):
                waiting.write(json.dumps(document) + "\n")
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
