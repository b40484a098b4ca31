"""The recipes that name public data sets read them as they are laid out on the hub: names, configurations, columns."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slmkit.training.recipe.recipe import Recipe, load_recipe
from tests.data.hub_server import HubServer
from tests.data.public_rows import OF_RECIPES
from tests.data.sources.test_hub import ROOT, Ask, reader

RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
PUBLIC = {  # recipe → data set
    "tinystories": "roneneldan/TinyStories",
    "cosmopedia": "HuggingFaceTB/cosmopedia",
    "fineweb-edu": "HuggingFaceFW/fineweb-edu",
    "dclm": "mlfoundations/dclm-baseline-1.0",
    "tiny-codes": "nampdn-ai/tiny-codes",
    "smoltalk": "HuggingFaceTB/smoltalk",
    "slimorca": "Open-Orca/SlimOrca",
    "tulu-3-code": "allenai/tulu-3-sft-personas-code",
    "alpaca": "tatsu-lab/alpaca",
}


def parquet(*rows: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def lines(row: dict[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()


def card(**configurations: dict[str, str]) -> bytes:
    """A README that says where the splits of each configuration lie."""
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {path}\n" for split, path in splits.items())
        for name, splits in ((name.replace("__", "-"), splits) for name, splits in configurations.items())
    )
    return f"---\nconfigs:\n{configs}---\n".encode()


def chat(name: str) -> dict[str, Any]:
    return OF_RECIPES[name].row


HUB = {
    "roneneldan/TinyStories": {
        "data/train-00000-of-00001.parquet": parquet({"text": "train"}),
        "data/validation-00000-of-00001.parquet": parquet({"text": "validation"}),
        "TinyStories-train.txt": b"an older copy",
    },
    "HuggingFaceTB/cosmopedia": {
        "README.md": card(
            **{name: {"train": f"data/{name}/train-*"} for name in ("stories", "wikihow", "web_samples_v2", "stanford")}
        ),
        **{
            f"data/{name}/train-00000-of-00001.parquet": parquet({"prompt": "Write.", "text": name, "format": "story"})
            for name in ("stories", "wikihow", "web_samples_v2", "stanford")
        },
    },
    "HuggingFaceFW/fineweb-edu": {
        "README.md": card(default={"train": "data/*/*"}, sample__10BT={"train": "sample/10BT/*"}),
        "data/CC-MAIN-2024-10/train-00000-of-00001.parquet": parquet({"text": "too much", "score": 3.0}),
        "sample/10BT/000_00000.parquet": parquet({"text": "a sample", "score": 3.0, "token_count": 2}),
    },
    "mlfoundations/dclm-baseline-1.0": {
        "global-shard_01_of_10/local-shard_0_of_10/shard_00000000_processed.jsonl.zst": zstandard.compress(
            lines({"text": "web", "url": "http://example.org", "language_id_whole_page_fasttext": {"en": 0.9}})
        )
    },
    "nampdn-ai/tiny-codes": {
        "part_1_200000.parquet": parquet({"prompt": "Sort.", "response": "sorted(a)", "programming_language": "Python"})
    },
    "HuggingFaceTB/smoltalk": {
        "README.md": card(all={"train": "data/all/train-*", "test": "data/all/test-*"}),
        "data/all/train-00000-of-00001.parquet": parquet(chat("HuggingFaceTB/smoltalk")),
        "data/all/test-00000-of-00001.parquet": parquet(chat("HuggingFaceTB/smoltalk")),
    },
    "Open-Orca/SlimOrca": {"oo-labeled_correct.gpt4.sharegpt.jsonl": lines(chat("Open-Orca/SlimOrca"))},
    "allenai/tulu-3-sft-personas-code": {
        "data/train-00000-of-00001.parquet": parquet(chat("allenai/tulu-3-sft-personas-code"))
    },
    "tatsu-lab/alpaca": {"data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(chat("tatsu-lab/alpaca"))},
}


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with HubServer() as server:
        server.repositories = HUB
        yield from reader(server.url, tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_short_and_has_known_keys_only(name: str):
    recipe = load_recipe(RECIPES[name])
    assert recipe.output_dir.startswith("runs/")
    text = RECIPES[name].read_text()
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 50


@pytest.mark.parametrize("name", [name for name in RECIPES if "sources:" in RECIPES[name].read_text()])
def test_every_source_of_a_recipe_is_read_as_the_hub_has_it(ask: Ask, name: str):
    recipe: Recipe = load_recipe(RECIPES[name])
    wanted = [*recipe.data.sources, *([recipe.data.validation] if recipe.data.validation else [])]
    assert wanted
    assert PUBLIC.get(name) in (None, wanted[0].path)
    for source in wanted:
        answer = ask(conversations=recipe.objective == "sft", **source.model_dump(exclude_defaults=True))
        assert answer["error"] is None
        assert len(answer["items"]) == 1
        assert answer["skipped"] == {}
        if recipe.objective == "sft":
            assert answer["items"][0][0] == OF_RECIPES[source.path].means
        else:
            assert answer["items"][0][0] not in ("too much", "an older copy")


def test_there_is_a_recipe_for_every_public_data_set():
    assert PUBLIC.keys() <= RECIPES.keys()
    assert HUB.keys() == set(PUBLIC.values())
