"""`slm train` and `slm resume`."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that comes with slmkit.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the recipe with every value, and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Prepare everything, and stop before the first step.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Train in spite of what the x-ray finds.")] = False,
) -> None:
    """Pretrain, fine-tune, or learn from preferences and rewards: the recipe's `objective` says which.

    Example: slm train own-text data.source=book.txt output_dir=runs/book train.max_tokens=3e6
    """
    from slmkit.cli.show import TerminalReporter
    from slmkit.config import to_yaml
    from slmkit.training.recipe import find_recipe, load_recipe

    reporter = TerminalReporter()
    loaded = load_recipe(find_recipe(recipe), overrides or [], reporter.say)
    if print_config:
        print(to_yaml(loaded), end="")
        return
    from slmkit.api import train_recipe

    run = train_recipe(loaded, reporter, dry_run=dry_run, force=force)
    if not dry_run:
        print(f"run: {run.root}")
        verb = "generate" if loaded.reads == "text" else "chat"
        print(f"next: slm {verb} {run.root}")


def resume(run: Annotated[str, typer.Argument(help="A run directory, such as runs/book.")]) -> None:
    """Go on with a run that was stopped or killed, from its newest complete checkpoint.

    Example: slm resume runs/book
    """
    from slmkit.api import resume_run
    from slmkit.cli.show import TerminalReporter

    print(f"run: {resume_run(run, TerminalReporter()).root}")


def replay(
    run: Annotated[str, typer.Argument(help="A run directory, such as runs/book.")],
    step: Annotated[int, typer.Option(help="Which step, as metrics.jsonl counts them.")],
) -> None:
    """Do one step of a run again, bit for bit, and say which layer, row and token broke or weigh most in it.

    Example: slm replay runs/book --step 120
    """
    from slmkit.api.replay import replay_run
    from slmkit.cli.show import TerminalReporter

    done = replay_run(run, step, TerminalReporter())
    figures = done.replay.report
    print(f"step {step}: loss {figures['loss']:.6g}, gradient norm {figures['grad_norm']:.6g}")
    if "skipped" in figures:
        print(f"  refused: {figures['skipped']}")
    if done.recorded is None:
        print("  nothing was recorded of it to compare with")
    for name, (now, then) in done.differences.items():
        print(f"  {name}: {now} now, {then} when it was recorded")
    if done.recorded is not None and not done.differences:
        print("  the same as recorded, bit for bit")
    broken = done.replay.broken
    if broken is not None:
        print(f"first to break: {broken.what}")
    if broken is not None and broken.row is not None and broken.position is not None:
        token_id, token = done.token(broken.row, broken.position)
        print(f"  row {broken.row}, position {broken.position}: token {token_id} {token!r}")
        print(f"  …{done.text_before(broken.row, broken.position)!r}")
    print("largest gradients: " + ", ".join(f"{name} {norm:.3g}" for name, norm in done.replay.gradients[:5]))
    print("rows by gradient, each alone:")
    for row in done.replay.rows[:5]:
        start = done.text_before(row.number, 15)
        print(f"  row {row.number}: loss {row.loss:.4g}, gradient norm {row.grad_norm:.4g}, begins {start!r}")
