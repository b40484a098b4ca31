"""Each method is what its paper says, the whole way from model directories to a model directory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from slmkit.adapt.merge_recipe import MergeRecipe
from slmkit.config import UserError, load_settings
from slmkit.model.files.directory import WEIGHTS as WEIGHTS_FILE
from slmkit.workflows.merge import prepare_merge, write_merge
from tests.adapt import merge_reference as reference
from tests.adapt.merge_models import Arrays, arrays, bits, merge, small, write_family
from tests.long import several

TUNES = ["tune-0", "tune-1", "tune-2"]
WEIGHTS = [0.5, 0.3, 0.4]


# Of every family: test_merge_directories.py.
@pytest.fixture(scope="module", params=several(["gpt2"], ["llama", "gpt2"]))
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
    many = [arrays(dare(folder, models=models, seed=seed)) for seed in range(12)]
    plain = arrays(merge(folder, next(names), merge_method="task_arithmetic", base_model="base", models=entries()))
    base, tunes, errors = arrays(folder / "base"), [arrays(folder / tune) for tune in TUNES], []
    for name, expected in plain.items():
        # Kept with probability 1/2 and doubled, a number w τ has the variance (w τ)²; the mean of 12 has a 12th of it.
        changes = [w * (tune[name] - base[name]) for tune, w in zip(tunes, WEIGHTS)]
        deviation = np.sqrt(sum(change**2 for change in changes) / 12) + 1e-6
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


def place(name: str, layers: int = 3) -> float:
    """Where mergekit's planner evaluates a gradient: layers from 0 to 1, everything outside of them at 0."""
    number = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    return number / (layers - 1)


def test_a_list_is_spread_over_the_layers_and_begins_outside_of_them_as_in_mergekit(folder: Path) -> None:
    output = arrays(merge(folder, next(names), merge_method="slerp", models=["base", "tune-0"], t=[0, 0.5, 1]))
    first, second = arrays(folder / "base"), arrays(folder / "tune-0")
    assert any(name in output for name in ("lm_head.weight", "transformer.ln_f.weight"))
    for name, tensor in output.items():
        if place(name) == 0:  # the first layer; and embedding, final norm and head
            assert np.array_equal(tensor, first[name]), name
        elif place(name) == 1:
            assert np.array_equal(tensor, second[name]), name
        else:
            assert not np.array_equal(tensor, first[name])
            assert not np.array_equal(tensor, second[name])


@pytest.mark.parametrize("key", ["weight", "density", "lambda"])
def test_so_is_every_other_number(folder: Path, key: str) -> None:
    values = [0.2, 1.0, 0.6]
    usual = {"weight": 0.5, "density": 0.7, "lambda": 0.9}
    chosen = usual | {key: values}
    models = [{"model": tune} | {k: chosen[k] for k in ("weight", "density")} for tune in TUNES]
    recipe = {"merge_method": "ties", "base_model": "base", "lambda": chosen["lambda"], "normalize": False}
    output = arrays(merge(folder, next(names), models=models, **recipe))
    base, tunes = arrays(folder / "base"), [arrays(folder / tune) for tune in TUNES]
    for name, tensor in output.items():
        here = usual | {key: values[round(place(name) * 2)]}
        expected = reference.ties(
            base[name],
            [tune[name] for tune in tunes],
            [here["weight"]] * 3,
            here["density"],
            here["lambda"],
            mean=False,
        )
        np.testing.assert_allclose(tensor, expected, atol=2e-6, err_msg=name)


def test_mergekits_gradient_slerp_with_filters_and_a_slice(folder: Path) -> None:
    """The form of mergekit's own example of a gradient, which most published recipes are copies of."""
    content = {
        "slices": [{"sources": [{"model": str(folder / one), "layer_range": [0, 3]} for one in ("tune-0", "base")]}],
        "merge_method": "slerp",
        "base_model": str(folder / "tune-0"),
        "parameters": {
            "t": [{"filter": "attn", "value": [0, 1, 0]}, {"filter": "mlp", "value": [1, 0, 1]}, {"value": 0}]
        },
        "dtype": "float32",
        "output_dir": str(folder / next(names)),
    }
    output = arrays(write_merge(prepare_merge(load_settings(MergeRecipe, content))))
    first, second = arrays(folder / "tune-0"), arrays(folder / "base")
    for name, tensor in output.items():
        t = (0, 1, 0)[round(2 * place(name))] if "attn" in name else 0
        t = (1, 0, 1)[round(2 * place(name))] if "mlp" in name else t
        assert np.array_equal(tensor, (first, second)[t][name]), name


