"""The launch files for clusters: what they say is what the launcher and the command line take."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml
from torch.distributed.run import get_args_parser

from slmkit.training.recipe.recipe import find_recipe, load_recipe

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes" / "cluster"


def check_launch(arguments: list[str]) -> None:
    """torchrun takes the arguments, and what it starts is a recipe with keys that exist."""
    parsed = get_args_parser().parse_args(arguments)
    assert parsed.rdzv_backend == "c10d"
    assert parsed.module
    assert parsed.training_script == "slmkit.cli"
    command, recipe, *overrides = parsed.training_script_args
    assert command == "train"
    load_recipe(find_recipe(recipe), overrides)


def test_the_manifest_for_kubernetes_starts_torchrun_on_every_host() -> None:
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    container = pod["containers"][0]
    assert f"--nnodes={job['spec']['completions']}" in container["args"]
    assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:29400" in container["args"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["command"] == ["torchrun"]
    check_launch(container["args"])


def test_the_batch_file_for_slurm_starts_torchrun_on_every_host(tmp_path: Path) -> None:
    """Run with stand-ins for Slurm's own two commands, which print what they are asked."""
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)
    for name, line in (("scontrol", 'printf "node0\\nnode1\\n"'), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", FOLDER / "slurm.sh", "own-text", "data.source=book.txt"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split("\n")
    assert printed[0] == "torchrun"
    assert printed[printed.index("--rdzv-endpoint") + 1] == "node0:29400"
    assert printed[printed.index("--rdzv-id") + 1] == "7"
    check_launch(printed[1:-1])


def test_the_commands_in_the_page_are_taken_too() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line.split()[1:] for line in re.findall(r"^torchrun .*train.*", page, re.MULTILINE)]
    assert len(commands) == 2
    for arguments in commands:
        assert get_args_parser().parse_args(arguments).training_script == "slmkit.cli"
