"""The README's code runs, its commands exist, and its claims about the files hold."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from actfocus import actfocus_weights, clipped_loss, fused_policy_loss, group_advantages, reweight_advantages
from energy import token_energy, token_stats
from segment import Segment, segment_turn
from train_grpo import column

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PATH = "segment.py energy.py actfocus.py envs.py policy.py rollout.py train_grpo.py train_actfocus.py".split()


def test_the_code_of_the_readme_runs():
    turns = [[b"<think>", b"hm", b"</think>", b"<tool_call>", b"{", b"}", b"</tool_call>", b"<|im_end|>"]] * 4
    ref_hidden, ref_head_weight = torch.randn(8, 16), torch.randn(50, 16)
    scope = {
        "torch": torch, "Segment": Segment, "segment_turn": segment_turn, "token_energy": token_energy, "turns": turns,
        "actfocus_weights": actfocus_weights, "group_advantages": group_advantages, "clipped_loss": clipped_loss,
        "reweight_advantages": reweight_advantages, "token_stats": token_stats, "ref_hidden": ref_hidden,
        "ref_head_weight": ref_head_weight, "targets": torch.arange(8), "reference_logits": torch.randn(4, 8, 50),
        "response": torch.ones(4, 8, dtype=torch.bool), "rewards": torch.tensor([0.0, 1.0, 1.0, 0.0]), "group_size": 4,
        "logprob": torch.zeros(4, 8, requires_grad=True), "old_logprob": torch.zeros(4, 8),
        "fused_policy_loss": fused_policy_loss, "hidden": torch.randn(8, 16, requires_grad=True), "head_weight": torch.randn(50, 16),
    }  # fmt: skip
    idea, own_loop, trainer = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(idea, scope)
    assert torch.equal(scope["weights"][:, 1], torch.full((4,), 0.1))
    assert (scope["weights"][:, 4:6] > 1).all() and scope["loss"].ndim == 0
    exec(trainer, scope)
    assert scope["advantages"].shape == (4, 8)
    packed = {name: scope[name][0, :] for name in ("reasoning", "action", "response", "logprob", "old_logprob")}
    exec(own_loop, scope | packed | {"advantages": torch.ones(8)})


def test_files_that_the_readme_names_exist():
    for page in (ROOT / "README.md", ROOT / "results" / "README.md"):
        for name in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / name).exists(), name
    assert all((ROOT / name).exists() for name in PATH + ["requirements.txt", "LICENSE"])


def test_anchors_of_the_readme_lead_somewhere():
    headings = {re.sub(r"[^\w\- ]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)", README, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_the_reading_path_stays_short():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in PATH}
    del lines["envs.py"]  # four worlds, one readable file
    assert sum(lines.values()) <= 1420 and max(lines.values()) <= 320, lines


def test_the_files_of_the_first_floor_import_nothing_that_trains():
    ours = "|".join(name.removesuffix(".py") for name in PATH)
    for name in ("segment.py", "energy.py", "actfocus.py", "envs.py"):
        imports = re.findall(rf"^(?:from|import) ({ours})\b", (ROOT / name).read_text(), re.M)
        assert imports == ["energy"] * (name == "actfocus.py"), name


def figures(run):
    """What the README says of a run: of each arm evaluation success before and after, and the mean of training, in %."""
    arms = {}
    for arm in ("grpo", "actfocus"):
        success, training = (column(ROOT / "results" / run / f"{arm}.csv", name)[1] for name in ("eval_success", "train_success"))
        arms[arm] = [100 * x for x in (success[0], success[-1], success[-1] - success[0], sum(training) / len(training))]
    return arms


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_figures_of_the_readme_are_those_of_the_logs(seed):
    grpo, focus = figures(f"frozenlake/seed{seed}").values()
    row = f"| `python train_actfocus.py --seed {seed}` | {grpo[0]:.1f} % | {grpo[1]:.1f} % ({grpo[2]:+.1f}) | {focus[1]:.1f} % ({focus[2]:+.1f}) |"
    assert f"{row} {grpo[3]:.1f} % | {focus[3]:.1f} % |" in README


def test_the_notebook_lists_every_run(capsys):
    path = ROOT / "results" / "runs.py"
    runpy.run_path(str(path))["main"]([])
    table = capsys.readouterr().out
    assert table in (ROOT / "results" / "README.md").read_text()
