"""Runs a function in several processes over gloo, as `torchrun` would start them, without importing torch in each."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from slmkit.training.logging import logger

PATIENCE = 300  # seconds for all processes together

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "slmkit.api", "torch.distributed.fsdp", "matplotlib.figure"])


def on_ranks(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)` on `world` ranks. An exception on any of them fails the test with its text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = processes.Queue()
    started = [
        processes.Process(target=_on_rank, args=(rank, world, port, errors, function, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
    still_running = [process for process in started if process.is_alive()]
    for process in still_running:
        process.kill()
        process.join()
    failures = []
    while not errors.empty():
        failures.append(errors.get())
    assert not failures, "\n".join(failures)
    assert not still_running, f"{len(still_running)} of {world} processes hang"
    assert [process.exitcode for process in started] == [0] * world


def _on_rank(rank: int, world: int, port: int, errors: Any, function: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for draw in ("plot_losses", "plot_shares", "plot_tasks"):  # pictures are those of one process, and take seconds
        setattr(logger, draw, lambda *arguments: None)
    try:
        function(*arguments)
    except Exception:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        errors.close()
        errors.join_thread()
        raise SystemExit(1) from None
