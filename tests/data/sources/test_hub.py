"""Data sets of the hub, by its real clients from a local server: named, streamed, downloaded, and when it fails."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slmkit.config import UserError
from slmkit.data.sources import open_source
from slmkit.data.sources.settings import SourceSettings
from tests.data.hub_server import REVISION, Fault, HubServer

ROOT = Path(__file__).parents[3]
TALES = "me/tales"  # two parquet files of ten rows, in row groups of four
SHELF = "me/shelf"  # two configurations of compressed JSON lines
SECOND = "data/train-00001-of-00002.parquet"
PER_TRY = 6  # requests of the hub's own client, until it gives up and slmkit takes over

Ask = Callable[..., dict[str, Any]]


def parquet(rows: list[Any], column: str = "text") -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(rows))), column: rows}), file, row_group_size=4)
    return file.getvalue()


def json_lines(texts: list[str]) -> bytes:
    return zstandard.compress("".join(json.dumps({"story": text}) + "\n" for text in texts).encode())


REPOSITORIES = {
    TALES: {
        "README.md": b"---\nlicense: mit\n---\nTales.",
        "data/train-00000-of-00002.parquet": parquet([f"a{number}" for number in range(10)]),
        SECOND: parquet([f"b{number}" for number in range(10)]),
        "data/validation-00000-of-00001.parquet": parquet(["held out"]),
    },
    SHELF: {
        "README.md": b"---\nconfigs:\n- config_name: long\n  data_files: long/*.jsonl.zst\n"
        b"- config_name: short\n  data_files:\n  - split: train\n    path: short/a*\n"
        b"  - split: test\n    path: short/b*\n---\nA shelf.",
        "long/1.jsonl.zst": json_lines(["long one", "long two"]),
        "short/a.jsonl.zst": json_lines(["short"]),
        "short/b.jsonl.zst": json_lines(["test"]),
    },
    "me/script": {"script.py": b"print('never run')"},
}
TRAIN = [f"a{number}" for number in range(10)] + [f"b{number}" for number in range(10)]


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    """The server as new."""
    server.repositories = {name: dict(files) for name, files in REPOSITORIES.items()}
    server.moved, server.gated, server.faults, server.requests, server.sent = {}, set(), [], [], 0
    return server


def reader(url: str, home: Path, **variables: str) -> Iterator[Ask]:
    """Reads sources in a process whose hub is at `url`."""
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    command = [sys.executable, "-m", "tests.data.hub_reader"]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment, cwd=ROOT)
    assert process.stdin
    assert process.stdout

    def ask(path: str, start: Any = None, conversations: bool = False, **settings: Any) -> dict[str, Any]:
        request = {"settings": {"path": path, **settings}, "start": start, "conversations": conversations}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        assert select.select([process.stdout], [], [], 120)[0], "the reader says nothing"
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub-home")


@pytest.fixture(scope="module")
def ask(server: HubServer, home: Path) -> Iterator[Ask]:
    yield from reader(server.url, home)


def texts(answer: dict[str, Any]) -> list[str]:
    assert answer["error"] is None
    return [item for item, _ in answer["items"]]


def written(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_data_set_is_the_same_streamed_downloaded_and_as_a_local_folder(hub: HubServer, ask: Ask, home, tmp_path):
    streamed = ask(TALES, streaming=True)
    assert texts(streamed) == TRAIN
    assert not list(home.rglob("*.parquet")), "streaming stores nothing"
    downloaded = ask(TALES)
    assert list(home.rglob("*.parquet"))
    local = open_source(SourceSettings(path=str(written(hub.repositories[TALES], tmp_path)))).read()
    items = [[document.text, position] for document, position in local]
    assert streamed["items"] == downloaded["items"] == items
    assert texts(ask(f"hf://datasets/{TALES}", streaming=True)) == TRAIN
    assert streamed["files"][1] == f"hf://datasets/{TALES}@{REVISION}/{SECOND}"


def test_a_file_in_a_data_set_can_be_named_alone(hub: HubServer, ask: Ask):
    assert texts(ask(f"hf://datasets/{TALES}/{SECOND}")) == TRAIN[10:]
    assert texts(ask(f"hf://datasets/{TALES}/data")) == TRAIN, "a folder of it has splits, as any other"


def test_configurations_splits_and_columns_are_named(hub: HubServer, ask: Ask, tmp_path: Path):
    folder = str(written(hub.repositories[SHELF], tmp_path))
    for path, streaming in ((SHELF, True), (SHELF, False), (folder, False)):
        options = {"text_column": "story", "streaming": streaming}
        assert texts(ask(path, config="long", **options)) == ["long one", "long two"]
        assert texts(ask(path, config="short", **options)) == ["short"]
        assert texts(ask(path, config="short", split="test", **options)) == ["test"]
        assert "'long', 'short'" in ask(path, **options)["error"], "one has to be chosen"
        assert "'long', 'short'" in ask(path, config="shorts", **options)["error"]
        assert "did you mean 'test'" in ask(path, config="short", split="tests", **options)["error"]
        assert "no column 'text'; there are: 'story'" in ask(path, config="long", streaming=streaming)["error"]


def test_a_stream_goes_on_at_the_exact_row_without_reading_what_came_before(hub: HubServer, ask: Ask):
    whole = ask(TALES, streaming=True)["items"]
    for index in (0, 3, 5, 9, 13, 19):
        hub.requests.clear()
        assert ask(TALES, streaming=True, start=whole[index][1])["items"] == whole[index + 1 :]
        assert any("train-00000" in request for request in hub.requests) == (index <= 9)


FAULTS = {
    "error 500": (Fault("", status=500), "the server answers 500"),
    "error 503": (Fault("", status=503), "the server answers 503"),
    "too many requests": (Fault("", status=429, headers={"Retry-After": "33"}), "too many requests (429)"),
    "cut in the middle": (Fault("", cut=40), "the connection broke"),
    "no longer allowed": (Fault("", status=403), "not allowed (403)"),
    "not there for a while": (Fault("", status=404, headers={"X-Error-Code": "EntryNotFound"}), "not found (404)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_stream_that_breaks_goes_on_at_the_exact_row(hub: HubServer, ask: Ask, name: str):
    """In the second file, more often than the hub's client itself tries, so that it reaches us."""
    fault, expected = FAULTS[name]
    lasting = fault.status in (403, 404)
    hub.faults.append(
        Fault(f"GET /datasets/{TALES}/resolve/{REVISION}/{SECOND}", fault.status, fault.headers, fault.cut)
    )
    hub.faults[0].times = 3 if lasting else PER_TRY * 3
    answer = ask(TALES, streaming=True)
    assert texts(answer) == TRAIN
    assert [position["documents"] for _, position in answer["items"]] == list(range(1, 21))
    assert len(answer["said"]) == 3
    assert all(expected in line and SECOND in line and "\n" not in line for line in answer["said"])
    if name == "too many requests":
        assert answer["slept"] == [33, 33, 33]
    else:
        assert [wait <= slept <= wait * 1.25 for wait, slept in zip((1, 2, 4), answer["slept"])] == [True] * 3


