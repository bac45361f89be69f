"""The README's code runs, its commands and files exist, its figures are those of the logs, and the
house stands as it says."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actfocus import (
    actfocus_weights,
    clipped_loss,
    group_advantages,
    reweight_advantages,
)
from arms import ARMS
from energy import token_energy
from envs import Step, read_call, tool_schema, write_turn
from rollout import rollout
from segment import Segment, segment_batch
from studies import figures
from studies.data import RUN, all_runs, diagnoses, runs_of
from studies.runs import experiments_table
from studies.tables import all_tables, weights_table
from support.logs import COLUMNS, t_interval
from worlds import ENVIRONMENTS, make_env

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))]
IDEA, OWN_LOOP, TRAINER, GUESS = re.findall(r"```python\n(.*?)```", README, re.S)
TABLE = re.findall(r"^\| `(\w+\.py)` \| (.+) \| (.+) \|$", README, re.M)
PATH = [name for name, _, _ in TABLE]


# ----------------------------------------------------------------------------------------- its code
def test_the_idea_and_the_hook_run():
    turn = [b"<think>", b"hm", b"</think>", b"<tool_call>", b"{", b"}", b"</tool_call>", b""]
    scope = {
        "Segment": Segment,
        "segment_batch": segment_batch,
        "token_energy": token_energy,
        "actfocus_weights": actfocus_weights,
        "group_advantages": group_advantages,
        "clipped_loss": clipped_loss,
        "reweight_advantages": reweight_advantages,
        "ids": torch.arange(8).expand(4, 8),
        "bytes_of": turn,
        "response": torch.ones(4, 8, dtype=torch.bool),
        "reference_logits": torch.randn(4, 8, 50),
        "rewards": torch.tensor([0.0, 1.0, 1.0, 0.0]),
        "group_size": 4,
        "logprob": torch.zeros(4, 8, requires_grad=True),
        "old_logprob": torch.zeros(4, 8),
    }
    exec(IDEA, scope)
    assert torch.equal(scope["weights"][:, 1], torch.full((4,), 0.1))
    assert (scope["weights"][:, 4:6] > 1).all() and scope["loss"].ndim == 0
    exec(TRAINER, scope)
    assert scope["advantages"].shape == (4, 8)


AFTER = """
counts = torch.bincount(torch.cat(seen), minlength=4).tolist()
assert all(p.isfinite().all() for p in model.parameters())
moved = sum((a - b).abs().sum() for a, b in zip(model.parameters(), reference.parameters()))
print(*counts, moved.item(), weights[labels == Segment.REASONING].unique().tolist())
"""


@pytest.mark.parametrize("which", ["start", "bytes_folder"])
def test_the_loop_runs_on_three_copied_files_alone(which, request, built_in, tmp_path):
    """In an empty folder: three files and the README's loop over a Hugging Face model. One speaks
    the protocol; the other babbles, without any action token."""
    folder = request.getfixturevalue(which)
    for name in ("segment.py", "energy.py", "actfocus.py"):
        shutil.copy(ROOT / name, tmp_path)
    env = make_env("frozenlake")
    ids = [built_in.prompt(env.system, env.tools, env.reset(seed)) for seed in (1, 2)]
    prompts = [built_in.tokenizer.decode(each) for each in ids]
    before = f"FOLDER = {str(folder)!r}\nprompts = {prompts!r}\nseen = []\n"
    before += "import torch\ntorch.manual_seed(0)\nreward = lambda text: float(len(text) % 7)\n"
    loop = OWN_LOOP.replace("lr=1e-6", "lr=1e-4")
    loop += "    seen.append(labels.flatten())\n"
    (tmp_path / "loop.py").write_text(before + loop + AFTER)
    command = [sys.executable, "loop.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    other, formatted, reasoning, action, moved, *alpha = result.stdout.split()
    assert float(moved) > 0 and int(other) > 100 and int(formatted) > 10
    if which == "start":
        assert int(reasoning) > 5 * int(action) > 500
        assert alpha == ["[0.10000000149011612]"]
    else:
        assert int(action) == 0


def test_the_environment_of_the_readme_plays_and_is_found_by_name(tiny, monkeypatch):
    monkeypatch.setattr("worlds.ENVIRONMENTS", dict(ENVIRONMENTS))
    scope = {
        "tool_schema": tool_schema,
        "read_call": read_call,
        "Step": Step,
        "ENVIRONMENTS": sys.modules["worlds"].ENVIRONMENTS,
    }
    exec(GUESS, scope)
    env = make_env("guess")
    for colour, reward in (("red", 1.0), ("blue", 0.0)):
        env.reset(2)
        step = env.step(write_turn("Hm.", "say", {"colour": colour}))
        assert (step.reward, step.success, step.done) == (reward, reward == 1, True)
    assert env.step("nonsense").reward == -0.1
    rollouts = rollout(tiny, lambda: make_env("guess"), [1, 1, 2, 2], max_turn_tokens=8)
    assert rollouts.turns.tolist() == [1] * 4 and (rollouts.rewards <= 0).all()


# ------------------------------------------------------------------------------ its words and links
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", line).lower().replace(" ", "-") for line in headings}


def test_links_pictures_and_anchors_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            other = page.parent / name if name else page
            assert other.exists(), (page.name, target)
            if anchor:
                assert anchor in anchors(other), (page.name, target)


def test_the_readme_names_the_authors_and_speaks_of_weights():
    assert "a tenth of the gradient" not in README
    for author in ["He", "Zhu", "Zhou", "Gu", "Liu", "Huang", "Zou", "Wipf", "Yu", "Wu"]:
        assert re.search(rf"author .*\b{author}\b", README)


def test_commands_of_the_pages_exist():
    for page in PAGES:
        for script, flags in re.findall(r"python ((?:\w|/|-)+\.py)([^\n`|&#]*)", page.read_text()):
            assert (ROOT / script).exists(), (page.name, script)
            if "/" not in script and script not in ("bench.py", "warm_start.py"):
                source = (ROOT / script).read_text()
                if script.startswith(("train", "compare")):
                    source += (ROOT / "config.py").read_text()  # the flags that trainers share
                for flag in re.findall(r"--([a-z][a-z0-9-]*)", flags):
                    known = f"{flag.replace('-', '_')}:" in source or f'"--{flag}"' in source
                    assert known or flag == "help", (script, flag)


def test_every_promise_names_tests_that_there_are():
    """tests/README.md: `test_file` or `test_file::test_name` in the last column of its table."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", (ROOT / "tests/README.md").read_text(), re.M)[2:]
    assert len(rows) >= 20
    for promise, held_by in rows:
        named = re.findall(r"`(test_\w+)(?:::(test_\w+))?`", held_by)
        assert named, promise
        for file, test in named:
            source = (ROOT / "tests" / f"{file}.py").read_text()
            assert not test or f"def {test}(" in source, (promise, file, test)


