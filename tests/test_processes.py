"""support/processes.py and side_by_side.py: children that end with their parent, how many of them
there may be, and arms of a run side by side."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_checkpoint import ARMS, SMALL, held_by_another, left_behind, of_arm, play, whole  # noqa: F401

from support import logs, processes
from support import side_by_side as arms_side_by_side
from support.config import parse
from support.processes import Interruption, run_script, side_by_side, usable_cores
from support.side_by_side import arms_at_once, choose_threads, train_side_by_side
from train_ppo import PPOConfig

ROOT = Path(__file__).parents[1]
NAMES = ARMS.split(",")


def wait_until(happened, seconds=300):
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------- cores
@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, 8),  # no control groups, as on a Mac
        ({"self": "0::/", "cpu.max": "max 100000"}, 8),
        ({"self": "0::/", "cpu.max": "300000 100000"}, 3),
        ({"self": "0::/", "cpu.max": "150000 100000"}, 1),
        ({"self": "0::/", "cpu.max": "20000 100000"}, 1),  # a fifth of a core
        ({"self": "0::/", "cpu.max": "6400000 100000"}, 8),  # more than there are
        ({"self": "0::/", "cpu.max": ""}, 8),  # not to be read
        # the limit of a group counts for all groups in it
        ({"self": "0::/a/b", "a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ({"self": "0::/a/b", "a/cpu.max": "700000 100000", "a/b/cpu.max": "200000 50000"}, 4),
        # a container that is told a path outside of it
        ({"self": "0::/../../c", "cpu.max": "200000 100000"}, 2),
        # version 1
        ({"self": "4:cpu,cpuacct:/", "cpu/cpu.cfs_quota_us": "-1"}, 8),
        ({"self": "9:memory:/\n4:cpu,cpuacct:/", "cpu/cpu.cfs_quota_us": "250000"}, 2),
        ({"self": "4:cpu:/docker/1f\n0::/", "cpu/docker/1f/cpu.cfs_quota_us": "400000"}, 4),
        ({"self": "4:cpu:/docker/1f", "cpu/cpu.cfs_quota_us": "400000"}, 4),
        ({"self": "9:memory:/x", "cpu/cpu.cfs_quota_us": "100000"}, 8),
    ],
)
@pytest.mark.parametrize("affinity", [True, False])
def test_as_many_cores_as_the_process_may_use(files, cores, affinity, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 99 if affinity else 8)
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    groups = tmp_path / "sys" / "fs" / "cgroup"
    groups.mkdir(parents=True)
    for name, content in files.items():
        path = groups / name
        if name == "self":
            path = tmp_path / "proc" / "self" / "cgroup"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
        if name.endswith("quota_us"):
            path.with_name("cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path) == cores


def test_this_machine_has_a_core():
    assert 1 <= usable_cores() <= os.cpu_count()


# ---------------------------------------------------------------------------------------- children
@pytest.fixture
def script(tmp_path):
    """A function that writes a script and returns its path."""

    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return str(path)

    return write


def test_a_script_runs_as_by_itself(script, tmp_path):
    text = "import os, sys; from pathlib import Path; import support\n"
    text += "print(sys.argv[1:], __name__, os.environ['OMP_NUM_THREADS'], 'caf\\xe9')\n"
    text += "print('no', file=sys.stderr)\nsys.exit(3)"
    with (tmp_path / "said").open("w") as output:
        assert run_script([script(text), "--a", "b c"], output, Interruption(), threads=5) == 3
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert said == "['--a', 'b c'] __main__ 5 café\nno\n"
    assert processes.last_line(tmp_path / "said") == "no"


STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print("going", flush=True)
while True:
    time.sleep(0.05)
"""


def test_an_interruption_is_passed_on_once_and_a_second_one_ends_it(script, tmp_path):
    said, interruption, codes = tmp_path / "said", Interruption(), []
    with said.open("w") as output:
        work = threading.Thread(
            target=lambda: codes.append(run_script([script(STUBBORN)], output, interruption))
        )
        work.start()
        wait_until(lambda: said.read_text() == "going\n")
        interruption.in_processes = True
        with interruption:
            signal.raise_signal(signal.SIGINT)
            wait_until(lambda: said.read_text() == "going\nasked\n")
            time.sleep(0.3)
            assert work.is_alive() and said.read_text() == "going\nasked\n"
            signal.raise_signal(signal.SIGINT)
            work.join()
    assert codes == [-signal.SIGKILL]


