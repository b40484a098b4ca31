"""`slm recipes`."""

from __future__ import annotations


def recipes() -> None:
    """List the recipes that come with slmkit.

    Each is a YAML file of the folder named below the list: copy one to change more than a few values of it.

    Example: slm recipes
    """
    import shutil
    import textwrap

    from slmkit.training.recipe import shipped_recipes

    found, columns = shipped_recipes(), shutil.get_terminal_size().columns
    width = max(map(len, found)) + 2
    for name, path in sorted(found.items()):
        about = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        print(textwrap.fill(f"{name:<{width}}{about}", max(60, columns), subsequent_indent=" " * width))
    print(f"\nfolder: {next(iter(found.values())).parent}")
    print("next: slm train NAME [KEY=VALUE]…, or slm train NAME --print-config for every value")
