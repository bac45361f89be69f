"""collect.py: finished runs and diagnoses become rows of a few tables, once each; data.py reads
them back."""

import json

import pytest

from studies.collect import main
from studies.data import all_runs, read_settings, read_table
from studies.stats import measures
from support.logs import COLUMNS, log, write_rows


@pytest.fixture
def runs(tmp_path):
    """A comparison with a finished run of two seeds, one that was stopped, and one being made."""
    folder = tmp_path / "runs" / "rate"
    for name, seed, rows in (("grpo-seed0", 0, 3), ("grpo-seed1", 1, 3), ("grpo-seed2", 2, 2)):
        write_run(folder / "shop" / name, seed, rows)
    write_run(folder / "shop" / "grpo-seed3.partial", 3, 3)
    return folder


def write_run(folder, seed, rows, **more):
    folder.mkdir(parents=True)
    config = {"env": "shop", "arms": "grpo", "lr": 3e-4, "seed": seed, "iterations": 2}
    config |= {"out": str(folder), "no_such_flag_today": 7, **more}
    (folder / "config.json").write_text(json.dumps(config))
    for iteration in range(rows):
        row = {"iteration": iteration, "eval_success": 0.1 * iteration}
        log(folder / "grpo.csv", row if iteration == 2 else row | {"train_success": 0.5})
    write_rows(folder / "prompts.csv", [{"arm": "grpo", "iteration": 0, "prompt": 8, "success": 1}])


def collect(tmp_path, *argv):
    main([*map(str, argv), "--data", str(tmp_path / "data")])
    all_runs.cache_clear()
    return {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}


def test_finished_runs_are_added_once_and_read_back(tmp_path, runs, capsys):
    before = collect(tmp_path, runs)
    assert before.keys() == {"training.csv", "settings.json"}
    assert "grpo-seed2/grpo.csv" in capsys.readouterr().out  # left out
    assert collect(tmp_path, runs) == before
    first, second = all_runs(tmp_path / "data")
    assert (first.experiment, first.env, first.arm, first.lr) == ("rate", "shop", "grpo", 3e-4)
    assert (first.seed, second.seed) == (0, 1)
    assert first.settings == second.settings == {"iterations": 2, "no_such_flag_today": 7}
    assert first.column("eval_success") == ([0, 1, 2], [0.0, 0.1, 0.2])
    path = runs / "shop" / "grpo-seed0" / "grpo.csv"
    assert first.measures(threshold=0.1) == measures(path, threshold=0.1)
    for row in (first.rows[0], read_table(path)[0]):
        assert list(row)[-len(COLUMNS) :] == list(COLUMNS)
    assert collect(tmp_path, runs, "--unfinished").keys() == before.keys()
    assert [run.seed for run in all_runs(tmp_path / "data")] == [0, 1, 2]


def test_a_run_of_several_arms_is_collected_as_its_arms_are(tmp_path, runs, capsys):
    """Whether the settings of the whole run lie above them, or the logs lie in one folder, as
    earlier versions wrote them. An arm that is not finished is left out alone."""
    whole = tmp_path / "runs" / "whole"
    for arm, rows in (("grpo", 3), ("actfocus", 3), ("placebo", 2)):
        write_run(whole / arm, 0, rows, arms=arm)
        (whole / arm / "grpo.csv").rename(whole / arm / f"{arm}.csv")
    config = json.loads((whole / "grpo" / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"arms": "grpo,actfocus,placebo"}))
    after = collect(tmp_path, whole)
    assert "whole/placebo/placebo.csv" in capsys.readouterr().out
    found = all_runs(tmp_path / "data")
    assert [run.arm for run in found] == ["actfocus", "grpo"]
    assert [len(run.rows) for run in found] == [3, 3] and found[0].settings == found[1].settings
    assert collect(tmp_path, whole) == after
    before = tmp_path / "runs" / "before"
    write_run(before, 0, 3, arms="grpo,actfocus")
    (before / "actfocus.csv").write_bytes((before / "grpo.csv").read_bytes())
    collect(tmp_path, before)
    found = [(run.experiment, run.arm) for run in all_runs(tmp_path / "data")]
    assert found[2:] == [("before", "grpo"), ("before", "actfocus")]


def test_a_run_made_anew_takes_the_place_of_the_earlier_one(tmp_path, runs):
    collect(tmp_path, runs)
    path = runs / "shop" / "grpo-seed0" / "grpo.csv"
    path.write_text(path.read_text().replace("0.5", "0.25"))
    collect(tmp_path, runs)
    success = [run.column("train_success")[1] for run in all_runs(tmp_path / "data")]
    assert success == [[0.25, 0.25], [0.5, 0.5]]


def test_new_columns_and_other_settings(tmp_path, runs):
    """An experiment may hold runs that differ in a setting; a log may have a column of its own."""
    collect(tmp_path, runs)
    other = tmp_path / "runs" / "other"
    write_run(other, 0, 3, alpha=0.3)
    lines = (other / "grpo.csv").read_text().splitlines()
    added = [f"{lines[0]},kl_of_actions", *(f"{line},1" for line in lines[1:])]
    (other / "grpo.csv").write_text("\n".join(added))
    collect(tmp_path, other, "--experiment", "rate")
    found = all_runs(tmp_path / "data")
    assert [(run.seed, run.settings.get("alpha")) for run in found] == [
        (0, None),
        (1, None),
        (0, 0.3),
    ]
    assert found[0].column("kl_of_actions") == ([], [])
    assert found[2].column("kl_of_actions") == ([0, 1, 2], [1.0, 1.0, 1.0])
    assert len(read_settings(tmp_path / "data")) == 2


def test_prompts_are_kept_where_asked(tmp_path, runs):
    collect(tmp_path, runs, "--prompts")
    rows = read_table(tmp_path / "data" / "prompts.csv")
    assert [(row["seed"], row["phase"], row["prompt"]) for row in rows] == [
        ("0", "training", "8"),
        ("1", "training", "8"),
    ]


def test_diagnoses_and_benchmarks(tmp_path):
    folder = tmp_path / "signal"
    for env in ("shop", "sudoku"):
        (folder / env).mkdir(parents=True)
        (folder / env / "config.json").write_text(json.dumps({"env": env, "groups": 8}))
        write_rows(folder / env / "signal.csv", [{"name": "grpo", "adam_ratio": 0.5}])
    collect(tmp_path, folder)
    collect(tmp_path, folder / "shop", "--experiment", "again")
    rows = read_table(tmp_path / "data" / "signal.csv")
    assert [row["experiment"] for row in rows] == ["signal/shop", "signal/sudoku", "again"]
    assert read_settings(tmp_path / "data")[rows[1]["settings"]] == {"env": "sudoku", "groups": 8}
    write_rows(tmp_path / "bench.csv", [{"section": "loss", "value": 2.0}])
    (tmp_path / "mine").mkdir()
    (tmp_path / "bench.csv").rename(tmp_path / "mine" / "bench.csv")
    collect(tmp_path, tmp_path / "mine")
    (row,) = read_table(tmp_path / "data" / "bench.csv")
    assert row == {"experiment": "mine", "section": "loss", "value": "2"}


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no finished run"):
        collect(tmp_path, tmp_path)
