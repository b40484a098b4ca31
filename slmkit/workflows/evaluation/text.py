"""The texts that `slm eval` measures: any source of text, and WikiText-2 by name.

WikiText is distributed as tokens with spaces between them, in files of many articles whose titles are lines such as
` = Title = `. Its pages are separated and cleaned as lm-eval's task `wikitext` does, by lm-eval's own function; bytes
and words are counted in the page as it was. Merity et al. 2016, arXiv:1609.07843.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.data.prepare.open_sources import items_of
from slmkit.data.sources import open_source
from slmkit.data.sources.files import KINDS, kind_of
from slmkit.data.sources.settings import SourceSettings

WIKITEXT = "wikitext-2"
ON_THE_HUB = {  # the data set of lm-eval's task
    "path": "EleutherAI/wikitext_document_level", "config": "wikitext-2-raw-v1", "split": "test", "text_column": "page",
    "name": WIKITEXT,
}  # fmt: skip
TITLE = re.compile(r"^ = (?!= ).*(?<! =) = *$", re.M)  # of an article; sections have more signs on each side


@dataclass(frozen=True)
class Text:
    """Documents to be read by a model; `originals` are the documents before they were changed for it, if they were, and
    `left_out` the bytes that each of these has in its file besides.
    """

    name: str
    documents: list[str]
    originals: list[str] | None
    left_out: list[float]
    notes: list[str]  # a line for each reason for which rows were skipped, and on how the text was changed


def find_text(path: str) -> dict[str, Any]:
    """Settings of a source of text: those of WikiText-2 for its name, or for a folder of that name (its test file).

    A local file or folder comes before the hub.
    """
    folder = Path(path)
    if folder.name.lower().startswith(WIKITEXT) and folder.is_dir():
        found = [one for one in sorted(folder.iterdir()) if "test" in one.name.lower() and kind_of(one.name) in KINDS]
        if not found:
            raise UserError(f"{path}: no test.txt in it (wiki.test.raw or wiki.test.tokens: rename it so)")
        return {"path": str(found[0]), "name": WIKITEXT}
    return dict(ON_THE_HUB) if path == WIKITEXT and not folder.exists() else {"path": path}


def read_text(source: SourceSettings, limit: int | None = None) -> Text:
    """The first `limit` documents of a source of text, pages of WikiText, or blocks of a text that is one document.

    Raises `UserError` as sources do.
    """
    from slmkit.evaluation.perplexity import blocks_of  # imports torch: `find_text` is asked before that

    documents, left_out, parts = list[str](), [0.0], list[str]()
    try:
        opened = open_source(source)
    except UserError as error:
        if source.path != ON_THE_HUB["path"]:
            raise
        raise UserError(f"{error}; or give a local copy: --text FOLDER/{WIKITEXT}, with its test.txt") from None
    for document in items_of(opened, "text"):
        parts.append(document.text)
        left_out[-1] += document.left_out
        if document.ends:
            documents.append("".join(parts))
            left_out.append(0.0)
            parts.clear()
        if limit is not None and len(documents) > limit:  # one more, to know whether there is
            break
    notes = opened.report()
    first_line = next((line for text in documents[:1] for line in text.splitlines() if line.strip()), "")
    if TITLE.match(first_line):
        lines = [max(1, text.count("\n")) for text in documents]  # what is left out are line ends
        pages = [page for text in documents for page in pages_of(text)]
        left_out = [page.count("\n") * sum(left_out) / sum(lines) for page in pages][:limit]
        notes.append("pages between titles, cleaned by lm-eval's wikitext; bytes and words are those before")
        cleaned = [detokenizer()({"page": page}) for page in pages[:limit]]
        return Text(source.label, cleaned, pages[:limit], left_out, notes)
    if len(documents) == 1 and limit is not None:
        whole = documents[0]
        documents = ["".join(blocks_of(whole)[:limit])]
        left_out[0] *= documents[0].count("\n") / max(1, whole.count("\n"))
    return Text(source.label, documents[:limit], None, left_out[: len(documents)][:limit], notes)


def pages_of(text: str) -> list[str]:
    """The articles of WikiText, each from its title on."""
    starts = [match.start() for match in TITLE.finditer(text)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]


@functools.cache
def detokenizer() -> Callable[[dict[str, str]], str]:
    """The function of lm-eval's task; loads its file alone, since lm-eval as a whole takes seconds."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None:
        raise UserError("WikiText is cleaned as lm-eval does it: pip install slmkit[eval]")
    path = Path(package.origin).parent / "tasks" / "wikitext" / "preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("lm_eval_wikitext", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.wikitext_detokenizer
