"""X-ray: checks of the data and labels of the first batches, before training.

Many failed runs had no labels, or wrong ones, from the start. The first batches, as the loop will get them, are
counted and a few rows shown; `findings` are reasons not to start.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.data.prepare.preview import document_hashes
from slmkit.data.shards.reader import TokenShards
from slmkit.data.sources.documents import SPELLINGS
from slmkit.data.stream import Batches
from slmkit.training.diagnostics.contamination import Contamination, contamination, text_of

ROWS, TOKENS, STEPS = 64, 65_536, 64  # inspected, until one limit is reached
ENCODED_AGAIN = 16  # rows
SEPARATORS = 2  # spelled at ends of lines: more are not an accident
CUT_ROWS = 0.8  # share of rows that end within a conversation, above which it is a finding
KNOWN_TOKENS = 0.5  # least share of tokens that must survive decoding and encoding
COMPARED = 1 << 27  # tokens: in larger data, answers are not compared with each other
LEAKED, SOME_LEAKED = 0.1, 0.01  # share of validation text in the training text, beyond repetition within it
EXPECTED_ENDS = 5  # documents in as many tokens as are inspected, below which a missing end is no finding


@dataclass(frozen=True)
class Vocabulary:
    """Properties of the model's tokenizer that the checks need."""

    decode: Callable[[list[int]], str]
    size: int  # of the model's embedding
    end_ids: Collection[int]  # of texts and of turns
    special_ids: Collection[int] = ()
    spellings: Collection[str] = SPELLINGS  # of special tokens, these and others'
    bos_id: int | None = None
    pad_id: int | None = None
    encode: Callable[[str], Sequence[int]] | None = None
    fingerprint: str | None = None

    @functools.cached_property
    def spelled(self) -> re.Pattern[str]:
        """Regular expression for spellings of special tokens in plain text."""
        return re.compile("|".join(map(re.escape, sorted(self.spellings, key=len, reverse=True))))

    def is_end(self, ids: np.ndarray) -> np.ndarray:
        """Whether each token of `ids` [...] ends a text or a turn: bool [...]."""
        return np.isin(ids, [*self.end_ids])

    def is_special(self, ids: np.ndarray) -> np.ndarray:
        """Whether each token of `ids` [...] is special: bool [...]."""
        return np.isin(ids, [*self.special_ids, *self.end_ids])


@dataclass(frozen=True)
class SampledRows:
    """The inspected rows. All arrays [rows, length]."""

    ids: np.ndarray
    labels: np.ndarray  # label of each position; IGNORED where nothing is learned
    padding: np.ndarray  # bool
    kinds: Sequence[str] = ()  # of each row, if the data says it: chosen or rejected, good or bad

    def part(self, rows: slice, columns: slice) -> SampledRows:
        place = rows, columns
        return SampledRows(self.ids[place], self.labels[place], self.padding[place], self.kinds[rows])

    @property
    def learned(self) -> np.ndarray:  # bool [rows, length]
        return self.labels != IGNORED

    def plain_parts(self, vocabulary: Vocabulary) -> Iterator[list[int]]:
        """The tokens between special ones, row by row."""
        for ids, padding in zip(self.ids, self.padding):
            is_special = vocabulary.is_special(ids)
            for part in np.split(np.arange(len(ids)), np.flatnonzero(is_special | padding)):
                yield ids[part[~is_special[part]]].tolist()


@dataclass(frozen=True)
class XRay:
    """Results of the checks. `findings` stop a run, `notes` are shown; both are sentences."""

    rows: SampledRows
    figures: dict[str, str]
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        return "x-ray: " + ", ".join(f"{name} {value}" for name, value in self.figures.items())


def examine(
    stream: Batches,
    vocabulary: Vocabulary,
    train: Sequence[TokenShards] = (),
    validation: Sequence[TokenShards] = (),
    is_chat: bool = False,
    is_padded: bool = False,
) -> XRay:
    """Check the first batches of `stream`, and the shards of the training and validation rows.

    `is_padded`: each row is one text, padded to the longest row. Takes about a second at most, since large data is
    sampled. The stream is left at its beginning.
    """
    rows = _first_rows(stream, vocabulary)
    if is_padded:
        rows = rows.part(slice(None), slice(0, max(1, int((~rows.padding).any(axis=0).sum()))))
    found = contamination(text_of(train), text_of(validation)) if train and validation else None
    findings = (
        *_label_findings(rows, vocabulary, train, is_chat),
        *_token_findings(rows, vocabulary, (*train, *validation), is_chat),
        *_corpus_findings(train, found),
    )
    notes = [*_notes(rows, found), *_contradictions(rows, train)]
    return XRay(rows, _figures(rows, vocabulary, found, is_chat), [*findings], notes)


