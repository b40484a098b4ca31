"""Files are written whole, where they may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slmkit.files import write_whole


def test_of_a_link_the_file_is_written_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("before")
    (tmp_path / "link").symlink_to("folder/file")
    write_whole(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "after"
    (tmp_path / "new").symlink_to("folder/new")
    write_whole(tmp_path / "new", "first")
    assert sorted(os.listdir(tmp_path / "folder")) == ["file", "new"]


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_regular_file_is_left_as_it_is(tmp_path: Path, kind: str, is_linked: bool) -> None:
    path = tmp_path / kind
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to("loop")}[kind]()
    if is_linked:
        (tmp_path / "link").symlink_to(kind)
    before, place = path.lstat(), tmp_path / "link" if is_linked else path
    with pytest.raises(OSError, match="is a folder" if kind == "folder" else "is no regular file") as refusal:
        write_whole(place, "text")
    assert refusal.value.filename == str(place)
    assert path.lstat() == before
    assert len(os.listdir(tmp_path)) == 1 + is_linked


def test_an_error_names_the_file_and_no_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refusal:
        write_whole(tmp_path / "nowhere" / "file", "text")
    assert refusal.value.filename == str(tmp_path / "nowhere" / "file")
