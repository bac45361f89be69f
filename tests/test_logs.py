"""support/logs.py: the picture of a run is whole at any moment and says what it shows, and the
summary in the terminal can be read without the code."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from arms import ARMS
from fused_loss import PolicyLoss
from segment import Segment
from support import logs
from support.config import ActFocusConfig, parse
from support.logs import (
    COLUMNS,
    LARGE_PANELS,
    LINES,
    PANELS,
    UpdateMeter,
    appended_files,
    draw,
    holds_logs,
    is_finished,
    log,
    log_files,
    paired_difference,
    spread,
    success_by_prompt,
    summary,
    whole_file,
)


def write_run(out, evaluations, iterations=4, settings=None):
    """The logs of a run, whose evaluations are given by arm; one every second iteration. Several
    arms have folders of their own."""
    out.mkdir(parents=True, exist_ok=True)
    if len(evaluations) == 1:
        write_arms(out, evaluations, iterations)
    else:
        for name, successes in evaluations.items():
            write_arms(out / name, {name: successes}, iterations)
    if settings is not None:
        (out / "config.json").write_text(json.dumps(settings))


def write_arms(out, evaluations, iterations=4):
    """The logs of arms in one folder, as earlier versions wrote several."""
    out.mkdir(parents=True, exist_ok=True)
    for name, successes in evaluations.items():
        for iteration in range(iterations + 1):
            row = {"iteration": iteration}
            if iteration % 2 == 0 and iteration // 2 < len(successes):
                row |= {"eval_success": successes[iteration // 2], "eval_stderr": 0.1}
            if iteration < iterations:
                row |= {"train_success": 0.1 * iteration % 1, "train_reward": -0.5, "seconds": 2.0}
                row |= {"entropy": 0.3, "reasoning_weight_share": 0.7, "gradient_agreement": 0.1}
                row |= {"reasoning_accuracy": math.nan, "turns_without_facts": 0.0}
            log(out / f"{name}.csv", row)
    for file in ("prompts.csv", "evaluations.csv"):
        with (out / file).open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(("arm", "iteration", "prompt", "success"))
            for name, successes in evaluations.items():
                for i, success in enumerate(successes):
                    writer.writerows((name, 2 * i, prompt, success) for prompt in range(10))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn, original = [], Figure.savefig

    def savefig(figure, *args, **options):
        drawn.append(figure)
        original(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def panel(figure, name, block=0):
    title = PANELS[name][0]
    return [axes for axes in figure.axes if axes.get_title("left") == title][block]


# ---------------------------------------------------------------------------------------- curves
def test_every_panel_has_a_title_and_units(tmp_path, figures):
    write_run(tmp_path, {"grpo": [0.1, 0.2, 0.95], "actfocus": [0.1, 0.5, 1.0]})
    settings = {"env": "sudoku", "model": None, "prompts": 8, "group_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    draw(tmp_path)
    (figure,) = figures
    assert len(figure.axes) == len(PANELS)
    for name, (title, label) in PANELS.items():
        axes = panel(figure, name)
        assert axes.get_title("left") == title and axes.get_ylabel() == label
        assert len(axes.lines) == 2
    for name in LARGE_PANELS:  # the lines are named where they end
        axes = panel(figure, name)
        assert [text.get_text() for text in axes.texts] == ["GRPO", "ActFocus"]
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] <= 1.04
        assert axes.get_xlabel() == "training iterations"
    (title,) = [text.get_text() for sub in figure.subfigs for text in sub.texts]
    assert title == "sudoku, built-in model, 64 rollouts an iteration"


def test_no_interval_leaves_what_a_rate_can_be(tmp_path, figures):
    write_run(tmp_path, {"grpo": [0.0, 0.05, 0.98]})
    draw(tmp_path)
    axes = panel(figures[0], "eval_success")
    assert "standard error" in axes.get_title("right")
    corners = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
    assert corners[:, 1].min() == 0 and corners[:, 1].max() == 1


def test_a_panel_has_at_most_four_lines(tmp_path, figures):
    names = list(ARMS)
    write_run(tmp_path, dict.fromkeys(names, [0.1, 0.2, 0.3]))
    draw(tmp_path)
    (figure,) = figures
    blocks = len(figure.axes) // len(PANELS)
    assert blocks == math.ceil((len(names) - 1) / (LINES - 1)) > 1
    labels = []
    for block in range(blocks):
        axes = panel(figure, "eval_success", block)
        assert len(axes.lines) <= LINES
        found = [text.get_text().replace("\n", " ") for text in axes.texts]
        assert found[0] == "GRPO"  # to compare with
        labels += found[1:]
    assert labels == [arm.label for arm in ARMS.values()][1:]


def test_a_long_run_is_smoothed(tmp_path, figures):
    write_run(tmp_path, {"grpo": [0.1] * 51}, iterations=100)
    draw(tmp_path)
    axes = panel(figures[0], "train_success")
    faint, thick = axes.lines
    assert axes.get_title("right") == "thick: mean of 9 iterations"
    assert len(faint.get_xdata()) == 100 and list(thick.get_xdata()) == list(range(4, 96))
    raw, mean = np.array(faint.get_ydata()), np.array(thick.get_ydata())
    assert mean[10] == pytest.approx(raw[10:19].mean())  # of the iterations 10 to 18, at 14


@pytest.mark.parametrize("iterations", [0, 1])
def test_a_run_that_has_just_begun_is_drawn(iterations, tmp_path, figures):
    draw(tmp_path)
    assert figures == [] and not (tmp_path / "curves.png").exists()
    write_run(tmp_path, {"grpo": [0.0]}, iterations)
    draw(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_whole_at_any_moment(tmp_path, monkeypatch):
    """A process that dies while it draws leaves the last whole picture."""
    write_run(tmp_path, {"grpo": [0.1, 0.2]})
    draw(tmp_path)
    before = (tmp_path / "curves.png").read_bytes()

    def dies(figure, path, **options):
        path.write_bytes(before[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", dies)
        with pytest.raises(KeyboardInterrupt):
            draw(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == before
    draw(tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["curves.png"]  # nothing lies about
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "new.html") as aside:
        aside.write_text(str(1 / 0))
    assert not (tmp_path / "new.html").exists()


def test_labels_keep_apart():
    assert spread([], 0.1) == [] and spread([0.5], 0.1) == [0.5]
    heights = spread([0.5, 0.5, 0.9, 0.5], gap=0.1)
    assert heights == pytest.approx([0.4, 0.5, 0.9, 0.6], abs=1e-3)
    chained = sorted(spread([0.1, 0.12, 0.19], gap=0.1))
    assert all(upper - lower > 0.0999 for lower, upper in zip(chained, chained[1:], strict=False))


# --------------------------------------------------------------------------------------- summary
def test_the_summary_names_its_columns(tmp_path):
    write_run(tmp_path / "now", {"grpo": [0.1, 0.3, 0.2], "actfocus": [0.1, 0.4, 0.5]})
    write_arms(tmp_path / "before", {"grpo": [0.1, 0.3, 0.2], "actfocus": [0.1, 0.4, 0.5]})
    assert summary(tmp_path / "now") == summary(tmp_path / "before")
    lines = summary(tmp_path / "now").splitlines()
    _, names, grpo, actfocus, note, mean, *error, one, two, three = lines
    rest = [one, two, three]
    assert names.split("  ")[0] == "arm"
    for word in ("before", "best", "after", "± std. error", "change", "iteration"):
        assert word in names
    assert grpo.split() == ["grpo", "10.0%", "30.0%", "20.0%", "10.0%", "+10.0", "15.0%", "2.0"]
    assert actfocus.split()[1:6] == ["10.0%", "50.0%", "50.0%", "10.0%", "+40.0"]
    assert "before and after training" in note and "mean over all rollouts" in mean
    assert rest[0].startswith("actfocus minus grpo, in percentage points")
    assert rest[1].startswith("  in training: +13.3, standard error 2.3 over 30 prompts: more than")
    assert rest[2].startswith("  evaluation after 4 iterations: +30.0, standard error 0.0 over")
    assert "the same prompts with the same random numbers, whatever --seed is" in " ".join(error)


@pytest.mark.parametrize("arms", ["placebo,ppo", "ppo,placebo"])
def test_the_first_of_the_arms_is_what_others_are_compared_with(arms, tmp_path, figures):
    """Whatever their order in ARMS, in the summary and in the picture."""
    write_run(tmp_path, {"ppo": [0.1, 0.2], "placebo": [0.1, 0.3]})
    (tmp_path / "config.json").write_text(json.dumps({"arms": arms}))
    first, second = arms.split(",")
    lines = summary(tmp_path).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == [first, second]
    assert any(line.startswith(f"{second} minus {first}, in percentage points") for line in lines)
    draw(tmp_path)
    texts = panel(figures[0], "eval_success").texts
    assert [text.get_text() for text in texts] == [ARMS[first].label, ARMS[second].label]


def test_what_is_logged_of_updates_waits_on_the_device(monkeypatch):
    """A micro-batch reads nothing back, since each time a GPU would have to finish first; the sums
    are those in float64."""
    meter, generator = UpdateMeter(clip_low=0.2, clip_high=0.28), torch.Generator().manual_seed(0)
    labels = torch.tensor([Segment.REASONING, Segment.ACTION, Segment.FORMAT]).repeat(17)[:50]
    sums = dict.fromkeys(("loss", "entropy", "kl", "clip_fraction"), 0.0)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waits for the device"))
        batches = []
        for _ in range(3):
            numbers = torch.randn(5, 50, generator=generator)
            batches.append((PolicyLoss(numbers[0, 0], numbers[1], numbers[2]), numbers[3:]))
            meter.add_micro_batch(batches[-1][0], *numbers[3:], labels, count=torch.tensor(150))
    for result, (old_logprob, advantage) in batches:
        sums["loss"] += (150 * result.loss).item()
        sums["entropy"] += result.entropy.double().sum().item()
        log_ratio = result.logprob - old_logprob
        ratio = log_ratio.exp()
        sums["kl"] += (ratio - 1 - log_ratio).double().sum().item()
        clipped = torch.where(advantage > 0, ratio > 1.28, ratio < 0.8)
        sums["clip_fraction"] += clipped.sum().item()
    meter.add_step(2.0)
    found = meter.columns(tokens=150)
    assert {name: found[name] for name in sums} == {name: sums[name] / 150 for name in sums}
    assert found["clip_fraction"] > 0 and found["grad_norm"] == 2.0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_terminal_can_print_a_summary(encoding, tmp_path, monkeypatch):
    """A run of hours does not end with an error because a terminal has no ±."""
    write_run(tmp_path, {"grpo": [0.1, 0.3], "actfocus": [0.1, 0.4]})
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    parse(ActFocusConfig, "", ["--device", "cpu"])  # as every script begins
    print(summary(tmp_path), "\N{GREEK SMALL LETTER RHO}")
    terminal.flush()
    said = terminal.buffer.getvalue().decode(encoding)
    assert "actfocus minus grpo" in said and said.endswith(" ?\n")


def test_the_last_lines_say_where_to_look(tmp_path):
    write_run(tmp_path, {"grpo": [0.1, 0.3, 0.2]})
    assert "curves.png" not in summary(tmp_path)
    draw(tmp_path)
    (tmp_path / "episodes.html").write_text("")
    *_, curves, episodes = summary(tmp_path).splitlines()
    assert curves == f"the curves: {tmp_path / 'curves.png'}"
    assert episodes == f"episodes before and after training: {tmp_path / 'episodes.html'}"


def test_the_paired_difference_by_hand(tmp_path):
    """Over the prompts that both arms played in the same iteration: gains 0.5, 0 and 0.25. Whether
    the arms wrote into one file, as in earlier versions, or each into its own."""
    head = "arm,iteration,prompt,success"
    grpo = ["grpo,0,7,0.25", "grpo,0,8,0.5", "grpo,1,7,0.5"]
    actfocus = ["actfocus,0,7,0.75", "actfocus,0,8,0.5", "actfocus,1,7,0.75", "actfocus,1,9,1"]
    files = {"both": grpo + actfocus, "grpo": grpo, "actfocus": actfocus}
    for name, lines in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.csv").write_text("\n".join([head, *lines]) + "\n")
    for one, other in (("both", "both"), ("actfocus", "grpo")):
        logs_of = tmp_path / one / "actfocus.csv", tmp_path / other / "grpo.csv"
        played = [success_by_prompt(path, "prompts.csv") for path in logs_of]
        mean, error, prompts = paired_difference(*played)
        assert (mean, prompts) == (pytest.approx(0.25), 3)
        assert error == pytest.approx(0.25 / math.sqrt(3))  # their standard deviation is 0.25
        played = [success_by_prompt(path, "prompts.csv", 1) for path in logs_of]
        mean, error, prompts = paired_difference(*played)
        assert (mean, prompts) == (0.25, 1) and math.isnan(error)


# ----------------------------------------------------------------------------------------- files
def test_only_what_grows_is_cut_back(tmp_path):
    """A picture or a page is written whole each time; cut to an earlier length it would be none."""
    write_run(tmp_path, {"grpo": [0.1]})
    draw(tmp_path)
    (tmp_path / "episodes").mkdir()
    for name in ("samples.txt", "episodes.html", "config.json", "episodes/grpo-before.json"):
        (tmp_path / name).write_text("{}")
    found = [path.name for path in appended_files(tmp_path)]
    assert found == ["grpo.csv", "prompts.csv", "evaluations.csv", "samples.txt"]


def test_the_logs_of_a_run_are_found_wherever_its_arms_have_them(tmp_path):
    names = {"actfocus": [0.1], "placebo": [0.1], "grpo": [0.1]}
    write_run(tmp_path / "now", names, settings={"arms": "placebo,actfocus"})
    write_arms(tmp_path / "before", names)
    (tmp_path / "before" / "grpo").mkdir()  # what --save left there
    (tmp_path / "before" / "grpo" / "config.json").write_text("{}")
    found = [path.relative_to(tmp_path / "now") for path in log_files(tmp_path / "now")]
    assert list(map(str, found)) == [
        "placebo/placebo.csv", "actfocus/actfocus.csv", "grpo/grpo.csv",
    ]  # fmt: skip
    assert appended_files(tmp_path / "now") == [] and holds_logs(tmp_path / "now")
    found = [path.relative_to(tmp_path / "before") for path in log_files(tmp_path / "before")]
    assert list(map(str, found)) == ["grpo.csv", "actfocus.csv", "placebo.csv"]
    assert len(appended_files(tmp_path / "before")) == 5
    (tmp_path / "empty").mkdir()
    assert not holds_logs(tmp_path / "empty") and not holds_logs(tmp_path / "nothing")


def test_a_run_is_finished_when_it_is_evaluated_and_its_checkpoints_are_gone(tmp_path):
    write_run(tmp_path, {"grpo": [0.1, 0.2, 0.3]})
    assert is_finished(tmp_path, "grpo", iterations=4)
    assert not is_finished(tmp_path, "grpo", iterations=6)
    assert not is_finished(tmp_path, "actfocus", iterations=4)
    (tmp_path / "checkpoints").mkdir()
    assert is_finished(tmp_path, "grpo", iterations=4)
    (tmp_path / "checkpoints" / "000003-0123.pt").write_text("")
    assert not is_finished(tmp_path, "grpo", iterations=4)


def test_a_row_with_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="surprise"):
        log(tmp_path / "grpo.csv", {"iteration": 0, "surprise": 1})
    assert all(name in COLUMNS for name in PANELS)
    assert logs.column(tmp_path / "grpo.csv", "loss") == ([], [])
