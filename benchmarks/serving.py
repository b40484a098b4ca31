"""`slm serve`, `transformers serve` and llama.cpp's server: the same model and clients, in turn, on the same two cores.

slm quickstart                                       # makes the model, in five minutes
pip install "slmkit[serve]" "transformers[serving]" xllamacpp gguf
python -m benchmarks.serving runs/quickstart/chat            # six minutes
python -m benchmarks.serving runs/quickstart/chat --smoke    # one round with few requests
python -m benchmarks.serving --draw docs/serving.png         # the chart of what was measured

1,000 streamed chat requests of 200 clients, each of which sends the next as soon as it has an answer. Prompts ask for
stories that nobody was trained on, a quarter of them behind an earlier one; answers are greedy and of 16 to 48 tokens.
In each round each server is started, answers some prompts one at a time, which tell what each text should be, then all
at once. All compute in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import math
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.figures import spread
from benchmarks.load import Reply, load
from slmkit.data.stories import conversation
from slmkit.files.find import find_model_directory

CHAT = "/v1/chat/completions"
CLIENTS, REQUESTS, TEXTS, ALONE = 200, 1_000, 100, 20
LENGTHS = (16, 24, 32, 40, 48)  # new tokens
ROWS = 64  # texts that slmkit and llama.cpp continue at the same time
EARLIER = 400  # characters of an earlier story in the prompt
LONGEST = 256  # tokens of prompt and answer
PERCENTILES = (50, 95, 99)
RESULTS = Path(__file__).parent / "results" / "serving.json"
Messages = Sequence[Mapping[str, str]]


# -- the servers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """How to start a server, where {port} stands for its port, and what its requests say besides the messages."""

    command: Sequence[str]
    body: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)

    def content(self, messages: Messages, tokens: int) -> dict[str, Any]:
        return {"messages": messages, "max_tokens": tokens, "stream": True, **self.body}


def servers(model: Path, gguf: Path, rows: int, threads: int) -> dict[str, Server]:
    """All that are compared. `model`: a directory of transformers' files; `gguf` is written from it."""
    greedy = {"temperature": 0, "ignore_eos": True}
    # transformers has no field for it.
    config = json.dumps({"do_sample": False, "eos_token_id": -1, "pad_token_id": 1})
    slm, port = str(Path(sys.executable).parent / "slm"), ("--port", "{port}")
    transformers = (
        str(Path(slm).parent / "transformers"),
        "serve",
        str(model),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    # By default its cache takes most of the memory, and a minute to begin.
    paged = ("--cb-block-size", "64", "--cb-num-blocks", f"{rows * LONGEST // 64}", "--cb-max-batch-tokens", "512")
    of_transformers = {"model": str(model), "generation_config": config}
    computing = {"OMP_NUM_THREADS": str(threads)}
    offline = {"HF_HUB_OFFLINE": "1"} | computing
    llama_cpp = (
        sys.executable,
        "-m",
        "benchmarks.llama_cpp",
        str(gguf),
        "--slots",
        str(rows),
        "--length",
        str(LONGEST),
    )
    return {
        "slmkit": Server(
            (slm, "serve", f"model={model}", "--max-rows", str(rows), *port), greedy | {"model": "model"}, computing
        ),
        "transformers": Server((*transformers, *port), of_transformers, offline),
        "transformers, continuous batching": Server(
            (*transformers, "--continuous-batching", *paged, *port), of_transformers, offline
        ),
        "llama.cpp": Server((*llama_cpp, *port), greedy | {"model": gguf.stem}, computing),
    }


@contextlib.contextmanager
def started(server: Server, log: Path) -> Iterator[tuple[str, int]]:
    """A server that answers: its URL and process id. Raises `RuntimeError` if it does not within a minute."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [part.format(port=port) for part in server.command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | server.environment,
        )
    try:
        until = time.monotonic() + 60
        while not answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{server.command[0]} does not answer: {log.read_text()[-1000:]}")
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as found:
            return found.status == 200
    except OSError:
        return False


def peak_mib(process: int) -> float:
    """The most memory that a process held so far."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


# -- what is measured -------------------------------------------------------------------------------------------------


def prompts(count: int) -> list[tuple[Messages, int]]:
    """Requests for a story, every fourth one behind an earlier story, and how many tokens to answer with."""
    talks = (conversation(1, index, "heldout") for index in itertools.count())
    stories = (talk for talk in talks if len(talk[0]["content"]) < 100 and len(talk[1]["content"]) > EARLIER)
    found: list[tuple[Messages, int]] = []
    for number, (talk, other) in enumerate(itertools.islice(zip(stories, stories), count)):
        earlier = [other[0], {"role": "assistant", "content": other[1]["content"][:EARLIER]}]
        found.append((([] if number % 4 else earlier) + talk[:1], LENGTHS[number % len(LENGTHS)]))
    return found


def figures(replies: Sequence[Reply], tokens: int, seconds: float) -> dict[str, float]:
    """Rates and times of one load. Times: milliseconds."""
    first, gaps = list[float](), list[float]()
    for reply in replies:
        times = [came for came, _ in reply.deltas()]
        first += [came - reply.sent for came in times[:1]]
        gaps += [after - before for before, after in itertools.pairwise(times)]
    found = {"tokens_per_second": tokens / seconds}
    for name, values in (("first token", first), ("gap", gaps)):
        cuts = (
            statistics.quantiles(values, n=100, method="inclusive")
            if len(values) > 1
            else [values[0] if values else math.inf] * 99
        )
        found |= {f"{name} p{percent}": cuts[percent - 1] * 1000 for percent in PERCENTILES}
    return found


@dataclass
class Round:
    """Of one server: rates, and how many answers were there, lost, compared and wrong."""

    alone: dict[str, float]
    loaded: dict[str, float]
    counts: dict[str, int]
    peak_mib: float
    client_cores: float  # that the clients took


def measure(server: Server, asked: Sequence[tuple[Messages, int]], alone: int, order: Sequence[int],
            clients: int, seconds: float, log: Path) -> Round:  # fmt: skip
    """`order`: which of `asked` each request is. `seconds`: the most that the load may take."""
    contents = [server.content(*one) for one in asked]
    with started(server, log) as (url, process):
        run(load(url, CHAT, contents[:2], 1))  # at first use they allocate and compile
        begun = time.perf_counter()
        singly = [reply for reply in run(load(url, CHAT, contents[:alone], 1)) if reply is not None]
        rates = figures(singly, sum(tokens for _, tokens in asked[:alone]), time.perf_counter() - begun)
        expected = [(reply.text, reply.finish_reason) for reply in singly]
        begun, used = time.perf_counter(), cpu_seconds()
        found = run(load(url, CHAT, [contents[number] for number in order], clients, seconds))
        took, used = time.perf_counter() - begun, cpu_seconds() - used
        memory = peak_mib(process)
    begun_ones = [(number, reply) for number, reply in zip(order, found) if reply is not None]
    right = [(number, reply) for number, reply in begun_ones if reply.ended and not is_lost(reply)]
    compared = [(number, reply) for number, reply in right if number < len(expected)]
    counts = {
        "sent": len(order),
        "answered": len(right),
        "lost": sum((reply.ended or reply.lost) and is_lost(reply) for _, reply in begun_ones),
        "compared": len(compared),
        "wrong": sum((reply.text, reply.finish_reason) != expected[number] for number, reply in compared),
    }
    took = min(took, seconds)
    tokens = sum(asked[number][1] for number, _ in right)
    tokens += sum(len(reply.deltas()) for _, reply in begun_ones if not reply.ended)  # of answers that were cut
    loaded = figures([reply for _, reply in begun_ones], tokens, took)
    return Round(rates, loaded, counts, memory, used / took)


def is_lost(reply: Reply) -> bool:
    return reply.lost or reply.status != 200 or reply.finish_reason is None


def run(work: Any) -> Any:
    return asyncio.run(work)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians and spread of all rounds, and the sums of what was counted."""
    many = [one.loaded["tokens_per_second"] / one.alone["tokens_per_second"] for one in rounds]
    return {
        "loaded": {name: spread([one.loaded[name] for one in rounds], 1) for name in rounds[0].loaded},
        "one at a time": {name: spread([one.alone[name] for one in rounds], 1) for name in rounds[0].alone},
        "loaded / one at a time": spread(many, 2),
        "counts": {name: sum(one.counts[name] for one in rounds) for name in rounds[0].counts},
        "peak_mib": spread([one.peak_mib for one in rounds], 0),
        "client_cores": spread([one.client_cores for one in rounds], 2),
    }


def machine() -> dict[str, Any]:
    from slmkit.device import find_device
    from slmkit.training.logging.metrics_log import environment

    packages = {name: version(name) for name in ("fastapi", "uvicorn", "transformers", "xllamacpp", "gguf")}
    return environment() | find_device("cpu").describe() | {"packages": packages, "cores": os.cpu_count()}


def compare(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The whole result after each round."""
    from safetensors.torch import load_file

    from benchmarks.llama_cpp import write_gguf
    from slmkit.model.config import SLMConfig

    model = find_model_directory(str(arguments.model)).resolve()
    gguf = folder / "model.gguf"
    write_gguf(load_file(model / "model.safetensors"), SLMConfig.from_pretrained(model), gguf, "F32", model)
    peers = servers(model, gguf, arguments.rows, arguments.threads)
    names = [name for name in peers if name.startswith(tuple(arguments.only or [""]))]
    asked = prompts(TEXTS)
    result: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "what": f"{arguments.requests} requests of {arguments.clients} clients, {len(asked)} prompts, answers of "
        f"{min(LENGTHS)} to {max(LENGTHS)} tokens, greedy, float32, {arguments.rows} rows, {arguments.threads} threads",
        "machine": machine(),
        "load_average": [],
        "servers": {},
    }
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        order = random.Random(number).choices(range(len(asked)), k=arguments.requests)
        slower = slower_transformers(rounds) if number else ""
        for name in names:
            if name == slower:
                continue
            ours = name == "slmkit"
            alone = TEXTS if ours and number == 0 and not arguments.smoke else min(ALONE, arguments.requests)
            seconds = 1e9 if ours else arguments.seconds
            one = measure(peers[name], asked, alone, order, arguments.clients, seconds, folder / "log")
            rounds[name].append(one)
            rate = f"{one.loaded['tokens_per_second']:,.0f} tokens/s"
            print(f"round {number + 1}: {name}: {rate}, {one.counts}, clients {one.client_cores:.2f} cores", flush=True)
        result["load_average"].append([round(load, 2) for load in os.getloadavg()])
        yield result | {"servers": {name: summary(found) for name, found in rounds.items()}}


