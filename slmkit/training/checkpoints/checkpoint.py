"""Checkpoints: a model directory, or an adapter's, with `training_state/` inside and a manifest written last.

A checkpoint is written under a temporary name, synced and renamed, so that it is complete or absent. Optimizer state
is safetensors under the parameters' names, the rest JSON: no pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slmkit.config import UserError
from slmkit.files import file_sha256, sync
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import read_state, save_decoder
from slmkit.training.distributed import ALONE, Group, on_main, share_like
from slmkit.training.guards import Guard
from slmkit.training.loop import State
from slmkit.training.precision import LossScale

MANIFEST = "MANIFEST.json"
STATE = "training_state/state.json"
OPTIMIZER = "training_state/optimizer.safetensors"

ExtraFiles = Callable[[Path], None]  # writes the files beside the weights, such as the tokenizer


class ModelFiles(Protocol):
    """The format of a run's model on disk; every loader of models reads it."""

    def tensors(self, model: Decoder) -> Mapping[str, Tensor]:
        """The tensors to save, by the model's own names: [...] as the parameters of these names."""

    def write(self, model: Decoder, tensors: Mapping[str, Tensor], directory: Path) -> None:
        """Write the `tensors` of `model`, [...] as its parameters. Raises `UserError` when that fails."""

    def read(self, directory: Path, model: Decoder) -> dict[str, Tensor]:
        """The tensors as saved, [...] as the parameters of `model`.

        Raises `UserError` for a file that is damaged or of another model.
        """


@dataclass(frozen=True)
class WholeModel:
    """`ModelFiles` of a model directory: tensors [...] as the parameters."""

    config: SLMConfig

    def tensors(self, model: Decoder) -> Mapping[str, Tensor]:
        return model.state_dict()

    def write(self, model: Decoder, tensors: Mapping[str, Tensor], directory: Path) -> None:
        save_decoder(model, self.config, directory, tensors)

    def read(self, directory: Path, model: Decoder) -> dict[str, Tensor]:
        return read_state(directory, self.config)


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


@dataclass(frozen=True)
class Snapshot:
    """A copy of a state at one step, unaffected by further training."""

    step: int
    model: Decoder  # only for shapes and names
    files: ModelFiles
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]  # optimizer state
    plain: str  # the rest, as JSON


def take_snapshot(state: State, files: ModelFiles, group: Group = ALONE) -> Snapshot:
    """Copy everything that a checkpoint holds to rank 0's CPU memory. All ranks must call it.

    The checkpoint can be loaded on any number of ranks.
    """
    return Snapshot(
        step=state.step,
        model=state.model,
        files=files,
        weights=on_main(files.tensors(state.model), group),
        moments=on_main(_optimizer_tensors(state), group),
        plain=json.dumps(_plain_state(state), indent=2) + "\n",
    )


def save_checkpoint(state: State, files: ModelFiles, folder: Path, extra_files: ExtraFiles) -> Path:
    """Write the current state synchronously; see `write_checkpoint`."""
    return write_checkpoint(take_snapshot(state, files), folder, extra_files)


def write_checkpoint(snapshot: Snapshot, folder: Path, extra_files: ExtraFiles) -> Path:
    """Write `folder/step-…` and return it. On failure partial files are deleted, older checkpoints unchanged.

    Raises `UserError` when the disk is full or cannot be written.
    """
    final = folder / checkpoint_name(snapshot.step)
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "training_state").mkdir(parents=True)
        snapshot.files.write(snapshot.model, snapshot.weights, partial)
        extra_files(partial)
        save_file(snapshot.moments, partial / OPTIMIZER)
        (partial / STATE).write_text(snapshot.plain, encoding="utf-8")
        _write_manifest(partial)
        if final.exists():  # left by a run that was rolled back
            delete(final)
        os.replace(partial, final)
        sync(folder)
    except (OSError, safetensors.SafetensorError, UserError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{final}: the checkpoint could not be written ({error}); earlier ones are untouched: "
            "free some space, then `slm resume`"
        ) from None
    return final


def load_checkpoint(directory: Path, state: State, files: ModelFiles) -> None:
    """Load a checkpoint's weights, optimizer and counters into `state`, which was built for the same recipe.

    Raises `UserError` for a file that is missing, damaged or of another model.
    """
    verify(directory)
    weights, own = files.read(directory, state.model), state.model.state_dict()
    if weights.keys() != files.tensors(state.model).keys():
        raise UserError(f"{directory}: a checkpoint of a different model than the run's")
    state.model.load_state_dict({name: share_like(full, own[name]) for name, full in weights.items()}, strict=False)
    tensors = load_file(directory / OPTIMIZER)
    for optimizer in state.optimizers:
        moments: dict[int, dict[str, Tensor]] = {
            index: {
                key.rpartition("/")[2]: share_like(tensors[key], own[name])
                for key in tensors
                if key.rpartition("/")[0] == name
            }
            for index, name in enumerate(_names_in(optimizer, state.model))
        }
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    plain = json.loads((directory / STATE).read_text(encoding="utf-8"))
    state.step, state.tokens, state.best = plain["step"], plain["tokens"], plain["best"]
    state.guard, state.loss_scale = Guard(**plain["guard"]), LossScale(**plain["loss_scale"])
    state.data, state.evaluations = plain.get("data", {}), plain.get("evaluations", {})
    if plain["seed"] != state.seed:
        raise UserError(f"{directory}: made with seed {plain['seed']}, the recipe says {state.seed}")


