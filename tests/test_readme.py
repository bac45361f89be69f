"""The README's code runs, its commands exist, and its claims about the files hold."""

import re
from pathlib import Path

import torch

from actfocus import actfocus_weights, clipped_loss, fused_policy_loss, group_advantages, reweight_advantages
from energy import token_energy, token_stats
from segment import Segment, segment_turn

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
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", README) + PATH + ["requirements.txt", "LICENSE"]:
        assert (ROOT / name).exists(), name


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
