"""Muon against AdamW: the same model, text, batches and schedule; loss over tokens and over seconds, and to one loss.

python benchmarks/muon.py                                   # the built-in stories
python benchmarks/muon.py --text wikitext-2=FILE            # a text of your own besides
python benchmarks/muon.py --draw docs/muon.png              # only the plot, of what was measured

Each optimizer's learning rate is the best of three in runs of their own (seed 100). Muon's rest (embedding, norms) is
updated by AdamW at AdamW's best rate. Optimizers take turns on the same machine. Seconds are of processor time, so that
other programs on it do not count, and without validation.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from slmkit.data.prepare.corpus import Corpus, DataSettings, TokenizerSettings, build_corpus
from slmkit.data.stream import DocumentRows, PretrainRows, Rows, Stream
from slmkit.device import find_device, keep_freed_memory
from slmkit.evaluation import validation_loss
from slmkit.model.config import SLMConfig
from slmkit.model.initialization import build_decoder
from slmkit.training.fit import make_plan
from slmkit.training.logging.metrics_log import environment
from slmkit.training.loop import Every, Report, State, train
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import make_optimizers
from slmkit.training.recipe.recipe import TrainSettings

LENGTH, VOCABULARY, TOKENS_PER_STEP = 128, 2_048, 2_048
LOOKS, VALIDATION_ROWS = 12, 32
SHAPE = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
}  # fmt: skip
RATES = {"adamw": (7e-4, 2e-3, 6e-3), "muon": (0.01, 0.03, 0.06)}
RATE_OF = {"adamw": "learning_rate", "muon": "muon_learning_rate"}
RESULTS = Path(__file__).parent / "results" / "muon.json"
Curve = list[tuple[int, float, float]]  # tokens, seconds, validation loss


class Quiet:
    def say(self, line: object) -> None: ...

    def counter(self, label: str, total: int | None = None):
        return lambda *counts: None


def one_run(corpus: Corpus, steps: int, seed: int, optimizer: str, **rates: float) -> Curve:
    """Train once from fresh weights, and look at the validation loss now and then."""
    device = find_device("cpu")
    settings = TrainSettings(
        sequence_length=LENGTH, tokens_per_step=TOKENS_PER_STEP, max_steps=steps, optimizer=optimizer, **rates
    )
    config = SLMConfig(vocab_size=len(corpus.tokenizer), eos_token_id=corpus.tokenizer.eos_token_id, **SHAPE)
    model = build_decoder(config, seed)
    rows = PretrainRows(corpus.train[0], LENGTH)
    validation = First(DocumentRows(corpus.validation, LENGTH), VALIDATION_ROWS)
    stream = Stream(rows, settings.rows_per_step(LENGTH), seed)
    plan = make_plan(settings, rows.rows_in_epoch, LENGTH, device)
    state = State(model, make_optimizers(model, settings, device), seed=seed)
    curve: Curve = []
    started, looking = time.process_time(), 0.0

    def look(state: State, report: Report) -> None:
        nonlocal looking
        before = time.process_time()
        loss = validation_loss(model, validation, device).loss
        curve.append((state.tokens, before - started - looking, loss))
        looking += time.process_time() - before

    train(state, next_token, stream, plan, [Every(max(1, steps // LOOKS), look)])
    return curve


class First(Rows):
    """The first rows of others."""

    rows_in_epoch = 0

    def __init__(self, rows: DocumentRows, count: int) -> None:
        self.rows, self.rows_in_epoch = rows, min(count, rows.rows_in_epoch)
        self.row, self.documents = rows.row, rows.documents


def where_reached(curve: Curve, loss: float) -> tuple[float, float] | None:
    """Tokens and seconds at which a curve first came to `loss`, on a straight line between two looks."""
    for (t0, s0, l0), (t1, s1, l1) in itertools.pairwise(curve):
        if l1 <= loss < l0:
            share = (l0 - loss) / (l0 - l1)
            return t0 + share * (t1 - t0), s0 + share * (s1 - s0)
    return None


def compare(source: str, steps: int, seeds: int, known: dict[str, float]) -> Iterator[dict[str, object]]:
    """The best rates unless they are known, then `seeds` runs of each optimizer in turn; what stands after each."""
    with tempfile.TemporaryDirectory() as folder:
        data = DataSettings(source=source, documents=2_000, validation_documents=200, validation_fraction=0.05)
        corpus = build_corpus("text", data, TokenizerSettings(vocab_size=VOCABULARY), 0, Path(folder), None, Quiet())
        tried: dict[str, dict[float, float]] = {"adamw": {}, "muon": {}}
        best = dict(known)
        for optimizer in ("adamw", "muon"):  # AdamW first: its rate is that of Muon's rest, too
            for rate in () if known else RATES[optimizer]:
                loss = one_run(corpus, steps, 100, optimizer, **(best | {RATE_OF[optimizer]: rate}))[-1][2]
                tried[optimizer][rate] = round(loss, 4)
                print(f"{source}: {optimizer} at {rate}: {loss:.4f}", flush=True)
                best[RATE_OF[optimizer]] = min(tried[optimizer], key=tried[optimizer].__getitem__)
        curves: dict[str, list[Curve]] = {"adamw": [], "muon": []}
        for seed in range(seeds):
            for optimizer in ("adamw", "muon"):
                curves[optimizer].append(one_run(corpus, steps, seed, optimizer, **best))
                print(f"{source}: {optimizer}, seed {seed}: {curves[optimizer][-1][-1]}", flush=True)
            yield summary(tried, best, curves)


def summary(tried: dict, best: dict[str, float], curves: dict[str, list[Curve]]) -> dict[str, object]:
    return {
        "rates_tried": tried,
        "rates": best,
        "final_loss": {name: [round(curve[-1][2], 4) for curve in found] for name, found in curves.items()},
        "to_adamws_last_loss": [ratios(*pair) for pair in zip(curves["adamw"], curves["muon"])],
        "curves": {name: [[[t, round(s, 2), round(x, 4)] for t, s, x in c] for c in f] for name, f in curves.items()},
    }


def ratios(adamw: Curve, muon: Curve) -> dict[str, float] | None:
    """How many times fewer tokens and seconds Muon took to the loss at which AdamW ended."""
    tokens, seconds, loss = adamw[-1]
    reached = where_reached(muon, loss)
    return reached and {"tokens": round(tokens / reached[0], 2), "seconds": round(seconds / reached[1], 2)}


def draw(found: dict[str, dict], path: Path) -> None:
    """Loss over tokens and over seconds, a row of plots for each text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4 * len(found)), layout="constrained")
    for axes, (text, result) in zip(figure.subplots(len(found), 2, squeeze=False), found.items()):
        for column, (what, unit) in enumerate((("thousand trained tokens", 1000), ("seconds", 1))):
            for name, color in (("adamw", "tab:orange"), ("muon", "tab:blue")):
                for number, curve in enumerate(result["curves"][name]):
                    x, y = [point[column] / unit for point in curve], [point[2] for point in curve]
                    axes[column].plot(x, y, color=color, linewidth=1, label=None if number else name)
            axes[column].set(xlabel=what, ylabel="validation loss (nats per token)", title=text)
            axes[column].spines[["top", "right"]].set_visible(False)
            axes[column].grid(alpha=0.25)
            axes[column].legend(frameon=False)
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--only-text", action="store_true", help="leave the built-in stories out")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rates", type=float, nargs=2, metavar=("ADAMW", "MUON"), help="leave out trying them")
    parser.add_argument("--draw", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text())["texts"] if RESULTS.exists() else {}
    if arguments.draw:
        draw(known, arguments.draw)
        return
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    rates = dict(zip(("learning_rate", "muon_learning_rate"), arguments.rates or ()))
    texts = {} if arguments.only_text else {"stories": "stories"}
    texts |= dict(text.split("=", 1) for text in arguments.text)
    for name, source in texts.items():
        for result in compare(source, arguments.steps, arguments.seeds, rates):
            known = json.loads(RESULTS.read_text())["texts"] if RESULTS.exists() else {}
            known[name] = {"steps": arguments.steps, "threads": arguments.threads} | result
            content = {"date": datetime.date.today().isoformat(), "environment": environment(), "texts": known}
            RESULTS.write_text(json.dumps(content) + "\n")
            print(name, {key: value for key, value in result.items() if key != "curves"}, flush=True)


if __name__ == "__main__":
    main()
