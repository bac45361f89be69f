"""checkpoint.py: a run that is killed at any moment goes on as if nothing had happened.

python -m pytest -q tests/test_checkpoint.py    # deaths at chosen moments, and two by SIGKILL
python tests/test_checkpoint.py 20              # the long version: 20 by SIGKILL, at random
"""

import contextlib
import csv
import errno
import itertools
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from math import nan
from pathlib import Path

import pytest
import torch

import train_grpo
from support import checkpoint, folder, logs, transcripts
from support.config import parse
from support.processes import Interruption
from train_grpo import Guard
from train_ppo import Critic, PPOConfig
from worlds import ENVIRONMENTS

ROOT = Path(__file__).parents[1]
ARMS = "grpo,ppo-actfocus"
SMALL = (
    f"--arms {ARMS} --iterations 3 --prompts 2 --group-size 2 --minibatch 2 --eval-episodes 2 "
    "--eval-every 2 --lr 1e-3 --max-turn-tokens 16 --max-tokens 380 --checkpoint-every 2 --save "
    "--device cpu"
).split()


def play(*flags):
    """train_ppo.py in this process."""
    config = parse(PPOConfig, "", [*map(str, flags)])
    train_grpo.run(config, config.chosen_arms(), make_critic=Critic)


def left_behind(out):
    """All that a finished run must have in common with one that was never stopped, as bytes."""
    assert (out / "curves.png").exists() and not (out / "checkpoints").exists()
    found = {name: of_arm(out / name) for name in ARMS.split(",")}
    return found | {"episodes.html": (out / "episodes.html").read_bytes()}


def of_arm(out):
    """The same of the run of one arm."""
    assert not (out / "checkpoints").exists() and not (out / "lock").exists()
    found = {}
    for path in out.glob("*.csv"):
        with path.open(newline="") as file:
            rows = [dict(row, seconds="", seconds_play="") for row in csv.DictReader(file)]
        found[path.name] = rows
    saved = [out / "policy" / "model.safetensors", *out.glob("episodes/*.json")]
    for path in [out / "samples.txt", *saved]:
        found[str(path.relative_to(out))] = path.read_bytes()
    assert len(found) == 7
    return found


