"""Agreement of two judges, by hand and by scipy."""

import numpy as np
import pytest

from earl.statistics import agreement


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys(seed, monkeypatch):
    # Not at the top, where every process that collects tests would import it.
    import scipy.stats

    a, b = np.random.default_rng(seed).integers(0, 5, (2, 30)).tolist()
    assert agreement.pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic)
    assert agreement.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert agreement.kendall(a, b) == pytest.approx(scipy.stats.kendalltau(a, b).statistic)
    monkeypatch.setattr(agreement, "_PAIRS_AT_ONCE", 70)
    assert agreement.kendall(a, b) == pytest.approx(scipy.stats.kendalltau(a, b).statistic), "in parts"


def test_what_is_undefined_is_none():
    for correlation in (agreement.pearson, agreement.spearman, agreement.kendall):
        assert correlation([1, 1, 1], [1, 2, 3]) is None
        assert correlation([], []) is None


def test_kendall_by_hand():
    """Of six pairs, (1,2) is ordered otherwise and one is tied for the second: (4 - 1) / sqrt(6 x 5)."""
    assert agreement.kendall([1, 2, 3, 4], [2, 1, 3, 3]) == pytest.approx(3 / np.sqrt(30))


def test_pairs_are_of_one_group_each():
    """Group a: 1 < 2 < 3 against 5, 5, 4. Group b: a tie for the first, then one for both."""
    order = agreement.pair_order("aaabbcc", [1, 2, 3, 7, 7, 1, 1], [5, 5, 4, 1, 2, 3, 3])
    assert vars(order) == {"alike": 0, "opposite": 2, "tied_before": 1, "tied_after": 1, "tied_both": 1}
    assert order.share == 0.0
    assert agreement.pair_order("ab", [1, 2], [1, 2]).share is None, "nothing to compare across groups"


def test_measure_by_hand():
    def row(before, after, group="g"):
        given = [{"status": "failed" if x is None else x if isinstance(x, str) else "ok"} for x in (before, after)]
        values = [x if isinstance(x, int) else None for x in (before, after)]
        return {"group": group} | {
            side: status | {"s": value, "t": None}
            for side, status, value in zip(("before", "after"), given, values, strict=True)
        }

    rows = [row(2, 4), row(4, 8), row(6, 6), row(None, 3), row(5, None), row(None, None), row("no_image", "no_image")]
    found = agreement.measure(rows, ["s", "t"])
    counts = {key: found[key] for key in found if key != "measures"}
    assert counts == {"episodes": 7, "judged_by_both": 3, "failed_before": 1, "failed_after": 1, "failed_both": 1}
    assert list(found["measures"]) == ["s"], "one that nobody gave is left out"
    values = found["measures"]["s"]
    assert (values["n"], values["mean_before"], values["mean_after"], values["mean_difference"]) == (3, 4, 6, 2)
    assert values["pearson"] == values["spearman"] == pytest.approx(0.5)
    assert values["kendall"] == pytest.approx(1 / 3)
    assert values["ordered_alike"] == pytest.approx(2 / 3)