def verify(directory: Path) -> None:
    """Check every file against the manifest. Raises `UserError` naming the first that differs."""
    try:
        listed = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{directory}: not a complete checkpoint: its {MANIFEST} is missing or damaged") from None
    for name, expected in listed.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path}: missing; the checkpoint is damaged, use another one")
        if path.stat().st_size != expected["size"]:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes where its manifest says {expected['size']}: "
                "the checkpoint is damaged, use another one"
            )
        if file_sha256(path) != expected["sha256"]:
            raise UserError(f"{path}: its content is not what its manifest says: the checkpoint is damaged")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that have a manifest, oldest first."""
    return sorted((path.parent for path in folder.glob(f"step-*/{MANIFEST}")), key=step_of)


def step_of(path: Path) -> int:
    """`…/step-000500` → 500."""
    return int(path.name.removeprefix("step-"))


def newest_intact(
    folder: Path, warn: Callable[[str], None], is_wanted: Callable[[Path], bool] = lambda path: True
) -> Path | None:
    """The latest checkpoint that passes `verify`; damaged and partial ones are skipped with a warning.

    `is_wanted` may exclude others. None if none is left. Raises `UserError` if none is left and some are damaged.
    """
    for path in sorted(folder.glob(".partial-*")):
        warn(f"{path.name}: half-written, ignored")
    damaged = len(complete_checkpoints(folder)) < len(list(folder.glob("step-*")))
    for path in reversed(complete_checkpoints(folder)):
        try:
            verify(path)
        except UserError as error:
            warn(f"passed over: {error}")
            damaged = True
            continue
        if is_wanted(path):
            return path
    if damaged:
        raise UserError(f"{folder}: no complete checkpoint to go on from; start the run again with `slm train`")
    return None


def saved_while_all_was_well(checkpoint: Path) -> bool:
    """Whether the guard accepted the step before the checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["guard"]["in_a_row"] == 0


def clear_leftovers(folder: Path) -> None:
    """Delete checkpoints that a crash left partially written or deleted."""
    for path in folder.glob(".*-step-*"):
        shutil.rmtree(path, ignore_errors=True)


def point_link(link: Path, target: Path) -> None:
    """Point `link` to `target` atomically."""
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    os.replace(fresh, link)
    sync(link.parent)


def remove_copy(link: Path, folder: Path) -> None:
    """Delete the folder that `cp -rL` or `scp -r` makes of a link, if it is a copy of a checkpoint in `folder`.

    Raises `UserError` for another folder.
    """
    if link.is_symlink() or not link.is_dir():
        return
    manifest = (link / MANIFEST).read_bytes() if (link / MANIFEST).is_file() else None
    if all((path / MANIFEST).read_bytes() != manifest for path in complete_checkpoints(folder)):
        raise UserError(f"{link} is a folder where a link to a checkpoint belongs: move it away, then `slm resume`")
    delete(link)


def keep_newest(folder: Path, count: int, keep: set[str], until: int) -> None:
    """Delete the checkpoints up to step `until`, except the newest `count` and those named in `keep`.

    Later checkpoints, written before a rollback, are neither counted nor deleted.
    """
    for path in [path for path in complete_checkpoints(folder) if step_of(path) <= until][: -count or None]:
        if path.name not in keep:
            delete(path)


def kept_in(folder: Path, model: Path) -> Path:
    """Path of a new run's starting model; another run's checkpoint is kept in `folder`, since that run may delete it.

    The files are hard links, or copies where the file system has none. Raises `UserError` if they cannot be written.
    """
    model = model.resolve()
    if not (model / MANIFEST).is_file():  # not a checkpoint, or one that is kept already
        return model
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in model.iterdir():
            if path.is_file() and path.name != MANIFEST:
                try:
                    os.link(path, folder / path.name)
                except OSError:
                    shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise UserError(f"{folder}: the starting model cannot be saved here: {error}") from None
    return folder.resolve()


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a partially deleted one is never taken for complete."""
    doomed = checkpoint.with_name(f".deleted-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _plain_state(state: State) -> dict[str, Any]:
    skipped = ("model", "optimizers")
    values = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name not in skipped}
    return {
        name: dataclasses.asdict(value) if name in ("guard", "loss_scale") else value for name, value in values.items()
    }


def _names_in(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[str]:
    """Names of an optimizer's parameters, in its numbering order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)]


def _optimizer_tensors(state: State) -> dict[str, Tensor]:
    """`parameter/moment` → tensor, over all optimizers: each parameter belongs to one."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for optimizer in state.optimizers
        for index, name in enumerate(_names_in(optimizer, state.model))
        for key, value in optimizer.state_dict()["state"].get(index, {}).items()
        if value is not None  # such as SGD's momentum before the first step
    }


def _write_manifest(directory: Path) -> None:
    """List every file with size and checksum, and fsync all of them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    listed = {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"files": listed}, indent=2) + "\n", encoding="utf-8")
    for path in (*files, manifest, directory / "training_state", directory):
        sync(path)