def test_jobs_go_side_by_side_and_no_more_than_allowed():
    running, most, lock = 0, 0, threading.Lock()

    def work(job):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return 10 * job

    found = [each for step in side_by_side(work, range(6), 2, Interruption()) for each in step]
    assert sorted(found) == [(job, 10 * job) for job in range(6)] and most == 2


@pytest.mark.parametrize("cause", ["interruption", "error in work", "error outside"])
def test_what_has_not_begun_is_left_out(cause):
    """And whatever goes wrong, the jobs that run are asked to end."""
    interruption, begun = Interruption(), []

    def work(job):
        begun.append(job)
        if cause == "error in work":
            raise RuntimeError(cause)
        wait_until(lambda: interruption.asked)

    def go():
        for _ in side_by_side(work, range(5), 1, interruption):
            if cause == "interruption":
                interruption.asked = True
            else:
                raise RuntimeError(cause)

    if cause == "interruption":
        go()
    else:
        with pytest.raises(RuntimeError, match=cause):
            go()
    assert interruption.asked and begun == [0]


# ------------------------------------------------------------- arms side by side, without any model
FAKE = """
import sys
from pathlib import Path
given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
arm, out = given["arms"], Path(given["out"])
print("note: of the model\\nresults go to", out)
print("note: of both\\nnote: of", arm)
rows = ["iteration,eval_success,train_success", "0,0.5,0.25", "1,0.5,0.25"]
(out / f"{arm}.csv").write_text("\\n".join(rows))
if arm == "actfocus":
    raise SystemExit("it has no more ink")
if arm == "placebo":
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
print(sys.argv[1:])
"""


def test_the_parent_shows_what_arms_write_and_tells_what_failed(script, tmp_path, capsys):
    out = tmp_path / "run"
    flags = f"--arms grpo,actfocus,placebo --iterations 2 --out {out} --device cpu".split()
    config = parse(PPOConfig, "", flags)
    config.resolve()
    configs = {}
    for name in config.arms.split(","):
        configs[name] = replace(config, arms=name, out=str(out / name))
        (out / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as error, Interruption() as interruption:
        train_side_by_side(script(FAKE), configs, out, 2, interruption)
    said = str(error.value).splitlines()
    assert len(said) == 3
    assert f"actfocus failed: it has no more ink ({out}/actfocus/output.txt)" in said
    assert any(
        line.startswith("placebo failed: its process was ended by signal 9") for line in said
    )
    assert said[-1].startswith("the other arms have been trained; resume it with: python ")
    told = capsys.readouterr()
    assert told.out.count("note: of both") == 1 and "note: of the model" not in told.out
    assert "note: of grpo" in told.out and "note: of placebo" in told.out
    assert "training success 0.25" in told.err and "2/2" in told.err
    assert (out / "curves.png").exists()
    # the arm was given all settings, as flags that say the same
    given = json.loads((out / "grpo" / "output.txt").read_text().splitlines()[-1].replace("'", '"'))
    again = parse(PPOConfig, "", [*given, f"--out={tmp_path / 'elsewhere'}"])
    assert replace(again, out=configs["grpo"].out) == configs["grpo"]


# ---------------------------------------------------------------- real runs, and how they may end
SCRIPT = """
import time
from pathlib import Path
import train_grpo
from support import side_by_side
from support.config import parse
from train_ppo import Critic, PPOConfig
side_by_side.usable_cores = lambda: 2
update, folder = train_grpo.update, Path(__file__).parent

def update_when_allowed(*args):
    (folder / f"reached {args[-1].name}").touch()
    while (folder / "wait").exists():
        time.sleep(0.02)
    return update(*args)

train_grpo.update = update_when_allowed
config = parse(PPOConfig, "")
train_grpo.run(config, config.chosen_arms(), make_critic=Critic, script=__file__)
"""


@pytest.fixture
def begun(script, tiny_folder, tmp_path):
    """A run of two arms side by side, each of which waits in its first iteration: its process."""
    (tmp_path / "wait").touch()
    command = [sys.executable, script(SCRIPT), *SMALL, "--model", str(tiny_folder)]
    command += ["--out", str(tmp_path / "run")]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: all((tmp_path / f"reached {name}").exists() for name in NAMES))
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_arms_end_their_iteration_with_their_parent(number, begun, whole, tmp_path):  # noqa: F811
    """However it is ended, and then the run is resumed as if nothing had happened."""
    out = tmp_path / "run"
    begun.send_signal(number)
    said = "ending after this iteration"
    wait_until(lambda: all(said in (out / name / "output.txt").read_text() for name in NAMES))
    (tmp_path / "wait").unlink()
    _, complaint = begun.communicate()
    wait_until(lambda: not any((out / name / "lock").exists() for name in NAMES))
    if number == signal.SIGKILL:
        assert begun.returncode == -number
    else:
        assert begun.returncode == 1 and complaint.count(said) == 1
        assert complaint.endswith(f"script.py --resume {out}\n") and "interrupted; " in complaint
        assert (out / "curves.png").exists()
    for name in NAMES:
        assert len((out / name / f"{name}.csv").read_text().splitlines()) == 2
    play("--resume", out)
    assert left_behind(out) == whole


