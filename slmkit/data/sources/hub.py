"""Files of a split of a Hugging Face data set, or of a folder laid out like one.

`datasets` names the files (from README and file names; never by a loading script). They are read here like all others:
the same rows streamed or downloaded, with a position exact to the row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from slmkit.config import UserError, did_you_mean
from slmkit.data.sources.files import KINDS, File, kind_of, listed, local_file
from slmkit.data.sources.remote import remote_file
from slmkit.data.sources.settings import SourceSettings
from slmkit.hub import network, one_line

PREFIX = "hf://datasets/"
NAME = re.compile(r"[\w.-]+/[\w.-]+")
FRONT_MATTER = re.compile(r"\A---\n.*?^(configs|dataset_info):.*?^---$", re.DOTALL | re.MULTILINE)
FILE_URL = re.compile(rf"{PREFIX}(?P<name>[^/]+/[^@/]+)@(?P<revision>[^/]+)/(?P<file>.+)")


def hub_name(path: str) -> str | None:
    """`owner/name` if the path is a hub data set; None for a file or folder, or something inside a data set."""
    name = path.removeprefix(PREFIX).rstrip("/")
    is_local = path == name and (Path(path).exists() or kind_of(path) in KINDS)  # or a missing local file
    return name if NAME.fullmatch(name) and not is_local else None


def is_laid_out_like_the_hub(folder: Path, settings: SourceSettings) -> bool:
    """Whether a folder has configurations: set by the user, or in its README."""
    if settings.config:
        return True
    readme = folder / "README.md"
    return readme.is_file() and bool(FRONT_MATTER.search(readme.read_text(encoding="utf-8", errors="replace")))


def hub_files(path: str, settings: SourceSettings, kinds: Sequence[str]) -> list[File]:
    """The files of a split of a data set `owner/name`, or of a folder.

    Raises `UserError` for an unknown configuration or split, with the known ones, and `NetworkError`.
    """
    urls = _data_files(path, settings)
    unknown = next((url for url in urls if kind_of(url) not in kinds), None)
    if unknown:
        raise UserError(f"{settings.path}: {Path(unknown).name}: expected {listed(kinds)} (also as .gz or .zst)")
    if Path(path).is_dir():
        return [local_file(url) for url in urls]
    return [remote_file(url) if settings.streaming else _downloaded_file(url) for url in urls]


def _data_files(path: str, settings: SourceSettings) -> list[str]:
    datasets = _datasets()
    what = f"data set {path}"
    with network(what):
        try:
            builder = datasets.load_dataset_builder(path, name=settings.config, revision=settings.revision)
        except datasets.exceptions.DataFilesNotFoundError:
            raise UserError(f"{what}: holds no data files of a known kind") from None
        except (ValueError, RuntimeError) as error:  # a wrong configuration, or a loading script
            if not str(error).startswith(("BuilderConfig", "Config name", "Dataset scripts")):
                raise
            hint = " (config)" if "onfig" in str(error) else ""
            raise UserError(f"{what}: {one_line(error)}{hint}") from None
    splits = builder.config.data_files or {}
    if settings.split not in splits:
        raise UserError(f"{what}: no split {settings.split!r}; {did_you_mean(settings.split, map(str, splits))}")
    return list(map(str, splits[settings.split]))


def _downloaded_file(url: str) -> File:
    """A file that is downloaded to the hub's cache when first opened, resuming a partial download."""

    def path() -> Path:
        from huggingface_hub import hf_hub_download

        found = FILE_URL.fullmatch(url)
        assert found, url
        with network(url):
            return Path(hf_hub_download(found["name"], found["file"], repo_type="dataset", revision=found["revision"]))

    def opened() -> BinaryIO:
        return path().open("rb")

    def described() -> dict[str, Any]:
        return remote_file(url).describe()

    return File(url, opened, described)


def _datasets() -> Any:
    try:
        import datasets
        import datasets.exceptions
        from huggingface_hub.utils import logging
    except ImportError:
        raise UserError("data sets of the hub need one more package: pip install slmkit[hub]") from None
    logging.set_verbosity_error()  # its retries are not shown; a final failure is one line of ours
    return datasets
