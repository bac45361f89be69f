"""compare.py: what it measures by hand, cells that are run once, and a real comparison."""

import csv
import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import threading
import time

import pytest

from studies import compare
from studies.stats import MEASURES, measures, t_interval
from support.config import parse
from support.logs import log
from support.processes import ROOT, Interruption
from train_ppo import PPOConfig

SMALL = "--iterations 2 --prompts 2 --group-size 2 --minibatch 2 --eval-episodes 4 --eval-every 1 "
SMALL += "--max-turn-tokens 16 --max-tokens 380 --device cpu"


def write_log(path, evaluations, training=()):
    """A log with evaluations every second iteration."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for iteration in range(2 * len(evaluations) - 1):
        row = {"iteration": iteration}
        if iteration % 2 == 0:
            row["eval_success"] = float(evaluations[iteration // 2])
        if iteration < 2 * len(evaluations) - 2:
            row["train_success"] = float(training[iteration] if training else 0)
        log(path, row)
    return path


def test_measures_of_a_run_by_hand(tmp_path):
    path = write_log(tmp_path / "a.csv", [0.2, 0.6, 0.7, 0.5, 0.3], [0.1, 0.3] * 4)
    found = measures(path, threshold=0.6)
    assert found.keys() == MEASURES.keys()
    assert found["final"] == pytest.approx(30)
    assert found["peak"] == pytest.approx(60)  # of 0.6, 0.7, 0.5
    assert found["fall"] == pytest.approx(10)  # to 0.7, 0.5, 0.3
    assert found["area"] == pytest.approx(100 * (0.4 + 0.65 + 0.6 + 0.4) * 2 / 8)
    assert found["training"] == pytest.approx(20)
    assert found["reach"] == 2
    assert measures(path, threshold=0.8)["reach"] == math.inf
    short = measures(write_log(tmp_path / "b.csv", [0.4, 0.2]), 0.5)
    assert (short["peak"], short["fall"]) == (pytest.approx(40), pytest.approx(20))


def test_t_intervals():
    assert t_interval([1, 2, 3, 4, 5, 6, 7, 8]) == pytest.approx(2.365 * 6**0.5 / 8**0.5)
    assert t_interval([5]) == math.inf
    many = [i % 2 for i in range(1000)]  # normal: 1.96 standard errors
    assert t_interval(many) == pytest.approx(1.962 * 0.5 / 1000**0.5, rel=1e-3)


def test_the_table_pairs_seeds(tmp_path):
    logs = {"grpo": {}, "actfocus": {}, "placebo": {}}
    for seed, final in enumerate([0.3, 0.4, 0.5]):
        path = tmp_path / str(seed)
        logs["grpo"][seed] = write_log(path / "grpo.csv", [0.1, final])
        logs["actfocus"][seed] = write_log(path / "actfocus.csv", [0.1, final + 0.1 * seed - 0.05])
    logs["placebo"][7] = write_log(tmp_path / "7" / "placebo.csv", [0.1, 0.2])  # nothing to pair
    heads, columns, grpo, actfocus, placebo = compare.table(
        "shop", 3e-4, logs, "grpo", 0.5
    ).splitlines()
    assert heads == "shop, lr 0.0003"
    assert columns.split()[:7] == ["seeds", *MEASURES]
    # one of the three reaches the threshold
    assert grpo.split() == ["grpo", "3", "40.0", "40.0", "0.0", "25.0", "0.0", "2.0", "(1)"]
    assert actfocus.split()[:3] == ["actfocus", "3", "45.0"]
    # gains -5, +5, +15: mean 5, half width 4.303 * 10 / sqrt(3)
    assert "+5.0 ± 24.8, 2/3" in actfocus
    assert placebo.split() == ["placebo", "1", "20.0", "20.0", "0.0", "15.0", "0.0", "never"]


FAKE_TRAINER = """
import json, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
arm, out = given["--arms"], Path(given["--out"])
if arm == "placebo":
    raise SystemExit("the placebo is out")
