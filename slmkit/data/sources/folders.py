"""Selects the files of a folder to read, by one rule for local folders and URLs.

Left out are hidden files, files of tools and runs, files of other splits, and notes and source code next to files of
rows. One line reports what was selected and what was left out.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from slmkit.config import UserError, did_you_mean
from slmkit.data.sources.documents import WORDS
from slmkit.data.sources.files import COMPRESSIONS, ROW_KINDS, WRITTEN, kind_of, listed

SPLITS: dict[str, str] = {name: split for split, names in WORDS["splits"].items() for name in names}
SPLIT_WORD = re.compile(rf"({'|'.join(SPLITS)})(?:set|split|data|file)?\d*")
# Words next to a split's name in a file name, without a meaning of their own.
NO_NAME = re.compile(r"set|split|data|dataset|files?|parts?|v?\d+|")
NUMBERS = re.compile(r"[-_.]\d+([-_.]of[-_.]\d+)?$")  # shard numbers of a split's files
TOOLS = ("__pycache__", "node_modules", "venv", "site-packages")
ABOUT = ("readme", "license", "changelog", "contributing")  # files about the data next to them
MADE: dict[str, str] = WORDS["made"]  # a file → what a subfolder with it is
BOOKKEEPING = {*MADE, *WORDS["bookkeeping"]}


@dataclass
class Chosen:
    """Sorted names of the selected files below a folder, and how many were left out, by kind."""

    folder: str
    names: list[str]
    passed: Counter[str] = field(default_factory=Counter)
    unsure: list[str] = field(default_factory=list)  # selected, although the name contains another split's

    @property
    def paths(self) -> list[Path]:
        return [Path(self.folder, name) for name in self.names]

    def line(self) -> str:
        """One line that says what was selected and what was left out."""
        taken = _counts(Counter(kind_of(name) for name in self.names))
        unsure = f", as train also {', '.join(self.unsure[:3])}{', …' * (len(self.unsure) > 3)}" if self.unsure else ""
        passed = f"; passes over {_counts(self.passed)}" if self.passed else ""
        return f"{self.folder}: reads {taken}{unsure}{passed}"


def _counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def find(path: Path, kinds: Sequence[str], split: str | None) -> Chosen:
    """The file at a path, or those of a folder, selected by `search`; a file's entry has its name and no folder.

    Raises `UserError` for a missing or empty file, one of another kind, and a folder without files of these kinds.
    """
    if path.is_dir():
        found = search(path, kinds, split)
    elif not path.exists():
        raise UserError(f"{path}: no such file or folder")
    elif kind_of(path.name) not in kinds:
        raise UserError(f"{path}: expected {listed(kinds)} (all but .parquet and .arrow also as .gz or .zst)")
    else:
        found = Chosen("", [str(path)])
    if empty := next((file for file in found.paths if file.stat().st_size == 0), None):
        raise UserError(f"{empty}: the file is empty")
    return found


def search(folder: Path, kinds: Sequence[str], split: str | None) -> Chosen:
    """Selected files of a local folder and its subfolders; `split` None: all splits. Raises `UserError` as `choose`."""
    passed: Counter[str] = Counter()
    names: list[str] = []
    for here, folders, files in os.walk(folder):
        place = Path(here)
        made = next((what for name, what in MADE.items() if name in files), None)
        if made and place != folder:
            passed[f"folder of {made}"] += 1
            folders.clear()
            continue
        passed["hidden or of tools"] += sum(map(_is_hidden, folders))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        names += [(place / name).relative_to(folder).as_posix() for name in files if (place / name).is_file()]
    chosen = choose(str(folder), names, kinds, split)
    chosen.passed = +(chosen.passed + passed)
    return chosen


def choose(folder: str, names: Iterable[str], kinds: Sequence[str], split: str | None) -> Chosen:
    """The selected ones of the files named, relative to `folder`.

    Raises `UserError` if there are none, and for a split that is not there.
    """
    found = sorted(names, key=PurePosixPath)
    passed = {name: why for name in found if (why := _why_not(PurePosixPath(name), kinds))}
    passed |= _beside_rows([name for name in found if name not in passed])
    found = [name for name in found if name not in passed]
    if not found:
        there = f" (there are: {_counts(Counter(passed.values()))})" if passed else ""
        raise UserError(f"{folder}: no {listed(kinds)} file in this folder{there}")
    if split is None:
        return Chosen(folder, found, Counter(passed.values()))
    splits = splits_of(found)
    passed |= _of_another_split(folder, splits, split)
    found = [name for name in found if name not in passed]
    unsure = [name for name in found if not splits[name] and kind_of(name) not in WRITTEN and split_of(name, True)]
    return Chosen(folder, found, Counter(passed.values()), unsure)


def splits_of(names: Sequence[str]) -> dict[str, str | None]:
    """The split of each file of a folder. If any file is named train, split names inside longer names count too."""
    rows = [name for name in names if kind_of(name) not in WRITTEN]
    inside = any(SPLITS.get(word) == "train" for name in rows for part in _parts(name) for word in _words(part))
    return {name: split_of(name, inside) if name in {*rows} else None for name in names}


def split_of(name: str, inside: bool = False) -> str | None:
    """The split of a file, by the first or last word (`inside`: any word) of its name or of one of its folders; None if
    there is none.
    """
    named: list[str] = []
    for part in _parts(name):
        words = _words(part)
        named += [SPLITS[word] for word in (words if inside else [*words[:1], *words[-1:]]) if word in SPLITS]
    return next((split for split in named if split != "train"), named[0] if named else None)


def _why_not(path: PurePosixPath, kinds: Sequence[str]) -> str | None:
    if any(map(_is_hidden, path.parts)):
        return "hidden or of tools"
    if path.name in BOOKKEEPING or (path.suffix == ".arrow" and path.name.startswith("cache-")):
        return "of tools' own bookkeeping"
    kind = kind_of(path.name)
    return None if kind in kinds else kind or "without a known ending"


def _beside_rows(names: Sequence[str]) -> dict[str, str]:
    """Why notes and code next to rows, and `.json` files next to source code (its settings), are left out."""
    kinds = {kind_of(name) for name in names}
    rows, code = kinds & {*ROW_KINDS}, kinds & {*WRITTEN} - {".md"}
    left_out = {".json"} if rows == {".json"} and code else {*WRITTEN} if rows else set()
    about = ABOUT if kinds - {".md"} else ()
    return {
        name: f"{kind_of(name)} beside the others"
        for name in names
        if PurePosixPath(name.lower()).stem in about or kind_of(name) in left_out
    }


def _of_another_split(folder: str, splits: dict[str, str | None], split: str) -> dict[str, str]:
    """Why files of other splits are left out. Raises `UserError` if none is of this one."""
    wanted = SPLITS.get(split.lower(), split)
    meant = {name for name, found in splits.items() if found == wanted or (found is None and wanted == "train")}
    if split.lower() not in SPLITS:  # such as train_sft next to train_gen
        meant = {name for name in splits if split in _parts(name)} or meant
    if not meant:
        there = sorted({found for found in splits.values() if found})
        hint = did_you_mean(split, there) if there else "its files are not named after splits"
        raise UserError(f"{folder}: no file of split {split!r}; {hint}; name the file, or set split")
    return {name: f"of split {found or 'train'}" for name, found in splits.items() if name not in meant}


def _parts(name: str) -> list[str]:
    """Folders and name of a file, without endings and numbers: `train` for train-00000-of-4.jsonl.gz."""
    *folders, file = PurePosixPath(name).parts
    stem = NUMBERS.sub("", file.removesuffix(next(filter(file.endswith, COMPRESSIONS), "")).rpartition(".")[0] or file)
    return [*folders, stem, NUMBERS.sub("", stem.partition(".")[0])]


def _words(part: str) -> list[str]:
    """Words in lower case; split names without "set" or number after them: `my`, `test` for my_TestSet2."""
    part = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part).lower()
    words = re.split(r"[^\w]+|_", re.sub(r"(held|hold)[-_. ]?out", r"\1out", part))
    named = [(SPLIT_WORD.fullmatch(word), word) for word in words if not NO_NAME.fullmatch(word)]
    return [match[1] if match else word for match, word in named]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in TOOLS
