"""`slm recipes`."""

from __future__ import annotations


def recipes() -> None:
    """List the recipes that come with slmkit.

    Each is a YAML file of the folder named below the list; values can be changed on the command line, or in a copy.

    Example: slm recipes
    """
    from slmkit.training.recipe import shipped_recipes

    folder = None
    for command, kind in (("train", ""), ("merge", "merging")):
        found = shipped_recipes(kind)
        print(f"slm {command} RECIPE, with RECIPE one of")
        width = max(map(len, found)) + 4
        for name, path in sorted(found.items()):
            about = path.read_text(encoding="utf-8").partition("\n")[0].strip("# :.")
            print(f"{f'  {name}':<{width}}{about}")
            folder = folder or path.parent
        print()
    print(f"folder: {folder}")
    print("every value of one: slm train RECIPE --print-config")