config = dict(env=given["--env"], arms=arm, seed=int(given["--seed"]), lr=3e-4, iterations=10)
if "--resume" in given:
    (out / "resumed").write_text(given["--resume"])
(out / "config.json").write_text(json.dumps(config))
rows = ["iteration,eval_success,train_success"] + [f"{i},0.1,0.2" for i in range(3)]
(out / f"{arm}.csv").write_text("\\n".join(rows))
"""


@pytest.fixture
def fake_trainer(tmp_path, monkeypatch):
    path = tmp_path / "trainer.py"
    path.write_text(FAKE_TRAINER)
    monkeypatch.setattr(compare, "TRAINER", path)


def make_cell(out, cell, flags=(), change=None):
    """A finished cell. change: of its settings, as another version of this code would have them."""
    config = parse(PPOConfig, "", cell.flags([*flags, "--device", "cpu"]))
    config.resolve()
    settings = vars(config) | (change or {})
    folder = cell.folder(out)
    write_log(folder / f"{cell.arm}.csv", [0.1, 0.2 + 0.1 * cell.seed])
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_cell_from_before_a_flag_had_its_default(tmp_path):
    cell = compare.Cell("frozenlake", "grpo", None, 0)
    folder = make_cell(tmp_path, cell)
    config = parse(PPOConfig, "", cell.flags([]))
    before = json.loads((folder / "config.json").read_text())
    del before["bfloat16"], before["critic_lr"], before["signal"]
    (folder / "config.json").write_text(json.dumps(before | {"gone": 3}))  # and one that is gone
    assert compare.finished(cell, config, tmp_path)
    config.bfloat16 = True
    with pytest.raises(SystemExit, match="was run with bfloat16 False, not True"):
        compare.finished(cell, config, tmp_path)
    config.bfloat16, config.signal = False, "nll"
    with pytest.raises(SystemExit, match="was run with signal None, not nll"):
        compare.finished(cell, config, tmp_path)
    config.signal, config.play_batch, config.micro_tokens = None, 64, 2048  # only save memory
    assert compare.finished(cell, config, tmp_path)


def rows_of(out):
    with (out / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_finished_cells_with_these_flags_are_compared(tmp_path, capsys):
    """Those of earlier commands as well; others are left out, and said to be."""
    for seed in (0, 1):
        for arm in ("grpo", "actfocus", "placebo"):
            make_cell(tmp_path, compare.Cell("frozenlake", arm, None, seed))
        make_cell(tmp_path, compare.Cell("sokoban", "grpo", None, seed))
    make_cell(tmp_path, compare.Cell("frozenlake", "ppo", 1e-5, 0), ["--iterations", "20"])
    make_cell(tmp_path, compare.Cell("frozenlake", "grpo", 3e-4, 0))  # 3e-4 is its own rate
    gone = make_cell(tmp_path, compare.Cell("frozenlake", "energy", None, 0), change={"seed": 5})
    gone.rename(gone.with_name("not a cell"))
    make_cell(tmp_path, compare.Cell("frozenlake", "nll", None, 0), change={"beta": 2.0})
    flags = ["--arms", "placebo", "actfocus", "--out", str(tmp_path), "--device", "cpu"]
    compare.main([*flags, "--seeds", "0-1"])
    text = (tmp_path / "table.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    # the baseline is the first of --arms, whatever the order of ARMS and what else is there
    assert "final less placebo" in text and "less grpo" not in text
    lake, sokoban, note, left_out = text.strip().split("\n\n")
    assert note.startswith("±: over training seeds") and "the same evaluation episodes" in note
    assert [line.split()[:2] for line in lake.splitlines()[2:]] == [
        ["placebo", "2"], ["actfocus", "2"], ["grpo", "2"],
    ]  # fmt: skip
    assert sokoban.splitlines()[0] == "sokoban, lr 0.0003"
    assert [line.split()[:2] for line in sokoban.splitlines()[2:]] == [["grpo", "2"]]
    folder = tmp_path / "frozenlake"
    assert left_out.splitlines() == [
        f"left out: {folder}/grpo-seed0: it is the same as {folder}/grpo-lr0.0003-seed0",
        f"left out: {folder}/nll-seed0: it was run with beta 2.0, not None",
        f"left out: {folder}/ppo-lr1e-05-seed0: it was run with iterations 20, not 10",
    ]
    cells = {(row["env"], row["arm"], row["seed"]) for row in rows_of(tmp_path)}
    assert len(cells) == 8 and ("sokoban", "grpo", "1") in cells


def test_a_cell_that_these_flags_would_refuse_is_left_out(tmp_path, capsys):
    """With a group size of 1, GRPO cannot run; with its own, it was."""
    make_cell(tmp_path, compare.Cell("frozenlake", "grpo", None, 0))
    make_cell(tmp_path, compare.Cell("frozenlake", "ppo", None, 0), ["--group-size", "1"])
    flags = ["--arms", "ppo", "--seeds", "0", "--group-size", "1", "--out", str(tmp_path)]
    compare.main([*flags, "--device", "cpu"])
    said = capsys.readouterr()
    assert "left out: " in said.out and "--group-size is 1" in said.out
    assert "usage:" not in said.err  # argparse's words about a cell that nobody asked for


def test_a_cell_of_before_stays_readable(tmp_path):
    """A setting that is gone is ignored, a column that its log lacks stays empty, and one that is
    gone is left out."""
    cell = compare.Cell("frozenlake", "grpo", None, 0)
    folder = make_cell(tmp_path, cell, change={"a_setting_that_is_gone": False})
    rows = ["iteration,eval_success,train_success,gone", "0,0.1,0.2,9", "1,0.3,,9"]
    (folder / "grpo.csv").write_text("\n".join(rows))
    compare.main(["--arms", "grpo", "--seeds", "0", "--out", str(tmp_path), "--device", "cpu"])
    first, _ = rows_of(tmp_path)
    assert (first["arm"], first["eval_success"], first["cut_turns"]) == ("grpo", "0.1", "")
    assert "gone" not in first


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_comparison_ends_well_in_any_encoding(encoding, tmp_path, monkeypatch):
    """That of the terminal, and that of a trainer, which says why it failed."""
    trainer = tmp_path / "trainer.py"
    trainer.write_text("import sys\nsys.stderr.buffer.write(b'no caf\\xe9 \\xb1 1')\nsys.exit(1)\n")
    monkeypatch.setattr(compare, "TRAINER", trainer)
    for arm in ("grpo", "actfocus"):
        for seed in (0, 1):
            make_cell(tmp_path, compare.Cell("frozenlake", arm, None, seed))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    flags = ["--out", str(tmp_path), "--device", "cpu", "--seeds", "0-1"]
    with pytest.raises(SystemExit, match="2 of 6 cells failed"):
        compare.main([*flags, "--arms", "grpo", "actfocus", "placebo"])
    terminal.flush()
    said = terminal.buffer.getvalue().decode(encoding)
    assert "failed: " in said and "no caf" in said and "compare.csv" in said
    assert "±" in (tmp_path / "table.txt").read_text(encoding="utf-8")


def test_a_cell_that_fails_is_reported_and_the_rest_goes_on(tmp_path, fake_trainer, capsys):
    out = tmp_path / "out"
    flags = ["--arms", "grpo", "placebo", "actfocus", "--seeds", "3", "--jobs", "2"]
    flags += ["--out", str(out), "--device", "cpu"]
    with pytest.raises(SystemExit, match="1 of 3 cells failed"):
        compare.main(flags)
    said = capsys.readouterr()
    assert "failed: " in said.out + said.err and "the placebo is out" in said.out + said.err
    assert sorted(path.name for path in (out / "frozenlake").iterdir()) == [
        "actfocus-seed3", "grpo-seed3", "placebo-seed3.partial", "placebo-seed3.txt",
    ]  # fmt: skip
    with (out / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["grpo"] * 3 + ["actfocus"] * 3
    names = ("env", "seed", "lr", "alpha", "beta", "signal", "iteration", "eval_success")
    last = [rows[-1][name] for name in names]
    assert last == ["frozenlake", "3", "0.0003", "0.1", "0.5", "energy", "2", "0.1"]
    # a second seed is added to what is there, and other flags are refused
    before = (out / "frozenlake" / "grpo-seed3" / "config.json").stat().st_mtime_ns
    flags[1:6] = ["grpo", "actfocus", "--seeds", "3-4"]
    compare.main(flags)
    assert "4 cells, 2 of them done before" in capsys.readouterr().out
    assert (out / "frozenlake" / "grpo-seed3" / "config.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="run with iterations 10, not 12"):
        compare.main([*flags, "--iterations", "12"])
    # one that was killed is run again, and what is no run is not taken for one
    killed = out / "frozenlake" / "actfocus-seed4"
    killed.rename(killed.with_name(f"{killed.name}.partial"))
    compare.main(flags)
    assert "4 cells, 3 of them done before" in capsys.readouterr().out and killed.exists()
    # with a checkpoint it goes on: nothing of it is removed, and the trainer is told to
    partial = killed.rename(killed.with_name(f"{killed.name}.partial"))
    (partial / "checkpoints").mkdir()
    (partial / "checkpoints" / "000000-0123.pt").write_text("")
    settings = killed.with_name("grpo-seed4") / "config.json"
    (partial / "config.json").write_text(settings.read_text())
    with pytest.raises(SystemExit, match="partial was run with arms grpo, not actfocus"):
        compare.main(flags)
    (partial / "config.json").write_text(settings.read_text().replace("grpo", "actfocus"))
    compare.main(flags)
    assert (killed / "resumed").read_text() == str(partial)
    assert (killed / "checkpoints" / "000000-0123.pt").exists()
    (killed / "config.json").unlink()
    with pytest.raises(SystemExit, match="actfocus-seed4 is not a run"):
        compare.main(flags)


def test_an_interruption_ends_the_cells_and_starts_no_more(tmp_path, monkeypatch):
    trainer, out = tmp_path / "trainer.py", tmp_path / "out"
    trainer.write_text("import sys, time; print('going', flush=True); time.sleep(100)")
    monkeypatch.setattr(compare, "TRAINER", trainer)
    said = out / "frozenlake" / "grpo-seed0.txt"

    def interrupt():
        while not (said.exists() and said.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    began = time.monotonic()
    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit, match="interrupted; repeat the command to continue"):
        compare.main(["--seeds", "0-3", "--out", str(out), "--device", "cpu"])
    assert signal.getsignal(signal.SIGINT) == before
    assert time.monotonic() - began < 50
    left = {path.name for path in (out / "frozenlake").iterdir()}
    assert left == {"grpo-seed0.partial", "grpo-seed0.txt"}


HOLDER = """
import sys, time
from pathlib import Path
partial, finishes = Path(sys.argv[1]), sys.argv[2] == "finishes"
time.sleep(1.5)
assert (partial / "grpo.csv").read_text() == "of the other\\n"
if finishes:
    rows = ["iteration,eval_success,train_success", "0,0.1,0.2", "1,0.7,0.2", "10,0.7,"]
    (partial / "grpo.csv").write_text("\\n".join(rows))
