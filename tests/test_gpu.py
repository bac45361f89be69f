"""gpu.py: its commands exist, and a step that goes wrong is told while the others go on. What the
steps do is tested where it belongs; here nothing is trained."""

import pytest
from test_readme import wrong_commands

from studies import gpu
from studies.gpu import Step, carry_out


def parsed(tmp_path, *flags):
    return gpu.parse_flags(["--device", "cpu", "--out", str(tmp_path), *flags])


@pytest.mark.parametrize("size", [[], ["--small"]])
def test_every_command_exists(size, tmp_path):
    steps = gpu.steps(parsed(tmp_path, *size, "--smollm2", str(tmp_path)))
    assert [step.name.partition("-")[0] for step in steps if step.name != "rollout-shape"] == [
        *gpu.NAMES[:4], *(["loss"] if not size else []), *gpu.NAMES[4:]
    ]  # fmt: skip
    for step in steps:
        assert wrong_commands("python " + " ".join(step.words)) == [], step.name


@pytest.mark.parametrize(
    "code, minutes, problem",
    [
        ("print('well')", 1, ""),
        ("raise SystemExit(3)", 1, "exit code 3"),
        ("import time; time.sleep(60)", 0.01, "stopped after 0.01 minutes"),
    ],
)
def test_what_went_wrong_is_told(code, minutes, problem, tmp_path):
    assert carry_out(Step("one", ["-c", code], minutes), tmp_path) == problem
    said = (tmp_path / "one.txt").read_text()
    assert said.startswith(f"python -c {code}\n")
    assert ("well" in said.splitlines()) == (not problem)


def test_a_failed_step_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    steps = [Step("loss-64", ["-c", "raise SystemExit(1)"], 1), Step("run", ["-c", ""], 1)]
    monkeypatch.setattr(gpu, "steps", lambda args: [*steps, Step("kills", ["-c", "1/0"], 1)])
    with pytest.raises(SystemExit, match=r"failed: loss-64; .*STEP.txt says why"):
        gpu.main(["loss", "run", "--device", "cpu", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["loss-64", "run"]  # kills was not asked for
    assert lines[0].endswith("exit code 1") and lines[1].endswith("done")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["lost"], "there is no step lost: choose of tests, run, kills, loss"),
        (["smollm2"], "the step smollm2 needs --smollm2 FOLDER"),
    ],
)
def test_wrong_words_are_refused(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parsed(tmp_path, *flags)
    assert said in capsys.readouterr().err
