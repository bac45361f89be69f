"""bench.py, every section but TRL's on the smallest work; its figures are not judged here."""

import csv
import importlib.util
import sys

import pytest
import torch

from studies import bench
from worlds import make_env


def run(out, *flags):
    bench.main([*flags, "--out", str(out), "--repeats", "1", "--device", "cpu"])
    with (out / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if "GiB" not in row["what"]:
            assert float(row["value"]) > 0 and (not row["ratio"] or float(row["ratio"]) > 0)
    return [f"{row['section']}: {row['what']}" for row in rows]


@pytest.fixture
def few_processes(monkeypatch):
    """Of the losses, only the fused one and those that fail where TRL, or Liger and a GPU, are not
    there, have a process of their own. All are measured by the same function."""
    measure_in_child = bench.measure_in_child

    def measure(way, *sizes):
        if way in ("fused", "trl", "liger"):
            return measure_in_child(way, *sizes)
        return bench.measure_loss(way, *sizes)

    monkeypatch.setattr(bench, "measure_in_child", measure)


@pytest.fixture
def short_games(monkeypatch):
    """An episode has half of its moves."""
    monkeypatch.setattr(bench, "frozen_lake", lambda: make_env("frozenlake", moves=3))


def test_the_sections_run(built_in, few_processes, short_games, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a loss's own process finds the code from anywhere
    flags = "loss update rollout growth --prompts 1 --rows 2 4 --positions 64 96"
    what = run(tmp_path, *flags.split(), "--tokens", "64", "--vocabulary", "600")
    losses = sum(each.startswith("loss: seconds") for each in what)
    assert losses >= len(bench.LOSSES | bench.YARDSTICKS) - 2  # TRL and Liger are optional
    assert sum(each.startswith("update: ActFocus, KL") for each in what) == 2
    assert "rollout: generate loop, sampled tokens a second" in what
    assert sum("positions" in each for each in what) == 4
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_another_shape_and_a_missing_trl(built_in, short_games, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SHAPES, "tiny", (32, 64, 1, 2, 1, 1000))
    monkeypatch.setitem(sys.modules, "trl", None)
    what = run(tmp_path, "update", "iteration", "--shape", "tiny", "--prompts", "1")
    assert what and not any(each.startswith("iteration") for each in what)
    assert "TRL is not installed" in capsys.readouterr().out


def test_every_loss_gives_the_same_gradient():
    rng = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 16, generator=rng), torch.randn(30, 16, generator=rng)
    targets, advantages = torch.randint(30, (40,), generator=rng), torch.randn(40, generator=rng)
    old = (hidden @ head.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    gradients = {}
    for name, loss in bench.LOSSES.items():
        if name == "trl" and not importlib.util.find_spec("trl"):
            continue
        leaf, top = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        given = bench.LossInputs(leaf, top, targets, old, advantages, torch.ones(40))
        loss(given, entropy_coef=0.0).backward()
        gradients[name] = leaf.grad, top.grad
    assert set(gradients) >= {"full", "selective", "recomputed", "fused"}
    for name, found in gradients.items():
        for gradient, wanted in zip(found, gradients["full"], strict=True):
            torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4, msg=name)


TRAINER = """
import os, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with (Path(__file__).parent / "runs").open("a") as file:
    print(given["--arms"], given["--prompts"], os.environ.get("OMP_NUM_THREADS"), file=file)
"""


def test_arms_are_timed_in_each_way(tmp_path, monkeypatch):
    """With a script that does nothing, on the machine as it is and beside a busy process."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(bench, "TRAINER", tmp_path / "trainer.py")
    what = run(tmp_path / "out", "arms", "--prompts", "3")
    ways = [f"arms: two arms {way}" for way in bench.WAYS_OF_ARMS]
    busy = [f"{way}, beside a busy process" for way in ways]
    assert what == [f"{way}, seconds; ratio: to side by side" for way in ways + busy]
    runs = ["grpo,actfocus 3 None", "grpo 3 1", "actfocus 3 1", "grpo 3 2", "actfocus 3 2"]
    assert (tmp_path / "runs").read_text().splitlines() == 2 * runs


def test_an_unknown_section_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["speed", "--out", str(tmp_path)])
    assert "there is no section speed" in capsys.readouterr().err