def test_the_only_layer_of_a_model_takes_the_last_value_as_in_mergekit(tmp_path: Path) -> None:
    write_family(tmp_path, small(num_hidden_layers=1), tunes=1)
    output = arrays(merge(tmp_path, merge_method="slerp", models=["base", "tune-0"], t=[0, 1]))
    layer = arrays(tmp_path / "tune-0")
    assert all(np.array_equal(tensor, layer[name]) for name, tensor in output.items() if ".layers.0." in name)


def test_numbers_for_all_models_stand_behind_a_models_own(folder: Path) -> None:
    own = [{"filter": "mlp", "value": 0.9}]
    entry = {"model": "tune-0", "parameters": {"weight": own}}
    common = {"parameters": {"weight": 0.25, "normalize": False, "int8_mask": True}, "tokenizer_source": "base"}
    output = arrays(merge(folder, next(names), merge_method="linear", models=[entry, "tune-1"], **common))
    first, second = arrays(folder / "tune-0"), arrays(folder / "tune-1")
    for name, tensor in output.items():
        weight = 0.9 if "mlp" in name else 0.25
        np.testing.assert_allclose(tensor, weight * first[name] + 0.25 * second[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"t": [{"filter": "mlp", "value": 0.5}]}, "no filter matches .*: end the list"),
        ({"t": [{"filter": "mlp", "value": 2}]}, "t: expected numbers from 0 to 1"),
        ({"t": [{"filtre": "mlp", "value": 1}]}, "filtre"),
        ({"slices": [{"sources": []}, {"sources": []}], "models": None}, "slices: only one slice of whole models"),
        ({"models": [{"model": "base", "layer_range": [0, 2]}, {"model": "tune-0"}]}, "layer_range is .0, 2."),
        ({"rescale": True}, "unknown key 'rescale'"),
        ({"models": [{"model": None}, {"model": "tune-0"}]}, "set models.0.model to model directories or runs"),
    ],
    ids=str,
)
def test_what_is_not_merged_as_mergekit_would_is_refused(folder: Path, changes: dict, words: str) -> None:
    content = {"merge_method": "slerp", "models": [{"model": "base"}, {"model": "tune-0"}], "t": 0.5} | changes
    content = {key: value for key, value in content.items() if value is not None}
    for entry in content.get("models", []):
        entry["model"] = entry["model"] and str(folder / entry["model"])
    with pytest.raises(UserError, match=words):
        write_merge(prepare_merge(load_settings(MergeRecipe, content | {"output_dir": str(folder / "refused")})))
    assert not (folder / "refused").exists()


BAD = itertools.cycle([float("nan"), float("inf"), -float("inf")])
PLACES = [(method, where) for method in ("linear", "slerp") for where in ("tune-0", "tune-1")]
PLACES += [(m, where) for m in ("ties", "dare_ties", "task_arithmetic") for where in ("base", "tune-0", "tune-1")]


@pytest.mark.parametrize(("method", "where", "bad"), [(*place, next(BAD)) for place in PLACES])
def test_a_number_that_is_none_is_refused_by_its_tensors_name(
    tmp_path: Path, method: str, where: str, bad: float
) -> None:
    write_family(tmp_path, small(num_hidden_layers=1), tunes=2)
    path = tmp_path / where / WEIGHTS_FILE
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][-1, -1] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    models = [{"model": "tune-0"}, {"model": "tune-1"}]
    base = {"base_model": "base"} if method.endswith(("ties", "arithmetic")) else {}
    words = rf"{where}/model.safetensors: 'model.layers.0.mlp.down_proj.weight' has numbers that are not finite"
    with pytest.raises(UserError, match=words):
        merge(tmp_path, merge_method=method, models=models, **base)
    assert not (tmp_path / "out").exists()


def test_a_result_that_does_not_fit_its_precision_is_refused(folder: Path) -> None:
    models = [{"model": tune, "weight": 1e6} for tune in TUNES]
    with pytest.raises(UserError, match="the merged .* not finite .* do not fit torch.float16: set dtype: float32"):
        merge(folder, "overflow", merge_method="linear", models=models, normalize=False, dtype="float16")
    assert not (folder / "overflow").exists()
