"""Each method is what its paper says, the whole way from model directories to a model directory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.adapt import merge_reference as reference
from tests.adapt.merge_models import Arrays, arrays, bits, merge, small, write_family

TUNES = ["tune-0", "tune-1", "tune-2"]
WEIGHTS = [0.5, 0.3, 0.4]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with untied embeddings, and a GPT-2, which stores fused and transposed matrices and biases."""
    found = tmp_path_factory.mktemp(request.param)
    untied = {"tie_word_embeddings": False} if request.param == "llama" else {}
    write_family(found, small(model_type=request.param, **untied))
    return found


names = map("out-{}".format, itertools.count())


def entries(**values: object) -> list[dict[str, object]]:
    return [{"model": tune, "weight": w} | values for tune, w in zip(TUNES, WEIGHTS)]


def expect(folder: Path, output: Path, method: Callable[..., np.ndarray]) -> Arrays:
    """Every tensor of `output` is `method` of the base's and the tunes'."""
    base, tunes, found = arrays(folder / "base"), [arrays(folder / tune) for tune in TUNES], arrays(output)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, method(base[name], [tune[name] for tune in tunes]), atol=2e-6, err_msg=name)
    return found


def test_linear_is_the_weighted_mean_or_the_sum(folder: Path) -> None:
    mean = merge(folder, next(names), merge_method="linear", models=entries())
    expect(folder, mean, lambda base, tunes: sum(w * x for x, w in zip(tunes, WEIGHTS)) / 1.2)
    total = merge(folder, next(names), merge_method="linear", models=entries(), normalize=False)
    expect(folder, total, lambda base, tunes: sum(w * x for x, w in zip(tunes, WEIGHTS)))


@pytest.mark.parametrize("t", [0.25, 0.5, 0.9])
def test_slerp_goes_along_the_arc(folder: Path, t: float) -> None:
    output = merge(folder, next(names), merge_method="slerp", models=TUNES[:2], t=t)

    def arc(base: np.ndarray, tunes: list[np.ndarray]) -> np.ndarray:
        a, b = tunes[:2]
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        return (1 - t) * a + t * b if abs(cosine) > 0.9995 else reference.slerp(a, b, t)

    expect(folder, output, arc)


def test_slerp_keeps_the_length_where_a_mean_would_shorten(folder: Path) -> None:
    output = arrays(merge(folder, next(names), merge_method="slerp", models=["base", "tune-0"], t=0.5))
    first, second = arrays(folder / "base"), arrays(folder / "tune-0")
    name = max(output, key=lambda name: output[name].size)
    lengths = [np.linalg.norm(found[name]) for found in (first, output, second)]
    assert min(lengths[0], lengths[2]) <= lengths[1] * (1 + 1e-6)
    assert lengths[1] > np.linalg.norm((first[name] + second[name]) / 2)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_task_arithmetic_adds_what_was_learned(folder: Path, scale: float) -> None:
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "lambda": scale}
    output = merge(folder, next(names), models=entries(), **recipe)
    expect(folder, output, lambda base, tunes: reference.task_arithmetic(base, tunes, WEIGHTS, scale))
    mean = merge(folder, next(names), models=entries(), normalize=True, **recipe)
    shares = [w / 1.2 for w in WEIGHTS]
    expect(folder, mean, lambda base, tunes: reference.task_arithmetic(base, tunes, shares, scale))


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("mean", [True, False])
def test_ties_trims_elects_and_merges(folder: Path, density: float, mean: bool) -> None:
    recipe = {"merge_method": "ties", "base_model": "base", "lambda": 0.8, "normalize": mean}
    output = merge(folder, next(names), models=entries(density=density), **recipe)
    expect(folder, output, lambda base, tunes: reference.ties(base, tunes, WEIGHTS, density, 0.8, mean))


def test_the_base_may_stand_among_the_models_as_mergekit_writes_it(folder: Path) -> None:
    recipe = {"merge_method": "ties", "base_model": "base", "parameters": {"normalize": True, "lambda": 0.5}}
    models = [{"model": "base"}, *({"model": t, "parameters": {"weight": 0.3, "density": 0.4}} for t in TUNES)]
    output = merge(folder, next(names), models=models, **recipe)
    expect(folder, output, lambda base, tunes: reference.ties(base, tunes, [0.3] * 3, 0.4, 0.5, mean=True))


# -- DARE -------------------------------------------------------------------------------------------------------------


def dare(folder: Path, method: str = "dare_linear", **recipe: object) -> Path:
    return merge(folder, next(names), merge_method=method, base_model="base", **recipe)


def test_dare_drops_a_share_and_scales_the_rest_up(folder: Path) -> None:
    base, tune = arrays(folder / "base"), arrays(folder / "tune-0")
    output = arrays(dare(folder, models=[{"model": "tune-0", "density": 0.25}]))
    kept = total = 0
    for name, tensor in output.items():
        tau, change = tune[name] - base[name], tensor - base[name]
        is_kept = np.abs(change) > 1e-5 + np.abs(tau)  # four times as much, or nothing
        np.testing.assert_allclose(change, np.where(is_kept, 4 * tau, 0), atol=5e-5)
        kept, total = kept + is_kept.sum(), total + is_kept.size
    assert abs(kept / total - 0.25) < 5 * (0.25 * 0.75 / total) ** 0.5