def slower_transformers(rounds: Mapping[str, Sequence[Round]]) -> str:
    """The way of transformers that made fewer tokens in the first round, and is left out of the others."""
    both = [name for name in rounds if name.startswith("transformers")]
    return min(both, key=lambda name: rounds[name][0].loaded["tokens_per_second"]) if len(both) > 1 else ""


# -- what is shown ----------------------------------------------------------------------------------------------------


def print_figures(result: Mapping[str, Any]) -> None:
    columns = [
        "tokens_per_second",
        *(f"{name} p{percent}" for name in ("first token", "gap") for percent in PERCENTILES),
    ]
    print(f"\n{'medians; times in ms':<36}" + "".join(f"{name.replace('_per_', '/'):>18}" for name in columns))
    for name, found in result["servers"].items():
        for state in ("one at a time", "loaded"):
            row = [f"{found[state][column]['median']:,.1f}" for column in columns]
            print(f"{name + ', ' + state:<50}"[:54] + "".join(f"{value:>16}" for value in row))
    for name, found in result["servers"].items():
        ratio, counts = found["loaded / one at a time"], found["counts"]
        print(f"{name}: loaded / one at a time {ratio['median']} ({ratio['least']} to {ratio['most']})")
        print(
            f"  {counts['answered']} answered, {counts['lost']} lost, {counts['wrong']} wrong of {counts['compared']}"
        )
        print(f"  {found['peak_mib']['median']:,.0f} MiB; the clients took {found['client_cores']['median']} cores")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Bars of tokens/s, the time to the first token and gaps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    colors = {"slmkit": "tab:blue", "transformers": "tab:orange", "llama.cpp": "tab:green"}
    names = list(result["servers"])[::-1]
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    shown = {"tokens/s, 200 clients": ["tokens_per_second"]}
    shown |= {
        "ms to the first token, p50, 95, 99": [f"first token p{percent}" for percent in PERCENTILES],
        "ms between tokens, p50, 95, 99": [f"gap p{percent}" for percent in PERCENTILES],
    }
    for plot, (title, keys) in zip(figure.subplots(1, 3), shown.items()):
        for at, name in enumerate(names):
            values = [result["servers"][name]["loaded"][key] for key in keys]
            color = colors[name.split(",")[0]]
            if len(values) == 1:
                value = values[0]
                apart = [[value["median"] - value["least"]], [value["most"] - value["median"]]]
                plot.barh([at], [value["median"]], xerr=apart, color=color, ecolor="grey")
            else:
                plot.plot(
                    [value["median"] for value in values], [at] * len(values), marker="|", ms=14, lw=4, color=color
                )
                plot.set_xscale("log")
                plot.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                plot.xaxis.set_major_formatter(ScalarFormatter())
                plot.xaxis.set_minor_formatter(NullFormatter())
        plot.set(title=title, yticks=range(len(names)), yticklabels=[name.replace(", ", ",\n") for name in names])
        plot.set_ylim(-0.6, len(names) - 0.4)
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(alpha=0.25)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("runs/quickstart/chat"))
    parser.add_argument(
        "--smoke", action="store_true", help="one round of 60 requests of 20 clients, nothing is written"
    )
    parser.add_argument("--only", nargs="+", metavar="SERVER", help="names as in the table, or how they begin")
    parser.add_argument("--clients", type=int, help=f"default: {CLIENTS}")
    parser.add_argument("--requests", type=int, help=f"default: {REQUESTS}")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--rows", type=int, default=ROWS, help="texts that slmkit and llama.cpp continue at once")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compute; 1 on a busy machine")
    parser.add_argument(
        "--seconds", type=float, default=30, help="the most that a peer may take for the load of a round"
    )
    parser.add_argument("--draw", type=Path, metavar="PNG", help="only draw what was measured")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/serving.json")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads((arguments.out or RESULTS).read_text()), arguments.draw)
        return
    for name, usual, few in (("clients", CLIENTS, 20), ("requests", REQUESTS, 60), ("rounds", 3, 1)):
        setattr(arguments, name, getattr(arguments, name) or (few if arguments.smoke else usual))
    path = arguments.out or (None if arguments.smoke else RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        for result in compare(arguments, Path(folder)):
            if path:
                path.write_text(json.dumps(result, indent=2) + "\n")
    print_figures(result)


if __name__ == "__main__":
    main()
