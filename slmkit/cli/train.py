"""`slm train` and `slm resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.options import Overrides, PrintConfig, RecipeName, RunPath

DRY_RUN = "Prepare and check everything, and stop before the first step."
REPLAN = "Spread the learning rate's schedule over the run's new length."


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN)] = False,
    force: Annotated[bool, typer.Option("--force", help="Train although the x-ray found a reason not to.")] = False,
) -> None:
    """Train a model as a recipe says.

    The recipe's `objective` says how: pretrain, sft (fine-tuning on conversations), distill, dpo, kto or grpo. Ctrl-C
    stops it with a checkpoint; `slm resume` goes on.

    Example: slm train own-text data.source=book.txt output_dir=runs/book
    Example: slm train own-text data.source=book.txt train.max_tokens=3e6 --dry-run
    """
    from slmkit.cli.show import TerminalReporter, show_run
    from slmkit.config import to_yaml
    from slmkit.training.recipe.checks import expect_ready
    from slmkit.training.recipe.recipe import find_recipe, load_recipe

    reporter = TerminalReporter()
    loaded = load_recipe(find_recipe(recipe), overrides or [], reporter.say)
    if print_config:
        print(to_yaml(loaded), end="")
        return
    expect_ready(loaded)
    from slmkit.workflows.train import train_recipe  # imports torch: after the arguments were checked

    run = train_recipe(loaded, reporter, dry_run=dry_run, force=force)
    if not dry_run:
        show_run(run.root)


def resume(
    run: RunPath,
    overrides: Overrides = None,
    replan: Annotated[bool, typer.Option("--replan", help=REPLAN)] = False,
) -> None:
    """Go on with a stopped run, or train a run longer.

    It starts from the newest complete checkpoint and gives the model that the uninterrupted run would have given.

    Example: slm resume runs/book train.max_tokens=6e6
    """
    from slmkit.cli.show import TerminalReporter, show_run
    from slmkit.files.find import find_run

    find_run(run)  # before anything is loaded
    from slmkit.workflows.train import resume_run

    show_run(resume_run(run, TerminalReporter(), overrides or [], replan).root)


def replay(run: RunPath, step: Annotated[int, typer.Option(help="The step's number in metrics.jsonl.")]) -> None:
    """Repeat one step of a run, and look inside it.

    It says whether the figures are the recorded ones, which layer, row and token first gave a value that is not finite,
    and which weights and rows have the largest gradients. The run is left as it is.

    Example: slm replay runs/book --step 12
    """
    from slmkit.cli.show import TerminalReporter
    from slmkit.files.find import find_run

    find_run(run)  # before anything is loaded
    reporter = TerminalReporter()
    reporter.say(f"opening {run}")
    from slmkit.workflows.train import replay_run

    done = replay_run(run, step, reporter)
    figures = done.report
    print(f"step {step}: loss {figures['loss']:.6g}, gradient norm {figures['grad_norm']:.6g}")
    if "skipped" in figures:
        print(f"  refused: {figures['skipped']}")
    if done.recorded is None:
        print("  nothing was recorded of it to compare with")
    for name, (now, then) in done.differences.items():
        print(f"  {name}: {now} now, {then} when it was recorded")
    if done.recorded is not None and not done.differences:
        print("  the same as recorded, bit for bit")
    broken = done.broken
    if broken is not None:
        print(f"first non-finite tensor: {broken.what}")
    if broken is not None and broken.row is not None and broken.position is not None:
        token = int(done.batch.ids[broken.row, broken.position])
        print(f"  row {broken.row}, position {broken.position}: token {token} {done.decode([token])!r}")
        print(f"  …{done.text_before(broken.row, broken.position)!r}")
    print("largest gradients: " + ", ".join(f"{name} {norm:.3g}" for name, norm in done.gradients[:5]))
    print("rows by gradient, each alone:")
    for row in done.rows[:5]:
        start = done.text_before(row.number, 15)
        print(f"  row {row.number}: loss {row.loss:.4g}, gradient norm {row.grad_norm:.4g}, begins {start!r}")


def distill_cache(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Store a teacher's predictions for `slm train` to learn from.

    The likeliest tokens of each position go to the folder that `distillation.cache` names; training reads them from
    there and needs no teacher in memory. If it was stopped, the same command goes on.

    Example: slm distill-cache quickstart-distill distillation.cache=runs/taught
    """
    from slmkit.cli.show import TerminalReporter
    from slmkit.training.recipe.checks import expect_ready
    from slmkit.training.recipe.recipe import find_recipe, load_recipe

    reporter = TerminalReporter()
    loaded = load_recipe(find_recipe(recipe), overrides or [], reporter.say)
    expect_ready(loaded)
    from slmkit.workflows.distill import cache_teacher

    stored = cache_teacher(loaded, reporter)
    assert loaded.distillation is not None
    print(f"{loaded.distillation.cache}: the {stored.k} likeliest tokens of each position, in {stored.rows:,} rows")
    print(f"next: slm train {recipe} {' '.join(overrides or [])}".rstrip())