"""


@pytest.mark.skipif(compare.fcntl is None, reason="this system has no locks of files")
@pytest.mark.parametrize("how", ["finishes", "dies"])
def test_a_cell_that_another_process_runs_is_waited_for(how, tmp_path, fake_trainer, capsys):
    """Of a comparison that was killed, say: its trainer has inherited the lock. What it makes is
    taken; what it leaves unfinished is run again."""
    folder = tmp_path / "out" / "frozenlake"
    partial = folder / "grpo-seed0.partial"
    make_cell(tmp_path / "out", compare.Cell("frozenlake", "grpo", None, 0)).rename(partial)
    (partial / "grpo.csv").write_text("of the other\n")
    with (folder / "grpo-seed0.txt").open("w") as file:
        compare.fcntl.flock(file, compare.fcntl.LOCK_EX)
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, partial, how], stdout=file)
    flags = ["--arms", "grpo", "--seeds", "0", "--out", str(tmp_path / "out"), "--device", "cpu"]
    compare.main(flags)
    said = capsys.readouterr()
    assert "another process is running" in said.out + said.err
    assert holder.wait() == 0  # it found its files as they were
    assert (folder / "grpo-seed0" / "output.txt").exists() and not partial.exists()
    final = [row["eval_success"] for row in rows_of(tmp_path / "out")][-1]
    assert final == ("0.7" if how == "finishes" else "0.1")
    # done by another process since this one looked: not run again
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    cell = compare.Cell("frozenlake", "grpo", None, 0)
    config = parse(PPOConfig, "", cell.flags([]))
    problem = compare.run_cell(cell, config, [], tmp_path / "out", None, Interruption())
    assert problem == ""
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


SLOW_TRAINER = """
import os, signal, sys, time
from pathlib import Path
def end(*_):
    (folder / "ended").write_text("")
    raise SystemExit("interrupted")