def test_an_arm_that_is_killed_does_not_end_the_other(begun, whole, script, tmp_path):  # noqa: F811
    """Side by side the arms leave what they leave one after the other, and a failed one is resumed:
    together with the others, or alone."""
    out = tmp_path / "run"
    os.kill(int((out / "grpo" / "lock").read_text()), signal.SIGKILL)
    (tmp_path / "wait").unlink()
    _, complaint = begun.communicate()
    assert begun.returncode == 1
    assert f"grpo failed: its process was ended by signal 9 ({out}/grpo/output.txt)" in complaint
    assert logs.is_finished(out / "ppo-actfocus", "ppo-actfocus", 3)
    assert of_arm(out / "ppo-actfocus") == whole["ppo-actfocus"]
    play("--resume", out / "grpo")
    assert of_arm(out / "grpo") == whole["grpo"]
    before = {path: path.read_bytes() for path in out.rglob("*.csv")}
    play("--resume", out)  # nothing is left to train: it is drawn
    assert {path: path.read_bytes() for path in out.rglob("*.csv")} == before
    assert left_behind(out) == whole


def test_an_arm_alone_is_what_it_is_among_others(whole, tiny_folder, tmp_path):  # noqa: F811
    play(*SMALL, "--model", tiny_folder, "--out", tmp_path / "run", "--arms", "ppo-actfocus")
    assert of_arm(tmp_path / "run") == whole["ppo-actfocus"]


# ------------------------------------------------------------------------------ threads and numbers
@pytest.mark.parametrize(
    "device, parameters, given, cores, threads, at_once",
    [
        ("cpu", 400_000, None, 8, 1, 3),  # as many as there are arms
        ("cpu", 400_000, None, 2, 1, 2),
        ("cpu", 400_000, None, 1, 1, 1),
        ("cpu", 400_000, "4", 8, 4, 2),
        ("cpu", 400_000, "4", 4, 4, 1),
        ("cpu", 135_000_000, None, 8, 8, 1),
        ("cpu", 135_000_000, None, 64, 16, 1),
        ("cpu", 135_000_000, "3", 8, 3, 1),
        ("cuda", 400_000, None, 8, 16, 1),
    ],
)
def test_threads_and_processes(device, parameters, given, cores, threads, at_once, monkeypatch):
    """A machine of which torch would take 16 cores."""
    now = int(given or 16)

    def set_threads(number):
        nonlocal now
        now = number

    monkeypatch.setattr(torch, "get_num_threads", lambda: now)
    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    monkeypatch.setattr(arms_side_by_side, "usable_cores", lambda: cores)
    monkeypatch.setattr(arms_side_by_side.memory, "how_many_fit", lambda *_: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    config = PPOConfig(device=device, arms="grpo,actfocus,placebo,ppo")
    model = torch.nn.Linear(parameters, 1, bias=False, device="meta")
    choose_threads(model, config)
    assert now == threads
    assert arms_at_once(model, config, config.chosen_arms(), 4) == at_once
    assert arms_at_once(model, config, config.chosen_arms(), 1) == 1
    assert arms_at_once(model, config, config.chosen_arms(), 0) == 1
    monkeypatch.setattr(arms_side_by_side.memory, "how_many_fit", lambda *_: 1)
    assert arms_at_once(model, config, config.chosen_arms(), 4) == 1


def test_the_built_in_models_are_small(built_in):
    assert arms_side_by_side.is_small(built_in.model)
