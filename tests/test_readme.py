"""The README's code runs, its commands and files exist, and its figures are those of the logs. Each
file of the project imports only from the files that stand before it."""

import ast
import contextlib
import functools
import graphlib
import io
import re
import runpy
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
from energy import token_energy
from envs import write_turn
from segment import Segment, segment_batch
from studies import figures
from studies.data import RUN, all_runs, diagnoses, runs_of
from studies.runs import experiments_table
from studies.tables import all_tables, effective_share, weights_table
from support.logs import COLUMNS
from worlds import make_env

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))]
IDEA, OWN_LOOP, TRAINER, GUESS = re.findall(r"```python\n(.*?)```", README, re.S)
# In this order a file imports only from what stands before it. A folder has one place, and its
# files may import each other.
HOUSE = (
    "actfocus", "segment", "energy", "fused_loss", "envs", "worlds", "chat", "kv_cache",
    "model_checks", "policy", "rollout", "arms", "support", "train_grpo", "train_actfocus",
    "train_ppo", "walkthrough", "studies", "examples",
)  # fmt: skip


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
TWICE = """
import runpy, sys
_, *folders = sys.argv
for folder in folders:
    sys.argv[1:] = [folder]
    runpy.run_path("loop.py")
"""


@pytest.fixture(scope="module")
def loops(start, bytes_folder, built_in, tmp_path_factory):
    """What the README's loop comes to over two Hugging Face models, as `AFTER` prints it. It runs
    in an empty folder, to which nothing but its three files is copied, and in a process of its own,
    which imports torch and transformers once for both models."""
    folder = tmp_path_factory.mktemp("loops")
    for name in ("segment.py", "energy.py", "actfocus.py"):
        shutil.copy(ROOT / name, folder)
    env = make_env("frozenlake")
    ids = [built_in.prompt(env.system, env.tools, env.reset(seed)) for seed in (1, 2)]
    prompts = [built_in.tokenizer.decode(each) for each in ids]
    before = f"import sys\nFOLDER = sys.argv[1]\nprompts = {prompts!r}\nseen = []\n"
    before += "import torch\ntorch.manual_seed(0)\nreward = lambda text: float(len(text) % 7)\n"
    loop = OWN_LOOP.replace("lr=1e-6", "lr=1e-4")
    loop += "    seen.append(labels.flatten())\n"
    (folder / "loop.py").write_text(before + loop + AFTER)
    command = [sys.executable, "-c", TWICE, str(start), str(bytes_folder)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return dict(zip(("start", "bytes_folder"), result.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("which", ["start", "bytes_folder"])
def test_the_loop_runs_on_three_copied_files_alone(which, loops):
    """One model speaks the protocol; the other babbles, without any action token."""
    other, formatted, reasoning, action, moved, *alpha = loops[which].split()
    assert float(moved) > 0 and int(other) > 100 and int(formatted) > 10
    if which == "start":
        assert int(reasoning) > 5 * int(action) > 500
        assert alpha == ["[0.10000000149011612]"]
    else:
        assert int(action) == 0


def test_the_world_of_the_readme_plays_and_is_trained_in_by_its_command(tiny_folder, tmp_path):
    """In a folder of the user's own, where the world's file and then the run lie."""
    (tmp_path / "guess.py").write_text(GUESS)
    env = make_env(f"{tmp_path}/guess.py:Guess")
    for colour, reward in (("red", 1.0), ("blue", 0.0)):
        env.reset(2)
        step = env.step(write_turn("Hm.", "say", {"colour": colour}))
        assert (step.reward, step.success, step.done) == (reward, reward == 1, True)
    assert env.step("nonsense").reward == -0.1
    (words,) = re.findall(r"^python (train_actfocus.py --env guess.py:Guess .*?) +#", README, re.M)
    words = words.replace("FOLDER", str(tiny_folder)) + (
        " --iterations 1 --prompts 1 --group-size 2 --minibatch 2 --eval-episodes 2 "
        "--max-turn-tokens 8 --device cpu"
    )
    command = [sys.executable, *f"{ROOT}/{words}".split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-Guess-seed0-\d+", folder.name)
    for name in ("grpo.csv", "actfocus.csv", "curves.png", "episodes.html"):
        assert list(folder.rglob(name)), name


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


COMMAND = re.compile(r"(?<![\w/])(?:python3?|torchrun|accelerate launch)((?: +[^\s`|&#]+)+)")
NOT_OURS = ("pip", "pytest", "venv")  # modules that pages run with python -m
OUTSIDE_THE_PARSER = {("studies/bench.py", "--child")}  # a process that bench starts itself
PASSES_ON = {"studies/compare.py": "train_ppo.py"}  # it hands flags that it does not know to this


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """Every command that starts Python: its module or script, and the flags that this one gets."""
    commands = []
    for arguments in COMMAND.findall(
        re.sub(r"\\\n\s*", " ", text)
    ):  # long ones go on in a next line
        words = [word.strip("\"'.,:;()") for word in arguments.split()]
        words = words[words.index("-m") + 1 :] if "-m" in words else words
        if words and re.fullmatch(r"\w+(\.\w+)*|[\w/-]+\.py", words[0]):
            is_module = "-m" in arguments.split()
            if is_module or words[0].endswith(".py"):  # else prose that speaks of Python
                flags = [word.partition("=")[0] for word in words[1:] if re.match("--[a-z]", word)]
                commands.append((words[0], flags))
    return commands


@functools.cache
def flags_of(name: str) -> frozenset[str]:
    """The flags in the --help of a file; none if it parses no flags."""
    source = (ROOT / name).read_text()
    if not re.search(r"argparse|\bparse\(", source):
        return frozenset()
    module, shown = name.removesuffix(".py").replace("/", "."), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, "--help"])
        try:
            with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
                runpy.run_module(module, run_name="__main__")
        except ModuleNotFoundError:  # an example's package that is not installed
            return frozenset(re.findall(r'add_argument\(\s*"(--[a-z0-9-]+)"', source))
    return frozenset(re.findall(r"^  (?:-\w, )?(--[a-z][a-z0-9-]*)", shown.getvalue(), re.M))


def wrong_commands(text: str) -> list[str]:
    """What is wrong with the commands of a text: files that do not exist, files of a package that
    are run as scripts, and flags that the file's own parser does not know."""
    wrong = []
    for target, flags in commands_of(text):
        if target in NOT_OURS:
            continue
        name = target if target.endswith(".py") else target.replace(".", "/") + ".py"
        if not (ROOT / name).is_file():
            wrong.append(f"{target}: there is no {name}")
            continue
        if target.endswith(".py") and (ROOT / name).with_name("__init__.py").exists():
            wrong.append(f"{target}: a file of a package is run with python -m")
        known = flags_of(name) if flags else frozenset()
        if flags and name in PASSES_ON:
            known |= flags_of(PASSES_ON[name])
        for flag in flags:
            if flag not in known and (name, flag) not in OUTSIDE_THE_PARSER:
                wrong.append(f"{target}: there is no flag {flag}")
    return wrong


def texts_with_commands() -> dict[str, str]:
    """The pages, and the docstrings of the files."""
    pages = [*PAGES, ROOT / "tests" / "README.md"]
    pages += [*(ROOT / "results").glob("*/README.md"), *(ROOT / "starts").glob("*/README.md")]
    texts = {str(page.relative_to(ROOT)): page.read_text() for page in pages}
    for name, source in python_files().items():
        texts[name] = ast.get_docstring(ast.parse(source)) or ""
    return texts


def test_commands_of_pages_and_docstrings_exist():
    wrong = {name: wrong_commands(text) for name, text in texts_with_commands().items()}
    assert {name: each for name, each in wrong.items() if each} == {}


@pytest.mark.parametrize(
    "command, said",
    [
        ("python -m studies.compare --envs shop", "studies.compare: there is no flag --envs"),
        ("python -m studies.compare --env shop \\\n    --sed 1", "there is no flag --sed"),
        ("`python train_ppo.py --resum=x` goes on", "train_ppo.py: there is no flag --resum"),
        ("python -m studies.runs --env shop", "studies.runs: there is no flag --env"),
        ("python compare.py", "compare.py: there is no compare.py"),
        ("python -m compare --env shop", "compare: there is no compare.py"),
        ("torchrun --nproc-per-node 2 -m examples.trl_actfocus --step 3", "no flag --step"),
        ("accelerate launch -m examples.trl", "examples.trl: there is no examples/trl.py"),
        ("python examples/trl_actfocus.py", "is run with python -m"),
    ],
)
def test_a_wrong_command_is_found(command, said):
    (wrong,) = wrong_commands(f"Run this:\n\n    {command}\n")
    assert wrong.endswith(said)


def test_right_commands_are_let_through():
    text = """Python runs `python -m studies.compare --env shop --lr=1e-4` | python -m pytest -q
    torchrun --nproc-per-node 2 -m examples.trl_actfocus --steps 3   # --two processes
    python train_actfocus.py --arms grpo \\
        --out x && python -m support.warm_start --env shop, or `python -m`."""
    assert [target for target, _ in commands_of(text)] == [
        "studies.compare", "pytest", "examples.trl_actfocus", "train_actfocus.py",
        "support.warm_start",
    ]  # fmt: skip
    assert wrong_commands(text) == []


def missing_files(text: str) -> list[str]:
    """The Python files and folders that a page names, in its prose or as the first word of a line
    of a tree, and that do not exist. An indented line of a tree may name a file of any folder."""
    names = re.findall(r"`([\w/-]+\.py)`(?!\])", text)  # what is linked is checked as a link
    missing = [name for name in names if not (ROOT / name).exists()]
    for tree in re.findall(r"^```(?:text)?\n(.*?)^```", text, re.M | re.S):
        for indent, name in re.findall(r"^([\s│├└─]*)([\w/-]+(?:\.py|/))(?=\s)", tree, re.M):
            if not (ROOT / name).exists() and not (indent and any(ROOT.glob(f"*/{name}"))):
                missing.append(name)
    return missing


def test_files_that_the_readme_names_exist():
    assert missing_files(README) == []


def test_a_file_that_is_not_there_is_found():
    tree = "```\nsegment.py   labels\nsupport/     of a run\n  logs.py    rows\n{}\n```\n"
    assert missing_files("`envs.py` `worlds/shop.py` " + tree.format("tests/")) == []
    assert missing_files("`worlds.py`\n" + tree.format("├── report.py  x")) == [
        "worlds.py", "report.py"
    ]  # fmt: skip
    assert missing_files(tree.format("logs.py    not in the root")) == ["logs.py"]


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
def python_files() -> dict[str, str]:
    """The source of every Python file of the project, by its path: root and folders of the root."""
    folders = [each for each in ROOT.iterdir() if each.is_dir() and each.name[0] not in "._"]
    paths = [path for folder in [ROOT, *folders] for path in folder.glob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(paths)}


@functools.cache  # by its text: most files are looked at again and again
def modules_of(source: str) -> frozenset[str]:
    """The names that a source imports, anywhere in it, as if each were a module."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not read"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(modules)


def imports_of(source: str, files: dict[str, str]) -> set[str]:
    """The files among `files` that a source imports."""
    paths = [module.replace(".", "/") for module in modules_of(source)]
    return {path + end for path in paths for end in (".py", "/__init__.py")} & set(files)


@functools.cache
def changes_sys_path(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "sys":
            if "path" in [alias.name for alias in node.names]:
                return True
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            return True
    return False


def place_of(path: str) -> str:
    """The entry of HOUSE that a file belongs to: its folder, or the file itself."""
    return path.partition("/")[0].removesuffix(".py")


def wrong_imports(files: dict[str, str]) -> list[str]:
    """What in these files goes against the order of HOUSE."""
    wrong = []
    within_folders = {}  # file -> files of the same folder that it imports
    for path, source in files.items():
        if changes_sys_path(source):
            wrong.append(f"{path} touches sys.path")
        place = place_of(path)
        if place == "tests":  # tests may import everything
            continue
        if place not in HOUSE:
            wrong.append(f"{path} has no place in the order")
            continue
        within_folders[path] = set()
        for other in sorted(imports_of(source, files)):
            if place_of(other) == place:
                within_folders[path].add(other)
            elif place_of(other) == "studies":
                wrong.append(f"{path} imports {other}, and only studies may")
            elif place_of(other) not in HOUSE[: HOUSE.index(place)]:
                wrong.append(f"{path} imports {other}, which does not stand before it")
    try:
        graphlib.TopologicalSorter(within_folders).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"these import each other: {', '.join(error.args[1])}")
    return wrong


def test_each_file_imports_only_from_what_stands_before_it():
    files = python_files()
    places = {place_of(path) for path in files}
    assert {"actfocus", "worlds", "support", "studies", "examples", "tests"} <= places
    assert wrong_imports(files) == []


@pytest.mark.parametrize(
    "path, line, said",
    [
        ("energy.py", "from policy import Policy", "energy.py imports policy.py, which does not"),
        ("segment.py", "import actfocus, envs", "segment.py imports envs.py, which does not"),
        ("rollout.py", "from support import logs", "imports support/logs.py, which does not"),
        ("arms.py", "def f():\n    import support.memory", "arms.py imports support/memory.py"),
        ("envs.py", "from worlds import make_env", "envs.py imports worlds/__init__.py"),
        ("train_ppo.py", "from studies.diagnose import spearman", "and only studies may"),
        ("examples/verl_actfocus.py", "from studies import diagnose", "and only studies may"),
        ("worlds/shop.py", "import worlds", "these import each other: worlds/"),
        ("support/logs.py", "from tests import conftest", "tests/conftest.py, which does not"),
        ("studies/runs.py", "import sys\nsys.path.insert(0, 'x')", "runs.py touches sys.path"),
        ("tests/test_envs.py", "from sys import path", "test_envs.py touches sys.path"),
        ("helpers.py", "", "helpers.py has no place in the order"),
        ("results/runs.py", "", "results/runs.py has no place in the order"),
    ],
)
def test_a_wrong_import_is_found(path, line, said):
    files = python_files()
    files[path] = files.get(path, "") + f"\n{line}\n"
    wrong = wrong_imports(files)
    assert wrong_imports(python_files()) == []
    assert any(said in each for each in wrong), wrong


# -------------------------------------------------------------------------------------- its figures
INTERVAL = r"[+-]?\d\.\d+ \[[+-]?\d\.\d+, [+-]?\d\.\d+\]"
PICTURE = r"!\[[^]]*\]\(([^)]+)\)"
DIFFERENCE = r"[+-]?\d+\.\d+ ± \d+\.\d+"


def test_the_table_of_the_readme_is_that_of_the_default_run():
    for arm in ("grpo", "actfocus"):
        run = runs_of("default-run", arm=arm)[0]
        success = run.column("eval_success")[1]
        training = run.column("train_success")[1]
        cells = re.search(rf"^{arm} +(.*)$", README, re.M)[1].split()
        shown = [success[0], max(success), success[-1], np.mean(training)]
        assert [cells[0], cells[1], cells[2], cells[5]] == [f"{value:.1%}" for value in shown]


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
    """Every "+1.2 ± 3.4" of the README and of three pages is one that results/tables.md has; one
    that is written without a sign may have either."""
    signed = set(re.findall(DIFFERENCE, (ROOT / "results" / "tables.md").read_text()))
    tables = signed | {number.lstrip("+-") for number in signed}
    cited = []
    pages = ("README.md", "results/evidence.md", "results/larger-step.md", "results/signal.md")
    for page in pages:
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


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of results/tables.md, without its head."""
    section = (ROOT / "results" / "tables.md").read_text().split(f"\n## {heading}\n")[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_the_matched_rates_of_the_page_are_those_of_the_table():
    page = " ".join((ROOT / "results" / "evidence.md").read_text().split())
    rows = {(world, rate): rest for world, rate, *rest in rows_below("Matched learning rates")}
    lake = [rows["FrozenLake", rate] for rate in ("3e-05", "0.0001")]
    assert {times for _, _, times, _ in lake} == {"2.3"}
    ends = [end for *_, seeds in lake for end in seeds.split(" to ")]
    *_, times, seeds = rows["Sudoku", "0.0001"]
    said = (
        f"at 2.3 times the rate in FrozenLake (at 3e-5 and at 1e-4; single seeds {min(ends)} to "
        f"{max(ends)} times) and at {times} times in Sudoku (at 1e-4; seeds {seeds})."
    )
    assert said in page
    early = [rows["Sudoku, first four iterations", rate] for rate in ("0.0001", "0.0003")]
    assert [round(2 * float(times)) / 2 for _, _, times, _ in early] == [3.0, 2.5]
    assert "the factor is about 3 at 1e-4 and about 2.5 at 3e-4" in page
    ends = [end for *_, seeds in early for end in seeds.split(" (")[0].split(" to ")]
    assert f"(single seeds {min(ends)} to {max(ends)})" in page


def test_the_falls_of_the_page_are_those_of_the_table():
    page = (ROOT / "results" / "evidence.md").read_text()
    falls = [row for row in rows_below("Falls") if not row[0].startswith("speed-")]
    sudoku = [row for row in falls if row[0] in ("rate-sudoku", "seeds-sudoku")]
    shown = re.findall(r"^\| (1e-3|3e-4) \| (.+) \| (\d+) \| (.+, .+) \| (.+) \|$", page, re.M)
    found = [(float(rate), *rest) for rate, *rest in shown]
    assert sorted(found) == sorted((float(row[2]), *row[3:7]) for row in sudoku)
    others = [row for row in falls if row not in sudoku and float(row[2]) < 1e-3]
    assert len(others) == 5 and "runs from the committed starts five end" in page
    at_1e3 = [row[3] for row in falls if float(row[2]) == 1e-3]
    assert at_1e3.count("ActFocus") == 4 and at_1e3.count("GRPO") == 3
    assert "ActFocus has four falls in\nnine runs and GRPO three" in page


def test_effective_tokens_lie_between_their_bounds():
    """Of random energies, and as the page says."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        labels = torch.randint(4, (3, 50), generator=generator)
        reasoning, action, response = labels == 1, labels == 2, labels > 0
        energy = torch.randn(3, 50, generator=generator)
        w = actfocus_weights(energy, reasoning, action, response).double()
        share = (w.sum() ** 2 / w.square().sum() / response.sum()).item()
        on_reasoning = (w[reasoning].sum() / w.sum()).item()
        least, most = effective_share(
            (w.sum() / response.sum()).item(), on_reasoning, (action.sum() / response.sum()).item()
        )
        assert least <= share <= most < 1.1 * least
    page = " ".join((ROOT / "results" / "evidence.md").read_text().split())
    bounds = dict(rows_below("Effective tokens"))
    said = f"is {bounds['FrozenLake']} in FrozenLake, {bounds['Sudoku']} in Sudoku"
    assert said in page


def test_the_figures_are_drawn_from_the_data_and_shown(tmp_path, monkeypatch):
    """Each figure is made by studies/figures.py, or shows single tokens, or is the picture that the
    default run leaves; and a page has it."""
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    figures.draw_all()
    there = {path.name for path in (ROOT / "results" / "figures").iterdir()}
    others = {name for name in there if "tokens" in name} | {"idea.png", "default-run.png"}
    assert {path.name for path in tmp_path.iterdir()} == there - others
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