def _first_rows(stream: Batches, vocabulary: Vocabulary) -> SampledRows:
    ids: list[np.ndarray] = []  # [rows, length] each
    labels: list[np.ndarray] = []
    kinds: list[str] = []
    step = rows = 0
    while step < STEPS and stream.has(step) and rows < ROWS and sum(part.size for part in ids) < TOKENS:
        batch = stream.batch(step)
        ids.append(batch.ids.flatten(0, -2).numpy())  # both answers of a pair
        labels.append(batch.labels.flatten(0, -2).numpy())
        kinds += _kinds(batch)
        step, rows = step + 1, rows + len(ids[-1])
    stream.seek(0, {})
    longest = max(part.shape[1] for part in ids)
    pad_id = vocabulary.pad_id or 0
    all_ids, all_labels = (
        np.concatenate([np.pad(part, ((0, 0), (0, longest - part.shape[1])), constant_values=value) for part in parts])[
            :ROWS
        ]
        for parts, value in ((ids, pad_id), (labels, IGNORED))
    )
    filler = (all_ids == pad_id) & (all_labels == IGNORED)
    # Padding is the end of a row: found by position, since its id may have other uses.
    padding = np.logical_and.accumulate(filler[:, ::-1], axis=1)[:, ::-1]
    return SampledRows(all_ids, all_labels, padding, kinds[:ROWS])


def _kinds(batch: Batch) -> list[str]:
    """The kind of each row of a batch, if its objective distinguishes kinds; else empty."""
    if batch.ids.dim() == 3:  # pairs
        return ["chosen", "rejected"] * len(batch.ids)
    return ["good" if label else "bad" for label in batch.extra.get("desirable", ())]


# -- findings: reasons not to start -----------------------------------------------------------------------------------


def _label_findings(
    rows: SampledRows, vocabulary: Vocabulary, train: Sequence[TokenShards], is_chat: bool
) -> Iterator[str]:
    if not rows.learned.any():
        yield (
            f"not one of {rows.labels.size:,} labels is learned: all are masked; "
            "check that the conversations have assistant turns with text"
        )
    cut = _cut_share(rows, vocabulary)
    if is_chat and cut >= CUT_ROWS:
        yield (
            f"{cut:.0%} of the rows end in the middle of a conversation, which is cut there at {rows.ids.shape[1]:,} "
            "tokens: raise train.sequence_length"
        )
    present = int((vocabulary.is_end(rows.ids) & ~rows.padding).sum())
    share = (~rows.padding).sum() / max(1, sum(map(len, train)))
    expected = share * sum(shards.header.documents for shards in train)
    if rows.learned.any() and not vocabulary.is_end(rows.labels).any() and (present or expected >= EXPECTED_ENDS):
        there = f"{present:,} are there and none is a label" if present else f"none among {rows.ids.size:,} tokens"
        yield f"no end token is learned ({there}): the model would never stop; end each text with the end-of-text token"
    doubled, beginnings = _doubled(rows, vocabulary)
    # If one token both begins and ends texts, an empty text looks the same.
    if doubled and not (vocabulary.bos_id in vocabulary.end_ids and doubled < beginnings / 2):
        yield (
            f"{doubled:,} texts begin with the beginning-of-text token twice: the chat template writes one already, "
            "so that the tokenizer must not"
        )


def _token_findings(
    rows: SampledRows, vocabulary: Vocabulary, shards: Sequence[TokenShards], is_chat: bool
) -> Iterator[str]:
    """Tokens of another tokenizer, and special tokens that are spelled at the ends of lines, probably as separators."""
    others = {one.header.tokenizer for one in shards} - {vocabulary.fingerprint}
    if vocabulary.fingerprint is not None and others:
        yield (
            f"the tokens were made by tokenizer {min(others)[:12]}, the model's is {vocabulary.fingerprint[:12]}: "
            "prepare the data again"
        )
    elif (largest := int(rows.ids.max())) >= vocabulary.size:
        yield f"token {largest:,} is beyond the model's vocabulary of {vocabulary.size:,}: prepare the data again"
    elif (share := _known_again(rows, vocabulary)) < KNOWN_TOKENS:
        yield (
            f"only {share:.0%} of the tokens come back when their text is tokenized again: "
            "they seem to be another tokenizer's; prepare the data again"
        )
    texts = map(vocabulary.decode, rows.plain_parts(vocabulary))
    separators = Counter(
        match[0]
        for text in texts
        for match in vocabulary.spelled.finditer(text)
        if not text[match.end() :].partition("\n")[0].strip()
    )
    way_out = (
        "remove it from the messages, whose ends the chat template writes" if is_chat
        else "put <|endoftext|> on a line of its own, or name it as data.separator (of rows: remove it)"
    )  # fmt: skip
    for spelling, times in separators.most_common(1):
        if times >= SEPARATORS:
            stands = f"{spelling} stands {times:,} times at the end of a line, as plain text that ends no document"
            yield f"{stands}: {way_out}"