def make_checkpoints(out, every=1, interruption=None):
    return checkpoint.Checkpoints(
        out, out, every, {}, logs.appended_files, interruption or Interruption()
    )


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A run that nothing stopped, and whose curves are really drawn."""
    out = tmp_path_factory.mktemp("whole") / "run"
    play(*SMALL, "--model", tiny_folder, "--out", out)
    return left_behind(out)


@pytest.fixture(autouse=True)
def curves_are_not_painted(monkeypatch):
    """To paint curves.png takes longer than all else in runs this small, and test_logs looks at
    what is painted: here the file is begun, and no more."""

    def begun(figure, path, **_):
        Path(path).write_bytes(b"\x89PNG")

    monkeypatch.setattr(logs, "draw_block", lambda figure, paths: None)
    monkeypatch.setattr(logs.Figure, "savefig", begun)


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def die(monkeypatch, owner, name, call, first=None):
    """Have a function end the run at one of its calls, after `first` has been done."""
    original, calls = getattr(owner, name), itertools.count()

    def dying(*args, **options):
        if next(calls) == call:
            if first:
                first(*args)
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(owner, name, dying)


def half_a_row(path, row):
    with path.open("a") as file:
        file.write("3,0.5,0.1")


def half_a_checkpoint(state, path):
    path.write_bytes(b"PK\x03\x04 and no more")


MOMENTS = {
    "playing": (train_grpo, "play", 7, None),
    "a first update": (train_grpo, "update", 0, None),
    "a later update": (train_grpo, "update", 4, None),
    "writing a row": (logs, "log", 2, half_a_row),
    "writing the prompts": (logs, "log_prompts", 4, None),
    "writing a checkpoint": (torch, "save", 3, half_a_checkpoint),
    "writing a checkpoint of the critic": (torch, "save", 5, half_a_checkpoint),
    "naming a checkpoint": (checkpoint, "checksum", 2, None),
    "forgetting an old one": (Path, "unlink", 0, None),
    "fitting the critic": (Critic, "fit", 2, None),
    "saving the first arm": (train_grpo.Policy, "save", 0, None),
    "saving the last arm": (train_grpo.Policy, "save", 1, None),
    "removing checkpoints": (shutil, "rmtree", 1, None),
    "drawing": (transcripts, "write_episodes_page", 0, None),
    "summarising": (logs, "summary", 0, None),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_died_goes_on_as_if_it_had_not(moment, whole, tiny_folder, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        die(patch, *MOMENTS[moment])
        with pytest.raises(Killed):
            play(*SMALL, "--model", tiny_folder, "--out", out)
    play("--resume", out)
    assert left_behind(out) == whole


def test_it_may_die_again_and_again(whole, tiny_folder, tmp_path):
    """At every second update, whatever it belongs to: each life gets as far as one more."""
    out, lives = tmp_path / "run", 0
    flags = [*SMALL, "--model", tiny_folder, "--out", out, "--checkpoint-every", "1"]
    while True:
        with pytest.MonkeyPatch.context() as patch:
            die(patch, train_grpo, "update", 1)
            lives += 1
            try:
                play(*flags)
            except Killed:
                flags = ["--resume", out]
                for name in ARMS.split(","):
                    assert len(list((out / name / "checkpoints").glob("*.pt"))) <= 2
            else:
                break
    assert lives == 6 and left_behind(out) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_iteration_and_says_how_to_go_on(
    number, whole, tiny_folder, tmp_path, monkeypatch, capfd
):
    out, original = tmp_path / "run", train_grpo.update

    def interrupted(*args):
        monkeypatch.setattr(train_grpo, "update", original)
        signal.raise_signal(number)
        return original(*args)

    monkeypatch.setattr(train_grpo, "update", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(
        SystemExit, match=f"after row 0 of grpo.csv; resume it with: python .* --resume {out}"
    ):
        play(*SMALL, "--model", tiny_folder, "--out", out)
    assert signal.getsignal(number) == before
    assert "ending after this iteration; once more ends at once" in capfd.readouterr().err
    assert len((out / "grpo" / "grpo.csv").read_text().splitlines()) == 2
    assert (out / "curves.png").exists()
    play("--resume", out)
    assert left_behind(out) == whole


def test_the_command_that_resumes_a_run_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my scripts/train_ppo.py"])
    out = tmp_path / "a run; with $signs"
    said = make_checkpoints(out).how_to_resume()
    command = said.removeprefix("resume it with: ")
    assert shlex.split(command) == ["python", "my scripts/train_ppo.py", "--resume", str(out)]


def test_a_second_interruption_does_not_wait(tmp_path):
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.asked and not interruption.at_once
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_without_checkpoints_even_the_first_interruption_does_not_wait(tmp_path):
    with Interruption(patient=False), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


# ------------------------------------------------------------------------------- what is not whole
@pytest.fixture
def stopped(tiny_folder, tmp_path, monkeypatch):
    """A run of two arms, of which the first has two checkpoints and died before its third
    iteration."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        die(patch, train_grpo, "update", 2)
        with pytest.raises(Killed):
            play(*SMALL, "--model", tiny_folder, "--out", out)
    assert len(list((out / "grpo" / "checkpoints").glob("*.pt"))) == 2
    return out


def damage(path, how, rng):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "a flipped bit"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(how, stopped, whole, capsys):
    newest = max((stopped / "grpo" / "checkpoints").glob("*.pt"))
    damage(newest, how, random.Random(0))
    play("--resume", stopped)
    assert f"note: {newest} is damaged; resuming from the one before it" in capsys.readouterr().err
    assert left_behind(stopped) == whole


