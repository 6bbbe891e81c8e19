"""The compute multiplier of runs whose true multiplier is known."""

import numpy as np
import pytest

from hotlap.train.studies.multiplier import NoLaw, Pairs, multiplier

pytest.importorskip("scipy")


def simulated(
    generator: np.random.Generator, depths: int, seeds: int, true: float, *, noise: float = 0.003,
    misfit: float = 0.002, floor: float = 0.0, tenfold: float = 1.0, clock: float = 0.0,
) -> Pairs:  # fmt: skip
    """Runs over a factor of 20 in compute. Standard deviations of logs: noise, of the difference in a pair;
    misfit, of what moves all runs of a depth; clock, of the ratio of times at a depth. tenfold: factor on the
    multiplier with ten times the compute.
    """
    place = np.repeat(np.arange(depths), seeds)
    x = np.linspace(0, np.log(20), depths)
    needed = np.log(true) + np.log(tenfold) * (x - x.mean()) / np.log(10)

    def law(at: np.ndarray) -> np.ndarray:
        return np.log(floor + (2 - floor) * np.exp(-0.15 / (1 - floor / 2) * at))

    common = misfit * generator.standard_normal(depths)[place] + noise * generator.standard_normal(len(place))
    y = np.stack([law(x[place]), law((x - needed)[place])], 1) + common[:, None]
    y += noise / 2**0.5 * generator.standard_normal(y.shape)
    off = clock / 2**0.5 * generator.standard_normal((depths, 2))
    return Pairs(place + 1, np.exp(y), np.exp(x[:, None] + off)[place])


@pytest.mark.parametrize(("depths", "seeds"), [(3, 1), (3, 3), (4, 2), (5, 3)])
@pytest.mark.parametrize("true", [1.0, 0.8])
@pytest.mark.parametrize("truth", [{}, {"floor": 0.6}, {"clock": 0.03}])
def test_the_interval_holds_the_truth_as_often_as_it_says(depths, seeds, true, truth):
    generator, hits, halves = np.random.default_rng(depths), [], []
    for _ in range(200):
        found = multiplier(simulated(generator, depths, seeds, true, **truth), "clock" in truth).overall
        hits.append(found.low <= true <= found.high)
        halves.append(np.log(found.high / found.low) / 2)
    assert np.mean(hits) > 0.91  # of 200 with 0.95, all but one in 200 tries
    if true == 1:
        assert np.mean(hits) < 1, "far too wide"
    if (depths, seeds) == (4, 2) and truth != {"clock": 0.03}:
        assert np.median(halves) < 0.05, "2 % off in the loss would not be found"


@pytest.mark.parametrize("floor", [0.0, 0.6])
@pytest.mark.parametrize("tenfold", [1.0, 1.1])
def test_a_trend_over_sizes_is_told_from_the_bend_of_the_law(floor, tenfold):
    generator, hits = np.random.default_rng(0), []
    for _ in range(200):
        found = multiplier(simulated(generator, 4, 2, 0.8, floor=floor, tenfold=tenfold)).trend
        hits.append(found.low <= tenfold <= found.high)
    assert np.mean(hits) > 0.91


def test_without_noise_the_multiplier_is_exact_also_where_b_costs_more():
    pairs = simulated(np.random.default_rng(0), 4, 2, 0.5, noise=0, misfit=0, tenfold=1.2)
    found = multiplier(pairs)
    assert found.overall.value == pytest.approx(0.5) and found.exponent == pytest.approx(0.15)
    assert found.trend.value == pytest.approx(1.2) and found.found
    low, high = found.by_depth[1].value, found.by_depth[4].value
    assert low < 0.5 < high and high / low == pytest.approx(20 ** np.log10(1.2))
    dearer = Pairs(pairs.depths, pairs.bpb, pairs.compute * np.array([1.0, 3.0]))
    assert multiplier(dearer).overall.value == pytest.approx(1.5)


def test_the_same_losses_are_no_difference():
    pairs = simulated(np.random.default_rng(0), 3, 1, 1, noise=0)
    same = Pairs(pairs.depths, pairs.bpb[:, :1].repeat(2, 1), pairs.compute)
    found = multiplier(same)
    assert found.overall.value == 1 and not found.found and found.trend is None


def test_runs_without_a_law_have_no_multiplier():
    pairs = simulated(np.random.default_rng(0), 4, 1, 0.8)
    few = Pairs(pairs.depths[:2], pairs.bpb[:2], pairs.compute[:2])
    with pytest.raises(NoLaw, match="2 depths have runs of both, and a law needs 3"):
        multiplier(few)
    with pytest.raises(NoLaw, match="do not fall surely"):
        multiplier(Pairs(pairs.depths, pairs.bpb[[2, 0, 3, 1]], pairs.compute))
