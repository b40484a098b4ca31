"""Run `slm` as a user does: in a process of its own.

Importing torch takes seconds, so the processes are forks of one that has imported it. What is tested about the start
itself, about signals or about a launcher starts its own processes.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path

SLM = "from slmkit.cli import main; main()"
LOADED_BEFORE = (
    "torch._dynamo", "torch.distributed", "scipy.stats", "uvicorn", "slmkit.serving.app",
    "matplotlib.figure", "matplotlib.backends.backend_agg",
    "slmkit.workflows.train", "slmkit.workflows.quickstart", "slmkit.training.fit", "slmkit.training.logging.plots",
    "slmkit.training.estimate.probe", "slmkit.generation.text", "slmkit.evaluation.loss",
    "slmkit.data.prepare.text_to_shards", "slmkit.cli",
)  # fmt: skip


def slm(*arguments: str | Path, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return python(SLM, *arguments, cwd=cwd, stdin=stdin)


def python(
    code: str, *arguments: str | Path, cwd: Path | None = None, stdin: str = "", timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """What `python -c code arguments` does, with this environment and torch imported before."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        given.write(stdin.encode())
        given.seek(0)
        begin(code, words, cwd or Path.cwd(), [file.fileno() for file in (given, out, error)])
        code_of_end = ended(timeout, words)
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(["slm", *words], code_of_end, *texts)


def begin(code: str, words: list[str], cwd: Path, descriptors: list[int], **environment: str) -> None:
    """Start what `python -c code words` does, with these descriptors of its three streams. `ended` has to follow."""
    request = {"code": code, "arguments": words, "cwd": str(cwd), "environment": {**os.environ, **environment}}
    server, _ = _server(os.getpid())
    socket.send_fds(server, [b"!"], descriptors)
    line = json.dumps(request).encode()
    server.sendall(len(line).to_bytes(8) + line)


def ended(timeout: float, words: list[str]) -> int:
    """The exit code of what was begun. Raises `TimeoutExpired` when it was killed because it took too long."""
    server, _ = _server(os.getpid())
    process = int.from_bytes(_receive(server, 8))
    server.settimeout(timeout)
    try:
        return int.from_bytes(_receive(server, 8), signed=True)
    except TimeoutError:
        os.kill(process, signal.SIGKILL)
        server.settimeout(None)
        _receive(server, 8)
        raise subprocess.TimeoutExpired(["slm", *words], timeout) from None
    finally:
        server.settimeout(None)


@cache
def _server(asking: int) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process that is forked, one for each process that asks, and the connection to it, with which it ends."""
    ours, theirs = socket.socketpair()
    root = Path(sys.modules[__name__.partition(".")[0]].__path__[0]).parent
    code = f"import sys; from {__name__} import serve; serve(int(sys.argv[1]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(theirs.fileno())],
        cwd=root, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads do not survive a fork
    )  # fmt: skip
    theirs.close()
    return ours, process


def serve(descriptor: int) -> None:
    """Fork for every request."""
    for name in LOADED_BEFORE:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread is not in a fork"
    os.fsync = lambda descriptor: None  # no power fails here
    gc.collect()
    gc.freeze()  # or the first collection in a fork would copy every page
    connection = socket.socket(fileno=descriptor)
    while True:
        _, files, *_ = socket.recv_fds(connection, 1, 3)
        if not files:
            os._exit(0)
        request = json.loads(_receive(connection, int.from_bytes(_receive(connection, 8))))
        process = os.fork()
        if process == 0:
            connection.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["environment"])
            sys.argv = ["-c", *request["arguments"]]
            _run(request["code"])
        for file in files:
            os.close(file)
        connection.sendall(process.to_bytes(8))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        connection.sendall(code.to_bytes(8, signed=True))


def _run(code: str) -> None:
    """Run it as `python -c` does, and end without taking the modules apart, which would copy their memory."""
    status: object = 0
    try:
        exec(code, vars(sys.modules["__main__"]))
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _receive(connection: socket.socket, size: int) -> bytes:
    read = b""
    while len(read) < size:
        part = connection.recv(size - len(read))
        assert part, "the other process has ended"
        read += part
    return read


def refused(*arguments: str | Path, cwd: Path | None = None) -> str:
    """The one line of a command that must end with exit code 2; progress may stand before it."""
    done = slm(*arguments, cwd=cwd)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    *progress, last = done.stderr.splitlines()
    assert last.startswith("slm: ")
    assert all(line.startswith(("tokenizer: ", "opening ")) or " replaces " in line for line in progress), done.stderr
    return last


TINY = (  # with two evaluations, since every one draws the losses, which takes longer than the steps
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.max_position_embeddings=64", "tokenizer.vocab_size=300", "train.tokens_per_step=512",
    "train.max_tokens=null", "train.max_steps=12", "train.eval_steps=6", "train.device=cpu", "train.sample_tokens=10",
)  # fmt: skip
