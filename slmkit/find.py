"""Where runs and models lie: on disk, or on the hub. Nothing heavy is imported here: commands ask before they load
anything.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from slmkit.config import UserError
from slmkit.hub import PUBLISHED, hub_directory, hub_name


def find_model_directory(path: str | Path) -> Path:
    """The directory of a model or an adapter as it is; of a run its best checkpoint, else its latest; of a name of the
    hub (`OWNER/NAME@REVISION`) its copy in the cache, downloaded where it is not there.

    Raises `UserError` for none of them.
    """
    return _find(path, "config.json", "adapter_config.json")


def find_config_directory(path: str | Path) -> Path:
    """As `find_model_directory`, but of a model of the hub no weights are downloaded."""
    return _find(path, "config.json", "adapter_config.json", weights=False)


def find_tokenizer_directory(path: str | Path) -> Path:
    """The directory with the `tokenizer.json` of a tokenizer, model or run; `gpt2` is tiktoken's, and has none.

    Raises `UserError` for none of them.
    """
    if is_gpt2(path):
        return Path(path)
    return _find(path, "tokenizer.json", "tokenizer.json.gz", "tokenizer.model", weights=False)


def is_gpt2(path: str | Path) -> bool:
    """Whether a tokenizer's name means GPT-2's own, of `tiktoken`: `gpt2`, and no such directory."""
    return str(path) == "gpt2" and not Path(path).exists()


def _find(path: str | Path, *names: str, weights: bool = True) -> Path:
    """The directory that holds a file of one of these names."""
    wanted, local = hub_name(path), Path(path)
    # `best_model` is what other trainers call the best checkpoint in their output.
    run = local.parent if local.name == "best_model" and not local.exists() else local
    for candidate in (local, run / "best", run / "latest"):
        if any((candidate / name).is_file() for name in names):
            return candidate
    if wanted is None:
        raise UserError(_not_found(local, names[0]))
    try:
        found = hub_directory(wanted, weights)
    except UserError as error:
        raise UserError(f"{error} (nor is there a directory {path})") from None
    if not any((found / name).is_file() for name in names):
        raise UserError(f"{wanted}: it has no {' and no '.join(names)}; transformers' save_pretrained writes one")
    return found


def _not_found(path: Path, name: str) -> str:
    if path.exists():
        what = f"no {name} in it: neither a model directory nor a run with a checkpoint"
    elif str(path) in PUBLISHED:
        return f"{path}: a preset is a shape without weights; trained ones are on the hub: {PUBLISHED[str(path)]}"
    else:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        what = f"no such directory; did you mean {str(path.parent / near[0])!r}?" if near else "no such directory"
    more = f", or hf://{path} of the hub" if len(path.parts) == 2 and not path.exists() else ""
    return f"{path}: {what}; expected what `slm train` or transformers' save_pretrained writes{more}"