# ---------------------------------------------------------------------------------------- the house
def imports_of(name: str) -> set[str]:
    ours = {path.stem for path in ROOT.glob("*.py")}
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found if module in ours}


def test_files_import_only_from_rows_above_and_as_the_table_says():
    assert PATH[:4] == ["segment.py", "energy.py", "actfocus.py", "fused_loss.py"]
    for row, (name, _, said) in enumerate(TABLE):
        imports = imports_of(name)
        above = {each.removesuffix(".py") for each in PATH[:row]}
        assert imports <= above, (name, imports - above)
        if said == "none":
            assert not imports, name
        elif "above" not in said:
            assert imports == set(re.findall(r"`(\w+)`", said)), (name, imports)


# -------------------------------------------------------------------------------------- its figures
COMPARED = ("grpo", "actfocus", "ppo", "ppo-actfocus", "placebo")
INTERVAL = r"[+-]?\d\.\d+ \[[+-]?\d\.\d+, [+-]?\d\.\d+\]"
PICTURE = r"!\[[^]]*\]\(([^)]+)\)"
DIFFERENCE = r"[+-]?\d+\.\d+ ± \d+\.\d+"


def test_the_table_of_the_readme_is_that_of_the_logs():
    """An arm a row: means over eight seeds, and differences to GRPO's of the same seed."""
    found = {}
    for arm in COMPARED:
        runs = runs_of("compare", arm=arm)
        assert list(runs) == list(range(8))
        found[arm] = [run.measures(threshold=0.5) for run in runs.values()]
    for arm, runs in found.items():
        cells = [ARMS[arm].label]
        for name in ("final", "area", "training"):
            cells.append(f"{np.mean([run[name] for run in runs]):.1f}")
        for name in ("final", "area", "training"):
            gains = [
                run[name] - other[name] for run, other in zip(runs, found["grpo"], strict=True)
            ]
            won = f"({sum(gain > 0 for gain in gains)}/8)"
            gain = f"{np.mean(gains):+.1f} ± {t_interval(gains):.1f} {won}"
            cells.append("" if arm == "grpo" else gain)
        assert re.sub(" +", " ", f"| {' | '.join(cells)} |") in README, cells