def test_the_mean_of_many_dares_is_task_arithmetic(folder: Path) -> None:
    models = [{"model": tune, "weight": w, "density": 0.5} for tune, w in zip(TUNES, WEIGHTS)]
    many = [arrays(dare(folder, models=models, seed=seed)) for seed in range(30)]
    plain = arrays(merge(folder, next(names), merge_method="task_arithmetic", base_model="base", models=entries()))
    base, tunes, errors = arrays(folder / "base"), [arrays(folder / tune) for tune in TUNES], []
    for name, expected in plain.items():
        # Kept with probability 1/2 and doubled, a number w τ has the variance (w τ)²; the mean of 30 has a 30th of it.
        changes = [w * (tune[name] - base[name]) for tune, w in zip(tunes, WEIGHTS)]
        deviation = np.sqrt(sum(change**2 for change in changes) / 30) + 1e-6
        errors.append(((np.mean([output[name] for output in many], axis=0) - expected) / deviation).ravel())
    found = np.concatenate(errors)
    assert (found**2).mean() == pytest.approx(1, abs=0.1)
    assert abs(found.mean()) < 5 / found.size**0.5


def test_the_same_seed_drops_the_same_and_another_one_other_places(folder: Path) -> None:
    models = [{"model": tune, "density": 0.5} for tune in TUNES[:2]]
    first, again, other = (bits(dare(folder, models=models, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_models_are_dropped_from_at_different_places(folder: Path) -> None:
    """A model merged with itself: were the places the same, every change would be 0 or twice as much."""
    base, tune = arrays(folder / "base"), arrays(folder / "tune-0")
    output = arrays(dare(folder, models=[{"model": "tune-0", "density": 0.5}] * 2))
    name = max(output, key=lambda name: output[name].size)
    times = np.rint((output[name] - base[name]) / (tune[name] - base[name]))
    assert {0, 2, 4} <= set(np.unique(times))
    assert (times == 2).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("mean", [True, False])
def test_dare_ties_elects_among_what_is_left(folder: Path, mean: bool) -> None:
    """What each model has left follows from the model alone with the same seed and place in the list."""
    base, density = arrays(folder / "base"), 0.5
    left: list[Arrays] = []
    for number in range(3):
        models = [{"model": t, "weight": float(i == number), "density": density} for i, t in enumerate(TUNES)]
        left.append(arrays(dare(folder, models=models, seed=5)))
    output = arrays(dare(folder, "dare_ties", models=entries(density=density), seed=5, normalize=mean))
    for name, tensor in output.items():
        taus = [one[name] - base[name] for one in left]
        taus = [np.where(np.abs(tau) > 1e-5, tau, 0) for tau in taus]
        expected = base[name] + reference.elected(taus, WEIGHTS, mean)
        assert (np.abs(tensor - expected) < 1e-5).mean() > 0.999  # but where a sum is nearly zero, and its sign open


# -- what must come out exactly ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        {"merge_method": "linear", "models": [{"model": "tune-1", "weight": 1}, {"model": "tune-0", "weight": 0}]},
        {"merge_method": "linear", "models": [{"model": "tune-1", "weight": 0.3}]},
        {"merge_method": "slerp", "models": ["tune-1", "tune-0"], "t": 0},
        {"merge_method": "slerp", "models": ["tune-0", "tune-1"], "t": 1},
        {"merge_method": "slerp", "models": ["tune-0", "tune-1"], "base_model": "tune-1", "t": 0},
        {"merge_method": "task_arithmetic", "base_model": "base", "models": ["tune-1"]},
        {"merge_method": "task_arithmetic", "base_model": "tune-1", "models": ["tune-0"], "lambda": 0},
        {"merge_method": "ties", "base_model": "tune-1", "models": ["tune-0", "base"], "lambda": 0},
        {"merge_method": "dare_ties", "base_model": "tune-1", "models": [{"model": "base", "density": 0.0}]},
    ],
    ids=str,
)
def test_where_one_model_has_all_the_weight_it_comes_back_bit_for_bit(folder: Path, recipe: dict) -> None:
    assert bits(merge(folder, next(names), **recipe)) == bits(folder / "tune-1")


def test_ties_of_everything_where_all_signs_agree_is_the_mean(folder: Path) -> None:
    output = merge(folder, next(names), merge_method="ties", base_model="base", models=["tune-0", "tune-0", "tune-0"])
    expect(folder, output, lambda base, tunes: tunes[0])
    base, tunes = arrays(folder / "base"), [arrays(folder / tune) for tune in TUNES]
    both = arrays(merge(folder, next(names), merge_method="ties", base_model="base", models=TUNES))
    for name, tensor in both.items():
        signs = np.stack([np.sign(tune[name] - base[name]) for tune in tunes])
        agree = np.abs(signs.sum(0)) == 3
        np.testing.assert_allclose(tensor[agree], np.mean([tune[name] for tune in tunes], axis=0)[agree], atol=1e-6)


def test_a_list_of_weights_is_spread_over_the_depth(folder: Path) -> None:
    output = arrays(merge(folder, next(names), merge_method="slerp", models=["base", "tune-0"], t=[0, 0.5, 1]))
    first, second = arrays(folder / "base"), arrays(folder / "tune-0")
    for name, tensor in output.items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if number == 0 or any(word in name for word in ("embed", "wte", "wpe")):
            assert np.array_equal(tensor, first[name]), name
        elif number == 1:
            assert not np.array_equal(tensor, first[name])
            assert not np.array_equal(tensor, second[name])
        else:
            assert np.array_equal(tensor, second[name]), name
