"""Metrics of sets as records: numbers, networks, settings; what is missing, and what is not compared."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from emu_lightning.evaluation.metrics import (
    CMMD,
    CheckpointPoint,
    Features,
    FrechetDistance,
    KernelDistance,
    Manifold,
    Measured,
    ModuleEmbedder,
    Network,
    TransformersVision,
    Vendi,
    check_comparable,
    checkpoints_on_front,
    difference,
    measure_sets,
    pareto_front,
)
from emu_lightning.evaluation.metrics.distances import (
    frechet_distance,
    maximum_mean_discrepancy,
    normalised,
    precision_recall_density_coverage,
)
from emu_lightning.models.perceptual import PooledFeatures, RandomFeatures
from tests.evaluation.metrics.tiny_networks import make_images

NETWORK = Network("a network", "ab" * 32, "as it is")
METRICS = [FrechetDistance(), KernelDistance(8, num_subsets=5), CMMD(), Vendi(), Vendi(math.inf), Manifold(3)]


def features(num: int = 20, seed: int = 0, network: Network = NETWORK) -> Features:
    return Features(np.random.default_rng(seed).standard_normal((num, 6)).astype(np.float32), network)


def test_values_are_those_of_the_mathematics_with_all_that_they_depend_on():
    x, y = features(20), features(25, 1)
    by_name = {one.name: one for metric in METRICS for one in metric.measure(x, y)}
    assert by_name["Fréchet distance"].value == frechet_distance(x.values, y.values)
    cmmd = 1000 * maximum_mean_discrepancy(normalised(x.values), normalised(y.values), 10)
    assert by_name["CMMD"].value == pytest.approx(cmmd)
    names = ("precision", "recall", "density", "coverage")
    values = precision_recall_density_coverage(x.values, y.values, 3)
    assert tuple(by_name[name].value for name in names) == values
    assert by_name["kernel distance"].settings == {"subset_size": 8, "num_subsets": 5, "seed": 0}
    for one in by_name.values():
        assert (one.num, one.num_reference, one.networks) == (20, 25, (NETWORK,))
        json.dumps(one.to_dict(), allow_nan=False)
    assert {name for name, one in by_name.items() if one.better == "lower"} == {
        "Fréchet distance", "kernel distance", "CMMD",
    }  # fmt: skip


def test_features_of_two_networks_are_not_compared():
    other = dataclasses.replace(NETWORK, preprocess_id="resized otherwise")
    with pytest.raises(ValueError, match="embed both sets by one network"):
        FrechetDistance().measure(features(), features(network=other))
    with pytest.raises(ValueError, match="compares with a reference set"):
        CMMD().measure(features())
    assert Vendi().measure(features())[0].num_reference is None
    with pytest.raises(ValueError, match="finite numbers"):
        Features(np.array([[1.0, np.nan]]), NETWORK)


def test_numbers_of_different_sizes_are_compared_only_where_they_do_not_depend_on_it():
    reference = features(40, 9)
    few, many = features(20), features(30)
    (a,), (b,) = (FrechetDistance().measure(x, reference) for x in (few, many))
    with pytest.raises(ValueError, match="moves with the number of pictures: 30 .* and 20"):
        difference(a, b)
    (other_reference,) = FrechetDistance().measure(few, features(39, 9))
    with pytest.raises(ValueError, match="moves with the number of pictures"):
        check_comparable(a, other_reference)
    (a,), (b,) = (KernelDistance(10).measure(x, reference) for x in (few, many))
    assert difference(a, b) == b.value - a.value  # lower is better


def test_what_else_is_not_compared():
    one = Measured("CMMD", 1.0, num=5, networks=(NETWORK,), settings={"sigma": 10.0}, better="lower")
    assert difference(one, dataclasses.replace(one, value=3.0)) == 2
    for change in (
        {"name": "KID"},
        {"networks": ()},
        {"settings": {"sigma": 1.0}},
        {"value": None, "reason": "no weights"},
    ):
        with pytest.raises(ValueError, match=next(iter(change)) if "value" not in change else "no weights"):
            difference(one, dataclasses.replace(one, **change))


def test_a_record_has_a_value_or_a_reason():
    for wrong in ({"value": None}, {"value": 1.0, "reason": "why"}, {"value": math.nan}):
        with pytest.raises(ValueError):
            Measured("x", **wrong)
    assert "value" not in Measured("x", None, "no weights").to_dict()
    assert Measured("x", 0.0).to_dict()["value"] == 0.0


def test_each_metric_answers_with_a_value_or_a_reason():
    embedder = ModuleEmbedder(PooledFeatures(RandomFeatures(channels=(4, 8))), "random")
    images, reference = make_images(12), make_images(12, seed=1)
    measured = measure_sets([*METRICS, KernelDistance(1000)], embedder, images, reference)
    names = [name for metric in METRICS for name in metric.names] + ["kernel distance"]
    assert [one.name for one in measured] == names
    assert all(one.value is not None for one in measured[:-1])
    assert "subset_size=1000: choose 2 to 12" in measured[-1].reason and measured[-1].num == 12
    alone = measure_sets(METRICS, embedder, images)
    assert {one.name for one in alone if one.value is not None} == {*Vendi().names, *Vendi(math.inf).names}
    assert all("reference" in one.reason for one in alone if one.value is None)
    nothing = measure_sets(METRICS, TransformersVision("nobody/nothing"), images, reference)
    assert [one.name for one in nothing] == names[:-1]
    assert all(one.value is None and "hf download nobody/nothing" in one.reason for one in nothing)


# --- the front ----------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats():
    points = [(1, 5), (2, 4), (2, 3), (3, 1), (1, 5), (0, 0)]
    assert pareto_front(points).tolist() == [True, True, False, True, True, False]
    values = np.random.default_rng(0).integers(0, 4, (60, 3))
    naive = [not any(all(b >= a) and any(b > a) for b in values) for a in values]  # by the definition
    assert pareto_front(values).tolist() == naive and 0 < sum(naive) < 60
    with pytest.raises(ValueError, match="finite"):
        pareto_front([[1, math.nan]])


def test_checkpoints_on_the_front():
    def point(consistency: float, diversity: float, distance: float) -> CheckpointPoint:
        realism = Measured("Fréchet distance", distance, num=9, better="lower", depends_on_num=True)
        return CheckpointPoint(Measured("CLIPScore", consistency), Measured("Vendi", diversity), realism)

    points = {"base": point(0.6, 9, 30), "tuned": point(0.7, 5, 10), "worse": point(0.6, 8, 31)}
    assert checkpoints_on_front(points) == {"base": True, "tuned": True, "worse": False}
    missing = dataclasses.replace(points["base"], diversity=Measured("Vendi", None, "no weights"))
    with pytest.raises(ValueError, match="no weights"):
        checkpoints_on_front({**points, "other": missing})
