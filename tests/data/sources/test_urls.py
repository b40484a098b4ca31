"""Files at URLs give what the same files give here, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from slmkit.config import UserError
from slmkit.data.sources import RetryPolicy, open_source, remote
from slmkit.data.sources.settings import SourceSettings
from tests.data.hub_reader import Clock
from tests.data.hub_server import Fault, HubServer
from tests.data.sources.test_positions import SUFFIXES, TEXTS, write

CHANCE = random.Random(0)
MANY = [CHANCE.randbytes(CHANCE.randint(1, 2000)).hex() for _ in range(1000)]  # 2 MB, and 1 MB when it is compressed


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def at(server: HubServer, path: Path) -> str:
    """The address of a file that the server holds from now on."""
    server.repositories["a/b"] = {path.name: path.read_bytes()}
    return f"{server.url}/datasets/a/b/resolve/main/{path.name}"


def everything(path: str | Path, start: Any = None, retries: RetryPolicy | None = None, **options: Any) -> list[Any]:
    return list(open_source(SourceSettings(path=str(path), **options), retries=retries).read(start))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_file_over_http_is_as_here_from_every_position(server: HubServer, tmp_path: Path, suffix: str):
    path = write(tmp_path / f"a{suffix}", TEXTS)
    here, there = everything(path), at(server, path)
    assert everything(there) == here
    for index in (0, len(here) // 2, len(here) - 1):
        assert everything(there, here[index][1]) == here[index + 1 :]


def test_a_folder_at_a_url_is_all_its_files_sorted(tmp_path: Path):
    system = fsspec.filesystem("memory")
    for name in ("b/2.jsonl.gz", "a.txt", "b/1.parquet", "README.md"):
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, [name, "more"])
        system.pipe(f"/shelf/{name}", path.read_bytes())
    assert everything("memory://shelf") == everything(tmp_path / "here")
    described = open_source(SourceSettings(path="memory://shelf")).describe()
    assert [entry["path"] for entry in described] == [
        f"memory:///shelf/{name}" for name in ("a.txt", "b/1.parquet", "b/2.jsonl.gz")
    ]
    assert all(entry["bytes"] > 0 for entry in described)


FAULTS = {
    "status 500": (Fault("GET", status=500), "the server answers 500"),
    "too many requests": (Fault("GET", status=429, headers={"Retry-After": "90"}), "too many requests (429)"),
    "cut in the middle": (Fault("GET", cut=30_000), "the connection broke"),
    "a stall": (Fault("GET", stall=2), "the server does not answer in time"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".txt.gz", ".csv.zst", ".parquet"])
def test_a_broken_connection_loses_and_repeats_nothing(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
):
    monkeypatch.setattr(remote, "STALLED", 0.5)
    monkeypatch.setattr(remote, "BLOCK", 1 << 17)  # so that there is a middle
    path = write(tmp_path / f"a{suffix}", MANY)
    here, there = everything(path), at(server, path)
    fault, expected = FAULTS[name]
    server.faults.append(dataclasses.replace(fault, times=2, after=2))
    clock, said = Clock(), []
    assert everything(there, retries=RetryPolicy(1000, now=clock.now, sleep=clock.sleep, say=said.append)) == here
    assert len(said) == 2 if fault.stall is None else len(said) >= 1
    assert all(expected in line and there in line for line in said)
    assert min(clock.slept) >= (90 if fault.status == 429 else 1)


def test_an_answer_that_lacks_its_bytes_is_not_taken_for_the_end(server: HubServer, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1 << 17)
    url = at(server, write(tmp_path / "a.jsonl", MANY))
    server.faults.append(Fault("GET", empty=True, times=10_000, after=2))
    clock = Clock()
    with pytest.raises(UserError, match="bytes came; given up after"):
        everything(url, retries=RetryPolicy(1000, now=clock.now, sleep=clock.sleep, say=lambda line: None))


def test_a_network_that_fails_while_the_kind_of_rows_is_found_out_is_one_line():
    opened = open_source(SourceSettings(path="http://127.0.0.1:9/a.jsonl", retry_for=0))
    with pytest.raises(UserError, match="cannot be reached"):
        opened.reads()


def test_what_was_read_is_not_asked_for_again(server: HubServer, tmp_path: Path):
    path = write(tmp_path / "a.jsonl", MANY)
    here, there = everything(path), at(server, path)
    near_the_end = here[-3][1]
    assert everything(there, near_the_end) == here[-2:]
    assert server.sent < 20_000 < near_the_end["offset"]


def test_a_file_is_not_loaded_whole(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "BLOCK", 1 << 18)
    path = write(tmp_path / "a.jsonl", MANY)
    assert next(open_source(SourceSettings(path=at(server, path))).read())[0].text == MANY[0]
    assert server.sent < 1_000_000 < path.stat().st_size


def test_mistakes_are_one_line(server: HubServer, tmp_path: Path):
    url = at(server, write(tmp_path / "a.jsonl", ["text"]))
    for path, expected in {
        url.replace("a.jsonl", "b.jsonl"): "not found \\(404\\)",
        url.replace("b/resolve", "c/resolve"): "not allowed without an account.*401",
        "http://127.0.0.1:9/a.txt": "cannot be reached",
        "memory://nothing": "no .* file there",
        "nothing://a.txt": "unknown kind of URL nothing://",
        "datasets/a.txt": "no such file or folder",
    }.items():
        with pytest.raises(UserError, match=expected) as error:
            everything(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no column 'body'"):
        everything(url, text_column="body")
