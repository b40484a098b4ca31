"""What the page's tabs Runs and Data show: runs with their curves and samples, token shards, tokenizers.

`PageData.functions` are called by the names and arguments of the page's requests. Runs, shards and tokenizers are
looked up by name in lists that are made from what is on disk: no name of a request becomes a path.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from pydantic import Field, validate_call

from slmkit.config import UserError, did_you_mean, one_line, read_yaml
from slmkit.data.order import mixed_seed
from slmkit.data.packing import IGNORED
from slmkit.data.rows.answers import JudgedRows, PairRows
from slmkit.data.shards.reader import FORMAT, HEADER, TokenShards, read_header
from slmkit.data.sources.settings import OnLong
from slmkit.data.stream import ChatRows, DocumentRows, PretrainRows, ShardRows, shuffled
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.pieces import pieces
from slmkit.training.checkpoints.checkpoint import MANIFEST, complete_checkpoints, step_of
from slmkit.training.logging.list_runs import find_runs, read_run
from slmkit.training.logging.metrics_log import SAMPLES_OF_A_STEP, is_running, read_json
from slmkit.training.recipe.changes import leaves_of
from slmkit.training.recipe.recipe import load_recipe

# What is read of a run. A run of which any of these leads out of the folder of runs is not shown.
FILES = (
    "recipe.yaml", "metrics.jsonl", "samples.md", "xray.md", "environment.json", "plan.json", "checkpoints", "latest",
    "best", "data/tokenizer/tokenizer.json", "data/validation/header.json",
)  # fmt: skip
METRICS = 1 << 22  # bytes of metrics.jsonl in one answer
MARKED = 256  # bytes before a position, by which a file that was rewritten meanwhile is recognised
TOKENS = 1 << 14  # in one answer
CHARACTERS = 200_000  # of a text to tokenize
LENGTH = 512  # tokens of a row, for shards that no run reads
PACKED = 1 << 27  # tokens: larger conversations are not packed only to be looked at
DAMAGED = (UserError, OSError, ValueError, LookupError, TypeError, AttributeError)  # raised for files of a run

Number = Annotated[int, Field(ge=0, lt=2**53)]
Position = Annotated[int, Field(ge=0, lt=2**40)]  # in a file; some file systems refuse to seek farther
Json = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """A directory of token shards, and the run that reads it, if any."""

    directory: Path
    run: Path | None = None
    source: int | None = None  # number of the run's training source; None: validation


class PageData:
    """The functions of both tabs, over a folder of runs and a folder of shards; neither need exist.

    `tokenizers`: those of the served models, by the models' names.
    """

    def __init__(self, runs: Path, data: Path | None, tokenizers: Mapping[str, SLMTokenizer]) -> None:
        self.folder, self.data = runs.resolve(), data and data.resolve()
        self.served = {name: (tokenizer.fingerprint, tokenizer) for name, tokenizer in tokenizers.items()}

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Functions of keyword arguments, by the name in a request; they return JSON, without NaN and infinity.

        They raise `pydantic.ValidationError` for arguments of other types, and `UserError` for unknown names.
        """
        named = (self.runs, self.run, self.data_sets, self.rows, self.documents, self.tokenize)
        return {function.__name__: _checked(function) for function in named}

    # -- runs ---------------------------------------------------------------------------------------------------------

    def runs(self) -> list[Json]:
        """All runs, the latest first: name, state, objective, step, steps, tokens, best validation loss, time."""
        found = [_overview(name, root, _stamp(root)) for name, root in self._runs().items()]
        rows = [{key: value for key, value in run.items() if key != "recipe"} for run in found if run]
        return sorted(rows, key=lambda run: run["changed"], reverse=True)

    def run(self, name: str, since: Position = 0, mark: str = "") -> Json:
        """A run, with the lines of metrics.jsonl from a position on, in bytes.

        `since` and `mark` are `position` and `mark` of the answer before. If the file was rewritten meanwhile, as by
        `slm resume`, `since` of the answer is 0. `more`: there are further lines already.
        """
        root = _chosen("run", name, self._runs())
        overview, described = _overview(name, root, _stamp(root)), read_json(root / "environment.json")
        if overview is None:
            raise UserError(f"run {name!r} was deleted")
        return {
            **overview,
            **_lines_since(root / "metrics.jsonl", since, mark),
            "samples": samples_of(root / "samples.md"),
            "xray": text_of(root / "xray.md"),
            "checkpoints": checkpoints_of(root),
            "environment": {key: value for key, value in described.items() if key != "recipe"},
            "plan": read_json(root / "plan.json"),
            "perfect_loss": read_json(root / "data" / "validation" / HEADER).get("perfect_loss"),
        }

    def _runs(self) -> dict[str, Path]:
        """The directory of each run, by its name relative to the folder."""
        return {
            _json(str(root.relative_to(self.folder)) if root != self.folder else root.name): root
            for root in sorted(find_runs(self.folder))
            if all(_is_below(self.folder, root / file) for file in FILES)
        }

    # -- data ---------------------------------------------------------------------------------------------------------

    def data_sets(self) -> Json:
        """The directories of shards that runs read, and those below the folder of shards; names of the tokenizers."""
        keys = "documents", "tokens", "text_bytes", "vocab_size", "masked", "judged", "sources", "cleaning"
        sets = []
        for name, data_set in self._data_sets().items():
            try:
                header = read_header(data_set.directory)
                sets.append({"name": name, "shards": len(header.shards)} | {key: getattr(header, key) for key in keys})
            except UserError as error:
                sets.append({"name": name, "problem": str(error)})
        return {"sets": sets, "tokenizers": [*self._tokenizers()]}

    def rows(self, data_set: str, first: Number = 0, count: Number = 4) -> Json:
        """Rows as a model is fed them: a run's training rows in the order of its first epoch, others as stored."""
        chosen, shards, tokenizer = self._opened(data_set)
        rows, seed = _rows_of(chosen, shards, _stamp(chosen.run) if chosen.run else ())
        stop = min(rows.rows_in_epoch, first + max(1, min(count, TOKENS // rows.length)))
        places = np.arange(min(first, stop), stop)
        indices = places.tolist() if seed is None else shuffled(places, rows.rows_in_epoch, seed)
        shown = [
            {"number": number, "kind": kind} | _row(tokenizer, rows.pad_id, *arrays)
            for number, index in zip(places.tolist(), indices)
            for kind, *arrays in _parts(rows, index)
        ]
        facts = {"total": rows.rows_in_epoch, "length": rows.length, "is_shuffled": seed is not None}
        return facts | {"left_out": rows.report(), "rows": shown}

    def documents(
        self, data_set: str, first: Number = 0, count: Number = 10, start: Number = 0, tokens: Number = 64
    ) -> Json:
        """Documents as stored: of each at most `tokens` tokens from its token `start` on, and its whole length."""
        _, shards, tokenizer = self._opened(data_set)
        count, tokens = max(1, min(count, TOKENS // max(1, tokens))), max(1, min(tokens, TOKENS))
        ends, shown = np.concatenate([[0], shards.document_ends]), []
        for number in range(first, min(first + count, len(ends) - 1)):
            begin, end = ends[number : number + 2].tolist()
            place = min(begin + start, end), min(begin + start + tokens, end)
            one = {
                "number": number,
                "length": end - begin,
                "tokens": pieces(tokenizer, shards.tokens_in(*place).tolist()),
            }
            one["kind"] = ("bad", "good")[int(shards.labels[number])] if shards.header.judged else ""
            one["learned"] = shards.trained_in(*place).tolist() if shards.header.masked else []
            shown.append(one)
        return {"total": len(ends) - 1, "documents": shown}

    def tokenize(self, model: str, text: str, special: bool = False) -> Json:
        """The tokens of a text, and how many. `special`: spelled special tokens are read as such, not as text."""
        if len(text) > CHARACTERS:
            raise UserError(f"{len(text):,} characters: at most {CHARACTERS:,} are tokenized here; shorten the text")
        tokenizer = _chosen("tokenizer", model, self._tokenizers())[1]
        ids = tokenizer.encode(text, allow_special=special)
        size = len(text.encode("utf-8", "surrogatepass"))
        counts = {"count": len(ids), "distinct": len({*ids}), "characters": len(text), "bytes": size}
        return counts | {"vocabulary": len(tokenizer), "tokens": pieces(tokenizer, ids[:TOKENS])}

    def _tokenizers(self) -> dict[str, tuple[str, SLMTokenizer]]:
        """Fingerprint and tokenizer of each served model, and of each run that has another one."""
        found = {**self.served}
        for name, root in self._runs().items():
            own = (read_json(root / "environment.json").get("fingerprints") or {}).get("tokenizer")
            place = root / "data" / "tokenizer"
            if own and own not in {known for known, _ in found.values()} and place.is_dir():
                found[f"{name} (run)"] = own, _tokenizer(place, own)
        return found

    def _data_sets(self) -> dict[str, DataSet]:
        found = {}
        for name, root in self._runs().items():
            train, validation = root / "data" / "train", root / "data" / "validation"
            sources = enumerate(sorted(train.glob("[0-9][0-9]")) or [train])
            for source, place in (*sources, (None, validation)):
                if (place / HEADER).is_file() and self._may_read(place, root):
                    found[f"{name}/{place.relative_to(root / 'data')}"] = DataSet(place, root, source)
        for folder in [self.data] if self.data else []:
            for header in sorted(folder.rglob(HEADER)):
                if _is_below(folder, header) and read_json(header).get("format") == FORMAT:
                    found[f"shards: {header.parent.relative_to(folder)}"] = DataSet(header.parent)
        return {_json(name): data_set for name, data_set in found.items()}

    def _may_read(self, place: Path, run: Path) -> bool:
        """Whether shards are in one of the folders, or linked to where the run's recipe names them."""
        if any(_is_below(folder, place / HEADER) for folder in (self.folder, self.data) if folder):
            return True
        named = (_overview("", run, _stamp(run)) or {}).get("recipe", {}).values()
        return any(Path(path).resolve() == place.resolve() for path in named if isinstance(path, str))

    def _opened(self, name: str) -> tuple[DataSet, TokenShards, SLMTokenizer]:
        data_set = _chosen("data set", name, self._data_sets())
        shards = _shards(data_set.directory, (data_set.directory / HEADER).stat().st_mtime_ns)
        tokenizer = dict(self._tokenizers().values()).get(shards.header.tokenizer)
        if tokenizer is None:
            raise UserError(f"{name}: neither a model served here nor a run has the tokenizer of these shards")
        return data_set, shards, tokenizer


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    checked = validate_call(function)
    return lambda **arguments: _json(checked(**arguments))


def _json(value: Any) -> Any:
    """A value as JSON can hold it: null for NaN and infinity, U+FFFD for lone surrogates, text for all else."""
    if isinstance(value, Mapping):
        return {_json(str(key)): _json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int) else str(value).encode("utf-8", "replace").decode()


def _chosen(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise UserError(f"no {kind} {name!r}; {did_you_mean(name, known)}")
    return known[name]


def _is_below(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder)


def text_of(path: Path) -> str:
    """The text of a file; empty if there is none."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _stamp(root: Path) -> tuple[Any, ...]:
    """What changes when a run does."""
    found: list[Any] = [is_running(root)]
    for file in FILES:
        with contextlib.suppress(OSError):
            found += (file, (root / file).stat().st_mtime_ns, (root / file).stat().st_size)
    return tuple(found)


@functools.lru_cache(1024)
def _overview(name: str, root: Path, stamp: tuple[Any, ...]) -> Json | None:
    """A row of the list of runs, with the recipe's values by their dotted keys; None for a deleted run."""
    try:
        recipe = dict(leaves_of(read_yaml(root / "recipe.yaml")))
        return {"name": name} | {k: v for k, v in vars(read_run(root)).items() if k != "root"} | {"recipe": recipe}
    except DAMAGED as error:
        if not root.is_dir():
            return None
        return {"name": name, "state": "damaged", "problem": one_line(error), "changed": root.stat().st_mtime}


def _lines_since(path: Path, since: int, mark: str) -> Json:
    with path.open("rb") if path.is_file() else io.BytesIO() as file:
        since = since if since and _mark(file, since) == mark else 0
        file.seek(since)
        content = file.read(METRICS)
        whole = content[: content.rfind(b"\n") + 1]  # a running run may be writing a line
        position, reports = since + len(whole), []
        for line in whole.splitlines():
            try:
                reports.append(json.loads(line))
            except ValueError:  # left by a crash
                continue
        more = len(content) == METRICS and bool(whole)
        reports = [report for report in reports if isinstance(report, dict)]
        return {"since": since, "position": position, "mark": _mark(file, position), "more": more, "reports": reports}


def _mark(file: BinaryIO, position: int) -> str:
    """A digest of what stands before a position."""
    file.seek(max(0, position - MARKED))
    return hashlib.sha256(file.read(min(position, MARKED))).hexdigest()[:16]


def samples_of(path: Path) -> list[Json]:
    """Step and texts, each with its prompt before it, of each evaluation."""
    found = []
    for section in SAMPLES_OF_A_STEP.finditer(text_of(path)):
        quoted = section[0].partition("\n\n")[2].strip("\n").split("\n\n")
        texts = [re.sub("^> ?", "", text, flags=re.MULTILINE) for text in quoted]
        found.append({"step": int(section[1].replace(",", "")), "texts": texts})
    return found


def checkpoints_of(root: Path) -> list[Json]:
    best, latest = ((root / link).resolve().name for link in ("best", "latest"))
    found = []
    for path in complete_checkpoints(root / "checkpoints"):
        size = sum(file.get("size", 0) for file in read_json(path / MANIFEST).get("files", {}).values())
        found.append({"step": step_of(path), "bytes": size, "best": path.name == best, "latest": path.name == latest})
    return found


@functools.lru_cache(16)
def _tokenizer(directory: Path, fingerprint: str) -> SLMTokenizer:
    return SLMTokenizer.from_pretrained(directory)


@functools.lru_cache(8)
def _shards(directory: Path, changed: int) -> TokenShards:
    """Raises `UserError` for shards of which a file is missing or leads elsewhere."""
    shards, own = TokenShards.open(directory), directory.resolve()
    if outside := next((name for name in shards.header.file_sizes() if (own / name).resolve().parent != own), None):
        raise UserError(f"{directory / outside}: leads out of the directory of shards; copy the file there")
    return shards


@functools.lru_cache(4)
def _rows_of(data_set: DataSet, shards: TokenShards, stamp: tuple[Any, ...]) -> tuple[ShardRows, int | None]:
    """Rows of shards, and the seed of their order in training; None: they are not shuffled."""
    run, header, seed = data_set.run, shards.header, None
    on_long: OnLong = "cut"
    reads, length = "judgements" if header.judged else "conversations" if header.masked else "text", LENGTH
    if run is not None:
        recipe = load_recipe(run / "recipe.yaml")
        config = read_json(run / "latest" / "config.json") or recipe.model.changes
        length = recipe.train.sequence_length or config.get("max_position_embeddings", LENGTH)
        reads = recipe.reads
        if data_set.source is not None:
            names, on_long = [*recipe.data.weights], recipe.data.on_long_conversation
            is_alone = len(names) == 1 and recipe.data.when_exhausted == "repeat"
            seed = recipe.seed if is_alone else mixed_seed(recipe.seed, names[data_set.source])
    if reads == "questions":
        raise UserError("GRPO's model is fed answers of its own, made while it trains: look at the documents")
    if reads != "text" and len(shards) > PACKED:
        raise UserError(f"{len(shards):,} tokens of conversations are not packed here: look at the documents")
    if reads == "conversations":
        return ChatRows(shards, length, on_long), seed
    if reads == "judgements":
        return JudgedRows(shards, length, recipe.seed if run else 0), seed
    kinds = {"pairs": PairRows, "text": PretrainRows if run is None or data_set.source is not None else DocumentRows}
    return kinds[reads](shards, length), seed


def _parts(rows: ShardRows, index: int) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Kind, ids, labels and document numbers, int64 [length] each, of a row, or of both answers of a pair."""
    arrays = *rows.row(index), rows.documents(index)
    if isinstance(rows, PairRows):
        return [("chosen", *(each[0] for each in arrays)), ("rejected", *(each[1] for each in arrays))]
    kind = ("bad", "good")[int(rows.desirable[index])] if isinstance(rows, JudgedRows) else ""
    return [(kind, *arrays)]


def _row(tokenizer: SLMTokenizer, pad_id: int, ids: np.ndarray, labels: np.ndarray, documents: np.ndarray) -> Json:
    """Tokens, whether each is learned, and where documents begin, of int64 arrays [length]; padding is counted."""
    used = np.flatnonzero((ids != pad_id) | (labels != IGNORED))
    end = int(used[-1]) + 1 if len(used) else 0
    begins = np.flatnonzero(np.diff(documents[:end], prepend=-1)).tolist()
    tokens, learned = ids[:end].tolist(), [False, *(labels[:end] != IGNORED).tolist()]
    if learned[-1]:  # the last label follows the last token
        tokens.append(int(labels[end - 1]))
    shown = {"tokens": pieces(tokenizer, tokens), "learned": learned[: len(tokens)], "begins": begins}
    return shown | {"padding": len(ids) - end}
