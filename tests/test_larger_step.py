"""studies/larger_step.py: what the comparisons at several rates and from several starts come to, on
runs of a few rows whose numbers are easy to check by hand."""

import numpy as np
import pytest

from studies import larger_step, stats
from studies.data import Run
from studies.larger_step import area_by_clock, collapse_rows, lead_rows, speed_rows, start_rows

COSTS = {
    "kl_action": "0.002",
    "kl_reasoning": "0.001",
    "distance": "0.5",
    "reasoning_accuracy": "0.9",
}


def run(experiment, arm, success, seed=0, lr=3e-4, env="sudoku", seconds=10, final=None, **columns):
    """A run whose evaluations, one before each iteration and one at the end, are given in percent,
    and whose training success is one half of each."""
    rows = []
    for i, each in enumerate(success):
        row = {"iteration": str(i), "eval_success": str(each / 100)}
        if i < len(success) - 1:
            row |= {"train_success": str(each / 200), "seconds": str(seconds)} | COSTS
            row |= {name: str(values[i]) for name, values in columns.items()}
        elif final is not None:
            row["final_success"] = str(final / 100)
        rows.append(row)
    return Run(experiment, env, arm, lr, seed, {"iterations": len(success) - 1}, rows)


@pytest.fixture
def data(monkeypatch):
    """Puts runs in the place of those of results/data."""
    return lambda *runs: monkeypatch.setattr(larger_step, "all_runs", lambda: list(runs))


def test_a_rate_is_compared_seed_by_seed(data):
    data(
        run("speed-sudoku", "actfocus", [0, 80, 100], seed=1, final=90),
        run("speed-sudoku", "actfocus", [0, 60, 40], seed=2, final=50),
        run("speed-sudoku", "grpo", [0, 40, 60], seed=2, final=60, seconds=5),
        run("speed-sudoku", "grpo", [0, 20, 30], seed=1, final=30, seconds=5),
        run("speed-sudoku", "grpo", [0, 20, 30], seed=3, final=30),  # has no partner
        run("rate-sudoku", "grpo", [0, 90, 90], seed=1),  # another experiment
    )
    (row,) = lead_rows()
    assert (row.env, row.arm, row.lr) == ("sudoku", "grpo", 3e-4)
    # areas: (40 + 90) / 2 = 65 less (10 + 25) / 2 = 17.5; (30 + 50) / 2 less (20 + 50) / 2
    assert row.differences["area"] == pytest.approx([47.5, 5.0])
    assert row.differences["training"] == pytest.approx([15.0, 5.0])  # (0 + 40)/2 less (0 + 10)/2
    assert row.differences["final"] == pytest.approx([60.0, -10.0])
    assert row.differences["reach"] == [1 - 2, 1 - 2]  # seed 1 of GRPO never comes to one half
    assert row.fallen == (1, 0)  # seed 2, from 60 to 40
    ours = speed_rows()[1]
    assert ours.values("dip") == pytest.approx([0, 20]) and ours.values("facts") == [90, 90]
    assert row.seconds == pytest.approx(2.0)
    # until 10 seconds: ActFocus has had one iteration and GRPO both
    assert row.differences["clock"] == pytest.approx([40 - 17.5, 30 - 35])


def test_rows_are_in_order_and_shares_have_intervals(data):
    data(
        run("speed-frozenlake", "grpo", [0, 100, 100], env="frozenlake"),
        run("speed-sudoku", "actfocus", [0, 100, 80]),
        run("speed-sudoku", "grpo", [0, 100, 100], lr=1e-3),
        run("speed-sudoku", "grpo", [0, 100, 95]),
    )
    rows = speed_rows()
    assert [(row.env, row.arm, row.lr) for row in rows] == [
        ("sudoku", "grpo", 3e-4),
        ("sudoku", "grpo", 1e-3),
        ("sudoku", "actfocus", 3e-4),
        ("frozenlake", "grpo", 3e-4),
    ]
    assert [row.fallen for row in rows] == [0, 0, 1, 0]
    assert rows[0].values("kl_action") == [0.002] and rows[0].values("distance") == [0.5]
    assert [row.lr for row in lead_rows()] == [3e-4, 1e-3]  # FrozenLake has no ActFocus yet


@pytest.mark.parametrize("some, of", [(0, 4), (3, 8), (8, 8)])
def test_the_interval_of_a_share_is_where_its_score_is_1_96(some, of):
    """Wilson's ends are the shares p at which |k/n - p| is 1.96 standard errors of p."""
    for end in stats.share_interval(some, of):
        assert abs(some / of - end) == pytest.approx(1.96 * np.sqrt(end * (1 - end) / of), abs=1e-6)


def test_time_is_that_of_the_iterations_before_an_evaluation():
    slow = run("speed-sudoku", "grpo", [0, 100, 100], seconds=20)
    # from 0 to 20 seconds success rises from 0 to 100: half of that on average, until 10 a quarter
    assert area_by_clock(slow, 20.0) == pytest.approx(50.0)
    assert area_by_clock(slow, 10.0) == pytest.approx(25.0)
    assert area_by_clock(slow, 40.0) == pytest.approx(75.0)


def test_gains_are_those_of_a_start(data):
    data(
        run("starts/sudoku-1", "grpo", [0, 20, 40], seed=310, final=30),
        run("starts/sudoku-1", "actfocus", [0, 60, 60], seed=310, final=70),
        run("starts/sudoku-1", "actfocus", [0, 60, 60], seed=311),  # GRPO has not run yet
        run("starts/sudoku-2", "grpo", [0, 20, 40], seed=310),
        run("seeds-sudoku", "grpo", [0, 20, 40], seed=0),  # the committed start
        run("seeds-sudoku", "actfocus", [0, 40, 40], seed=0),
        run("seeds-sudoku", "discount", [0, 80, 40], seed=0),
        run("compare", "grpo", [0, 20, 40], env="frozenlake"),  # alone in its world
        run("compare", "actfocus", [0, 20, 40], env="frozenlake"),
    )
    committed, start = start_rows()
    assert (committed.env, committed.name) == ("sudoku", "sudoku-0")
    assert committed.gains == {"training": [pytest.approx(5.0)], "area": [pytest.approx(10.0)]}
    assert (start.env, start.name) == ("sudoku", "sudoku-1")
    assert start.gains["training"] == pytest.approx([10.0])
    assert start.gains["final"] == pytest.approx([40.0])


def test_what_leaves_first_is_found(data):
    usual = [0.9] * 12
    facts = [*usual[:8], 0.7, 0.7, 0.7, 0.7]
    data(
        run(
            "collapse/usual", "grpo", [0, *[100] * 7, 95, 89, 80, 70, 60],
            reasoning_accuracy=facts, response_tokens=[100] * 9 + [150] * 3, cut_turns=[0] * 12,
            entropy_reasoning=usual, entropy_action=[0.1] * 11 + [5],
        )
    )  # fmt: skip
    (row,) = collapse_rows()
    assert (row.setting, row.best, row.fell_at) == ("usual", 7, 9)
    assert row.left == {
        "true facts": 8,
        "tokens a rollout": 9,
        "cut turns": None,
        "entropy of reasoning": None,
        "entropy of actions": None,  # for one iteration only
    }