def _corpus_findings(train: Sequence[TokenShards], found: Contamination | None) -> Iterator[str]:
    """Validation text in the training text, and judged answers that all have the same label."""
    if found is not None and found.excess >= LEAKED:
        yield (
            f"{max(found.documents, found.windows):.0%} of the validation text stands in the training text: "
            "its loss would say nothing; hold out other documents"
        )
    labels = [shards.labels for shards in train if shards.header.judged]
    kinds = np.unique(np.concatenate(labels)).tolist() if labels else []
    if len(kinds) == 1 and kinds[0]:
        yield "all answers are labelled good and none bad: objective sft learns from good answers alone"
    elif len(kinds) == 1:
        yield "all answers are labelled bad and none good: nothing would be learned of what to answer instead"


# -- figures and notes ------------------------------------------------------------------------------------------------


def _figures(rows: SampledRows, vocabulary: Vocabulary, found: Contamination | None, is_chat: bool) -> dict[str, str]:
    figures = {
        "rows": f"{len(rows.ids):,} of {rows.ids.shape[1]:,} tokens",
        "learned": f"{rows.learned.sum(axis=1).mean():,.0f} a row ({rows.learned.mean():.0%})",
        "end tokens learned": f"{int(vocabulary.is_end(rows.labels).sum()):,}",
        "padding": f"{rows.padding.mean():.0%}",
    }
    if is_chat:
        figures["rows cut"] = f"{_cut_share(rows, vocabulary):.0%}"
    if vocabulary.bos_id is not None:
        figures["doubled beginnings"] = f"{_doubled(rows, vocabulary)[0]:,}"
    if found is not None and not (found.documents or found.windows):
        figures["validation text in training"] = "none"
    elif found is not None:
        figures["validation text in training"] = (
            f"{found.documents:.1%} of documents, {found.windows:.1%} of windows of 32 tokens "
            f"(training repeats {found.documents_repeated:.1%} and {found.windows_repeated:.1%} of its own)"
        )
    return figures


def _notes(rows: SampledRows, found: Contamination | None) -> Iterator[str]:
    empty = (~rows.learned).all(axis=1).mean()
    if 0.1 < empty < 1:
        yield f"in {empty:.0%} of the rows nothing is learned"
    if rows.padding.mean() > 0.5:
        yield f"{rows.padding.mean():.0%} of what is computed is padding: lower train.sequence_length"
    if found is None or found.excess >= LEAKED:
        return
    share = max(found.documents, found.windows)
    if share > 0.5:
        yield (
            f"{share:.0%} of the validation text stands in the training text, which repeats itself as much: "
            "the validation loss will not tell learning from remembering"
        )
    elif found.excess > SOME_LEAKED:
        yield f"{share:.1%} of the validation text stands in the training text"


def _contradictions(rows: SampledRows, train: Sequence[TokenShards]) -> list[str]:
    """Notes on pairs that also occur in reverse order, or answers labelled both good and bad."""
    are_pairs, are_judged = rows.kinds[:1] == ["chosen"], any(shards.header.judged for shards in train)
    if not train or not (are_pairs or are_judged) or sum(map(len, train)) > COMPARED:
        return []
    hashes = np.concatenate([document_hashes(shards) for shards in train])  # [documents]
    if are_pairs:
        pairs = Counter(map(tuple, hashes.reshape(-1, 2).tolist()))
        count = sum(times for (better, worse), times in pairs.items() if (worse, better) in pairs)
        what = "pairs are there the other way round, too, with chosen and rejected exchanged"
    else:
        labels = np.concatenate([shards.labels for shards in train]).astype(bool)
        count = int(np.isin(hashes, np.intersect1d(hashes[labels], hashes[~labels])).sum())
        what = "answers to the same prompt are labelled good in one row and bad in another"
    return [f"{count:,} of {len(hashes) // (1 + are_pairs):,} {what}: keep one of each"] if count else []


def _cut_share(rows: SampledRows, vocabulary: Vocabulary) -> float:
    """The share of rows that are full and do not end with an end token."""
    return float((~rows.padding[:, -1] & ~vocabulary.is_end(rows.ids[:, -1])).mean())


def _doubled(rows: SampledRows, vocabulary: Vocabulary) -> tuple[int, int]:
    """How often the beginning-of-text token follows itself, and how often it occurs."""
    begins = (rows.ids == (-1 if vocabulary.bos_id is None else vocabulary.bos_id)) & ~rows.padding
    return int((begins[:, 1:] & begins[:, :-1]).sum()), int(begins.sum())


def _known_again(rows: SampledRows, vocabulary: Vocabulary) -> float:
    """The share of plain tokens that their decoded text encodes to again; 1 if that cannot be tested."""
    if vocabulary.encode is None:
        return 1.0
    found = total = 0
    for plain in rows.part(slice(0, ENCODED_AGAIN), slice(None)).plain_parts(vocabulary):
        again = Counter(vocabulary.encode(vocabulary.decode(plain)))
        found += sum((Counter(plain) & again).values())
        total += len(plain)
    return found / total if total else 1.0