def test_the_page_of_signals_has_the_figures_of_their_tables():
    page = (ROOT / "results" / "signal.md").read_text()
    found = {
        name.removeprefix("signal/"): rows
        for name, rows in diagnoses("signal").items()
        if name.startswith("signal/") and "null" not in name
    }
    assert len(found) >= 7
    for diagnosis, rows in found.items():
        rows = {row["name"]: row for row in rows}
        cells = [diagnosis, f"{float(rows['action']['token_share']):.0%}"]
        for name in ("reasoning", "action", "grpo", "actfocus", "placebo"):
            cells.append(f"{float(rows[name]['adam_ratio']):.3f}")
        ends = [float(rows["actfocus"][f"adam_gain{end}"]) for end in ("", "_low", "_high")]
        cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends))
        assert f"| {' | '.join(cells)} |" in page, cells


def test_the_page_of_tables_is_that_of_the_data():
    assert (ROOT / "results" / "tables.md").read_text() == all_tables()


def test_the_differences_that_pages_cite_are_in_the_tables():
    """Every "+1.2 ± 3.4" of the README and of two pages is one that results/tables.md has; one that
    is written without a sign may have either."""
    signed = set(re.findall(DIFFERENCE, (ROOT / "results" / "tables.md").read_text()))
    tables = signed | {number.lstrip("+-") for number in signed}
    cited = []
    for page in ("README.md", "results/evidence.md", "results/signal.md"):
        cited += [(page, n) for n in re.findall(DIFFERENCE, (ROOT / page).read_text())]
    assert len(cited) > 30
    for page, number in cited:
        assert number in tables, (page, number)


def test_the_intervals_that_pages_cite_are_in_the_data():
    """Every "+0.12 [-0.03, +0.27]" is a ratio, a gain or a rank correlation of a diagnosis, or it
    is in results/tables.md; but for three, which the pages say were measured otherwise."""
    known = set(re.findall(INTERVAL, (ROOT / "results" / "tables.md").read_text()))
    known |= {"0.010 [-0.026, 0.046]", "-0.009 [-0.020, 0.002]", "+0.15 [-0.07, +0.37]"}
    for table, names in (
        ("signal", ("adam_ratio", "adam_gain", "raw_ratio", "raw_gain")),
        ("correlations", ("rho",)),
    ):
        for row in (row for rows in diagnoses(table).values() for row in rows):
            for name in names:
                ends = ("low", "", "high") if name == "rho" else ("_low", "", "_high")
                columns = [end if name == "rho" and end else f"{name}{end}" for end in ends]
                low, value, high = (float(row[column]) for column in columns)
                for form in ("{:.3f} [{:.3f}, {:.3f}]", "{:+.3f} [{:+.3f}, {:+.3f}]",
                             "{:+.2f} [{:+.2f}, {:+.2f}]"):  # fmt: skip
                    known.add(form.format(value, low, high))
    cited = []
    for page in PAGES:
        text = re.sub(r"\s+", " ", page.read_text())
        cited += [(page.name, interval) for interval in re.findall(INTERVAL, text)]
    assert len(cited) > 100
    for page, interval in cited:
        assert interval in known, (page, interval)


def test_the_figures_are_drawn_from_the_data_and_shown(tmp_path, monkeypatch):
    """Each figure is made by studies/figures.py, or shows single tokens; and a page has it."""
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    figures.draw_all()
    there = {path.name for path in (ROOT / "results" / "figures").iterdir()}
    tokens = {name for name in there if "tokens" in name or name == "idea.png"}
    assert {path.name for path in tmp_path.iterdir()} == there - tokens
    assert all(path.stat().st_size > 20_000 for path in tmp_path.iterdir())
    shown = {Path(name).name for page in PAGES for name in re.findall(PICTURE, page.read_text())}
    assert shown >= there


def test_the_index_has_what_the_weights_come_to():
    index = (ROOT / "results" / "README.md").read_text()
    for line in weights_table().splitlines()[2:]:
        assert line.rpartition(" | ")[0] in index  # without the seconds


def test_the_notebook_lists_every_run():
    page = (ROOT / "results" / "training-runs.md").read_text()
    assert experiments_table() in page
    for run in all_runs():
        assert set(run.rows[0]) - set(RUN) <= set(COLUMNS)