folder = Path(__file__).parent
signal.signal(signal.SIGTERM, end)
(folder / "pid").write_text(str(os.getpid()))
while True:
    time.sleep(0.1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_cells_end_with_a_comparison_that_is_killed(tmp_path):
    """By kill -9, which no process can handle: its trainers trained on, as orphans."""
    (tmp_path / "trainer.py").write_text(SLOW_TRAINER)
    driver = "from pathlib import Path; from studies import compare; import sys; "
    driver += "compare.TRAINER = Path(sys.argv[1]); compare.main(sys.argv[2:])"
    flags = ["--seeds", "0", "--out", str(tmp_path / "out"), "--device", "cpu"]
    command = [sys.executable, "-c", driver, str(tmp_path / "trainer.py"), *flags]
    process = subprocess.Popen(command, cwd=ROOT)
    wait_until((tmp_path / "pid").exists)
    process.kill()
    process.wait()
    wait_until((tmp_path / "ended").exists)


def wait_until(happened, seconds=300):
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_system_without_locks_compares_as_well(tmp_path, fake_trainer, monkeypatch):
    """Windows has no fcntl."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    out = tmp_path / "out"
    flags = ["--arms", "grpo", "--seeds", "0", "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    folder = make_cell(out, compare.Cell("frozenlake", "grpo", None, 0))
    runpy.run_module("studies.compare", run_name="__main__")
    assert (out / "compare.csv").exists()
    monkeypatch.setattr(compare, "fcntl", None)
    (folder / "config.json").unlink()
    folder.rename(folder.with_name("elsewhere"))
    compare.main(flags)
    assert (folder / "output.txt").exists()


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--seed 3", "say --seeds"),
        ("--arms grpo grpo", "names something twice"),
        ("--seeds 5-4", "a range such as"),
        ("--seeds x", "invalid"),
        ("--jobs 0", "--jobs must be at least 1"),
        ("--iterations 0", "--iterations is 0"),
        ("--env nowhere", "no environment 'nowhere'"),
        ("--no-such-flag 3", "unrecognized arguments"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(flags, reason, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([*flags.split(), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_real_comparison(tiny_folder, tmp_path, capsys):
    """Real runs, two at a time: a critic's arm beside GRPO."""
    out = tmp_path / "out"
    flags = [*SMALL.split(), "--model", str(tiny_folder), "--lr", "1e-3", "--out", str(out)]
    compare.main([*flags, "--jobs", "2", "--seeds", "1", "--arms", "grpo", "ppo-actfocus"])
    said = capsys.readouterr().out
    assert "frozenlake, lr 0.001" in said and "ppo-actfocus       1" in said
    assert (out / "table.txt").read_text().strip() in said
    assert (out / "compare.png").stat().st_size > 20_000
    cell = out / "frozenlake" / "ppo-actfocus-lr0.001-seed1"
    assert json.loads((cell / "config.json").read_text())["lr"] == 1e-3
    assert len((out / "compare.csv").read_text().splitlines()) == 1 + 2 * 3


def test_the_help_says_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--help"])
    assert "--threshold" in capsys.readouterr().out