def test_a_stall_is_noticed(hub: HubServer, ask: Ask):
    hub.faults.append(Fault(f"GET /datasets/{TALES}/resolve/{REVISION}/{SECOND}", stall=3))
    assert texts(ask(TALES, streaming=True)) == TRAIN


def test_a_download_that_breaks_is_begun_again(hub: HubServer, ask: Ask):
    hub.repositories["me/broken"] = hub.repositories[TALES]
    hub.faults.append(Fault(f"GET /datasets/me/broken/resolve/{REVISION}/data/train-00000", cut=40, times=PER_TRY * 2))
    answer = ask("me/broken")
    assert texts(answer) == TRAIN
    assert answer["said"]


def test_the_network_is_given_up_after_the_time_that_was_set(hub: HubServer, ask: Ask):
    hub.faults.append(Fault(f"GET /datasets/{TALES}/resolve/{REVISION}/{SECOND}", status=500, times=10_000))
    answer = ask(TALES, streaming=True, retry_for=100)
    assert [item for item, _ in answer["items"]] == TRAIN[:10]
    assert "the server answers 500; given up after" in answer["error"]
    assert 30 < sum(answer["slept"]) <= 100
    again = ask(TALES, streaming=True, retry_for=0)
    assert again["slept"] == []
    assert "given up after 1 tries" in again["error"]


def test_at_the_beginning_only_what_may_pass_is_tried_again(hub: HubServer, ask: Ask):
    hub.repositories["me/slow"] = hub.repositories[TALES]
    hub.faults.append(Fault("me/slow", status=500, times=PER_TRY * 2))
    assert texts(ask("me/slow", streaming=True)) == TRAIN
    hub.gated.add("me/gated")
    for path, expected in {
        "me/gated": "me/gated: gated; accept its terms",
        "me/nothing": "me/nothing: not found (404): misspelt, renamed or private",
        "me/script": "Dataset scripts are no longer supported",
    }.items():
        answer = ask(path, streaming=True)
        assert expected in answer["error"]
        assert "\n" not in answer["error"]
        assert answer["slept"] == []


def test_a_data_set_that_has_moved_is_found(hub: HubServer, ask: Ask):
    hub.moved["me/old-tales"] = TALES
    assert texts(ask("me/old-tales", streaming=True)) == TRAIN


def test_offline_is_one_line_at_once(tmp_path: Path):
    for variables in ({"HF_HUB_OFFLINE": "1"}, {}):
        for ask in reader("http://127.0.0.1:9", tmp_path, **variables):
            answer = ask(TALES, streaming=True)
            assert answer["error"] == f"data set {TALES}: cannot be reached: this machine is offline, or told to be"
            assert answer["slept"] == []


@pytest.mark.parametrize("configs", ["3", "["])
def test_a_wrong_readme_of_a_local_folder_is_one_line_at_once(tmp_path: Path, configs: str):
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"its README\.md or files are not as expected: .*config") as error:
        open_source(SourceSettings(path=str(tmp_path), retry_for=0))
    assert "\n" not in str(error.value)
    assert "retry_for" not in str(error.value)


def test_a_damaged_file_is_no_failure_of_the_network(hub: HubServer, ask: Ask):
    """Refused, or left out and counted; asking for it again would not help."""
    content = hub.repositories[TALES][SECOND]
    hub.repositories[TALES][SECOND] = content[:60] + b"\xff" * 60 + content[120:]
    refused = ask(TALES, streaming=True)
    assert "cannot be read as parquet" in refused["error"]
    left_out = ask(TALES, streaming=True, on_bad_row="skip")
    assert texts(left_out)[:10] == TRAIN[:10]
    assert left_out["skipped"] == {"unreadable file": 20 - len(left_out["items"])}
    assert left_out["said"] == refused["said"] == []