def test_any_flipped_bit_is_found(stopped):
    rng, path = random.Random(1), max((stopped / "grpo" / "checkpoints").glob("*.pt"))
    good = path.read_bytes()
    for how in ["cut", "a flipped bit"] * 50:
        damage(path, how, rng)
        assert not path.stem.endswith(checkpoint.checksum(path))
        path.write_bytes(good)
    assert path.stem.endswith(checkpoint.checksum(path))


def refused(out, *flags):
    """Going on with a run is refused; returns the sentence, after a check that nothing changed."""
    before = {path: path.read_bytes() for path in out.rglob("*.csv")}
    with pytest.raises(SystemExit) as error:
        play("--resume", out, *flags)
    assert {path: path.read_bytes() for path in out.rglob("*.csv")} == before
    return str(error.value)


def test_what_is_for_memory_alone_may_change(stopped):
    play("--resume", stopped, "--micro-tokens", "300", "--gradient-checkpointing")
    for name in ARMS.split(","):
        assert len((stopped / name / f"{name}.csv").read_text().splitlines()) == 1 + 4


def test_what_cannot_go_on_is_refused_in_a_sentence(stopped, tiny, tmp_path, capsys):
    assert refused(stopped, "--lr", "0.1", "--prompts", "2") == "2"  # argparse's code
    said = f"--lr is 0.1, but {stopped} was run with 0.001"
    assert said in capsys.readouterr().err
    settings = (stopped / "config.json").read_text()
    (stopped / "config.json").write_text(settings.replace('"prompts": 2', '"prompts": 3'))
    assert "prompts was 2 and is now 3" in refused(stopped)
    (stopped / "config.json").write_text(settings[:-40])
    assert refused(stopped) == "2" and "is no run that can be resumed" in capsys.readouterr().err
    (stopped / "config.json").write_text("[]")
    assert refused(stopped) == "2" and "holds no settings" in capsys.readouterr().err
    earlier = json.loads(settings) | {"no_baseline": False}  # a flag of before
    (stopped / "config.json").write_text(json.dumps(earlier))
    assert refused(stopped) == "2"
    said = capsys.readouterr().err
    assert "other settings than this script (no_baseline)" in said
    assert "from the commit that began it" in said
    (stopped / "config.json").write_text(settings)
    path = stopped / "grpo" / "prompts.csv"
    prompts = path.read_bytes()
    path.write_bytes(prompts[:20])
    assert "prompts.csv is shorter than when it was saved" in refused(stopped)
    path.write_bytes(prompts)
    other = tmp_path / "other"  # the same model, but for one weight
    shutil.copytree(json.loads(settings)["model"], other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.MonkeyPatch.context() as patch:
        load = train_grpo.load_policy
        patch.setattr(train_grpo, "load_policy", lambda folder, *how: load(other, *how))
        assert "weights was " in refused(stopped)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:  # set_num_threads would change MKL's sums for good
        patch.setattr(torch, "get_num_threads", lambda: threads + 1)
        assert f"OMP_NUM_THREADS was {threads} and is now {threads + 1}" in refused(stopped)
    for path in (stopped / "grpo" / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    assert "holds no checkpoint: the run is done, or never began" in refused(stopped)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_never_runs_code(stopped, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = stopped / "grpo" / "checkpoints"
    for path in folder.glob("*.pt"):
        path.unlink()
    torch.save({"arm": Evil()}, folder / "evil")
    name = f"000009-{checkpoint.checksum(folder / 'evil')}.pt"
    (folder / "evil").rename(folder / name)
    assert f"{name} is no checkpoint" in refused(stopped)
    (folder / name).write_bytes(pickle.dumps(Evil(), protocol=2))
    (folder / name).rename(folder / f"000009-{checkpoint.checksum(folder / name)}.pt")
    assert "is no checkpoint" in refused(stopped)
    assert not Path("evil").exists()


def test_a_run_of_before_with_all_arms_in_one_folder_is_drawn_and_not_resumed(stopped):
    """Its arms share their checkpoints, and to resume one would cut back the other's rows."""
    for path in [*(stopped / "grpo").iterdir()]:
        if path.name != "config.json":
            path.rename(stopped / path.name)
    said = refused(stopped)
    assert "kept all arms in one folder: resume it from the commit that began it" in said
    assert logs.log_files(stopped) == [stopped / "grpo.csv"]


def test_a_finished_run_is_left_alone(whole, tiny_folder, tmp_path, capsys):
    """To resume it draws it once more."""
    out = tmp_path / "run"
    play(*SMALL, "--model", tiny_folder, "--out", out, "--arms", "grpo", "--iterations", "1")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    before = [path.read_bytes() for path in files if path.suffix != ".png"]
    capsys.readouterr()
    play("--resume", out)
    assert sorted(path for path in out.rglob("*") if path.is_file()) == files
    assert [path.read_bytes() for path in files if path.suffix != ".png"] == before
    assert capsys.readouterr().out.endswith(f"{out / 'episodes.html'}\n")


def test_without_checkpoints_there_are_none(tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    die(monkeypatch, train_grpo, "update", 2)
    with pytest.raises(Killed):
        play(*SMALL, "--model", tiny_folder, "--out", out, "--checkpoint-every", "0")
    assert not list(out.rglob("checkpoints")) and len(logs.appended_files(out / "grpo")) == 4
    assert "the run is done, or never began" in refused(out)


# ------------------------------------------------------------------------- one run in one folder
HOLDER = """
import sys
from pathlib import Path
from support.folder import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(out):
    """Another process has the folder, which it makes if need be."""
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


@pytest.mark.parametrize("end", ["it ends", "it is killed"])
def test_a_folder_belongs_to_one_run_at_a_time(end, tiny_folder, tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL, "--model", tiny_folder, "--out", out, "--arms", "grpo", "--iterations", "1"]
    with held_by_another(out) as process:
        said = f"{out} cannot be used: process {process.pid} is running in it"
        with pytest.raises(SystemExit, match=said):
            play(*flags)
        assert [path.name for path in out.iterdir()] == ["lock"]
        if end == "it is killed":
            process.kill()
    assert (out / "lock").exists() == (end == "it is killed")
    play(*flags)
    assert (out / "curves.png").exists() and not (out / "lock").exists()


def test_a_run_that_was_interrupted_is_resumed_by_one_process(stopped, whole):
    assert not (stopped / "lock").exists()
    with held_by_another(stopped) as process:
        assert f"process {process.pid} is running in it" in refused(stopped)
    play("--resume", stopped)
    assert left_behind(stopped) == whole


@pytest.mark.parametrize("then", ["nothing", "another run", "only its content is removed"])
@pytest.mark.parametrize("moment", ["update", "evaluate"])
def test_a_run_never_writes_into_a_folder_that_is_not_its_own(
    moment, then, tiny_folder, tmp_path, monkeypatch
):
    """Its folder is removed while it plays on, and another run is begun with the same --out."""
    out, original = tmp_path / "run", getattr(train_grpo, moment)
    others = contextlib.ExitStack()

    def robbed(*args):
        monkeypatch.setattr(train_grpo, moment, original)
        if then == "only its content is removed":
            for path in [path for path in out.rglob("*") if path.is_file()]:
                path.unlink()
        else:
            shutil.rmtree(out)
        if then != "nothing":
            for folder in (out, out / "grpo"):
                others.enter_context(held_by_another(folder))
            (out / "grpo" / "grpo.csv").write_text("iteration\n0\n")
        return original(*args)

    monkeypatch.setattr(train_grpo, moment, robbed)
    with others:
        said = "cannot be written: it was removed, or taken by another run"
        with pytest.raises(SystemExit, match=f"{said}.*it cannot be resumed"):
            play(*SMALL, "--model", tiny_folder, "--out", out)
        if then == "nothing":
            assert not out.exists()
        else:
            files = sorted(path.name for path in out.rglob("*") if path.is_file())
            assert files == ["grpo.csv", "lock", "lock"]
            assert (out / "grpo" / "grpo.csv").read_text() == "iteration\n0\n"


def test_without_locks_a_run_is_as_before(tiny_folder, tmp_path, monkeypatch):
    """On Windows, and on disks that know no locks."""
    flags = [*SMALL, "--model", tiny_folder, "--arms", "grpo", "--iterations", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(folder, "fcntl", None)
        play(*flags, "--out", tmp_path / "windows")

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", unsupported)
    play(*flags, "--out", tmp_path / "disk")
    for name in ("windows", "disk"):
        assert (tmp_path / name / "curves.png").exists()
        assert not (tmp_path / name / "lock").exists()


# ------------------------------------------------------------------------------ errors of a world
@pytest.mark.parametrize("error", [FileNotFoundError("a word list"), ValueError("no board")])
@pytest.mark.parametrize("where", ["reset", "step"])
def test_what_a_world_raises_keeps_its_traceback(where, error, tiny_folder, tmp_path, monkeypatch):
    """It is neither a folder that cannot be written nor a run that cannot begin."""

    def broken(*_):
        raise error

    monkeypatch.setattr(ENVIRONMENTS["frozenlake"], where, broken)
    with pytest.raises(type(error), match=str(error)):
        play(*SMALL, "--model", tiny_folder, "--out", tmp_path / "run")


@pytest.mark.parametrize("where", ["reset", "step", "demonstrate"])
def test_what_a_world_raises_while_it_is_demonstrated_is_not_the_users_fault(
    where, cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACTFOCUS_CACHE", str(cache))
    monkeypatch.setattr(ENVIRONMENTS["frozenlake"], where, lambda *_: [].index(0))
    with pytest.raises(RuntimeError, match="FrozenLake failed in demonstration 0") as error:
        play(*SMALL, "--thoughts", "1", "--out", tmp_path / "run")
    assert isinstance(error.value.__cause__, ValueError)


# ---------------------------------------------------------------------------- disks and bad numbers
def test_a_folder_that_cannot_be_written_is_found_out_first(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be used: .*Not a directory"):
        play(*SMALL, "--model", tiny_folder, "--out", tmp_path / "file" / "run")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="cannot be used: .*No space left on device"):
        play(*SMALL, "--model", tiny_folder, "--out", tmp_path / "run")
    assert not logs.holds_logs(tmp_path / "run")


@contextlib.contextmanager
def a_full_disk(limit):
    """No file of this process grows beyond so many bytes."""
    import resource  # Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("moment", ["a checkpoint", "a critic's checkpoint", "the weights"])
def test_a_disk_that_fills_up_loses_what_came_after_the_last_checkpoint(
    moment, whole, tiny_folder, tmp_path
):
    """Of an arm without a critic a checkpoint has three times the weights, of one with it six."""
    out, weights = tmp_path / "run", (tiny_folder / "model.safetensors").stat().st_size
    limit = {"a checkpoint": 2, "a critic's checkpoint": 5, "the weights": 0.9}[moment] * weights
    every = ["--checkpoint-every", "0"] if moment == "the weights" else []
    with a_full_disk(limit), pytest.raises(SystemExit) as error:
        play(*SMALL, "--model", tiny_folder, "--out", out, *every)
    said = str(error.value)
    assert said.startswith(f"{out} cannot be written")
    again = "it cannot be resumed, since --checkpoint-every is 0" if every else f"--resume {out}"
    assert said.endswith(again)
    if moment != "the weights":
        play("--resume", out)
        assert left_behind(out) == whole


@pytest.mark.parametrize("where", ["update", "load_policy"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_out_of_memory_says_which_flags_to_turn(where, device, tiny_folder, tmp_path, monkeypatch):
    def hungry(*args):
        if device == "cpu":
            torch.empty(2**60)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(train_grpo, where, hungry)
    with pytest.raises(
        SystemExit,
        match="out of memory on cpu: lower --micro-tokens or add --gradient-.*; lower --play-batch",
    ):
        play(*SMALL, "--model", tiny_folder, "--out", tmp_path / "run")


def test_three_bad_updates_in_a_row_end_the_run(tiny_folder, tmp_path, monkeypatch):
    """Arm, iteration and cause are named, and the last checkpoint is of sound weights."""
    out, step, calls = tmp_path / "run", torch.optim.Adam.step, itertools.count()

    def ruinous(optimizer, *args):
        step(optimizer)
        if next(calls) == 2:  # the first of two updates of the second iteration
            for group in optimizer.param_groups:
                group["params"][0].data.fill_(nan)

    monkeypatch.setattr(torch.optim.Adam, "step", ruinous)
    said = "grpo, iteration 2: left out an update, since the weights are not finite, for the third"
    with pytest.raises(SystemExit, match=said):
        play(*SMALL, "--model", tiny_folder, "--out", out, "--checkpoint-every", "1")
    assert (out / "curves.png").exists()
    rows = list(csv.DictReader((out / "grpo" / "grpo.csv").open()))
    assert [row["skipped_updates"] for row in rows] == ["0", "1"]
    state = torch.load(max((out / "grpo" / "checkpoints").glob("*.pt")), weights_only=True)
    assert state["iteration"] == 1
    weights = state["stateful"]["policy"].values()
    assert all(value.isfinite().all() and value.abs().max() < 100 for value in weights)


def test_the_guard_counts_what_comes_in_a_row(tiny):
    guard = Guard("grpo")
    guard.iteration = 4
    assert [guard.allows(norm, 0.1, tiny.model) for norm in (nan, nan, 1.0, nan, float("inf"))] == [
        False, False, True, False, False,
    ]  # fmt: skip
    said = r"grpo, iteration 4: .*gradient \(last loss: nan\) is not finite, "
    said += "for the third time in a row"
    with pytest.raises(SystemExit, match=said):
        guard.allows(nan, nan, tiny.model)


# ------------------------------------------------------------------------------------ real deaths
def killed_at_random(model, out, deaths, rng):
    """Runs of the script with one arm, each killed by SIGKILL at a random moment of its work; then
    one that is left to end. Returns how many were killed."""
    command, killed = [sys.executable, str(ROOT / "train_ppo.py")], 0
    flags = [*SMALL, "--model", str(model), "--out", str(out), "--arms", "ppo-actfocus"]
    while True:
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen([*command, *flags], stdout=said, stderr=said, cwd=ROOT)
            while process.poll() is None and not any((out / "checkpoints").glob("*.pt")):
                time.sleep(0.005)
            if killed < deaths:
                time.sleep(rng.uniform(0, 0.6 if "--resume" not in flags else 4.5))
                process.kill()
            code = process.wait()
            said.seek(0)
            words = said.read()
        if code == 0:
            return killed
        assert code == -signal.SIGKILL, words
        killed, flags = killed + 1, ["--resume", str(out)]


def test_sigkill(whole, tiny_folder, tmp_path):
    """(Of arms side by side, see test_processes.)"""
    assert killed_at_random(tiny_folder, tmp_path / "run", deaths=2, rng=random.Random(5)) > 0
    assert of_arm(tmp_path / "run") == whole["ppo-actfocus"]


def main(deaths: int) -> None:
    from conftest import TINY

    from support.warm_start import start_folder

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ACTFOCUS_CACHE"] = scratch
        model, rng, done = start_folder("frozenlake", **TINY), random.Random(0), 0
        play(*SMALL, "--model", model, "--out", f"{scratch}/whole", "--arms", "ppo-actfocus")
        wanted = of_arm(Path(scratch) / "whole")
        while done < deaths:
            out = Path(scratch) / f"run{done}"
            done += killed_at_random(model, out, min(5, deaths - done), rng)
            assert of_arm(out) == wanted
            print(f"{done} deaths by SIGKILL, and all logs and weights are what they should be")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
