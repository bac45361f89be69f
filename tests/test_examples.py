"""examples/: loss and gradient in other people's trainers are this project's, on real rollouts.

The tests need trl 1.16.0 and verl 0.9.0, and those of a package that is not installed are skipped.
Run as a script, this file is one process of a training in TRL.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_policy import THINKING_TEMPLATE, foreign_checkpoint
from torch.nn.functional import pad

from actfocus import actfocus_weights, clipped_loss
from energy import token_energy
from policy import load_policy
from segment import Segment, segment_batch
from support.warm_start import start_folder

ROOT = Path(__file__).parents[1]
TURN = [b"<think>", b"Up is ice.", b"</think>", b"\n", b"<tool_call>", b"{}", b"</tool_call>", b""]


# ---------------------------------------------------------------------------------------------- TRL
def train_one_update(out: Path) -> None:
    """Of one process: an update of 16 rollouts over all processes, in two micro-batches each,
    off-policy; leaves what was played and the gradient behind."""
    from transformers import TrainerCallback

    from examples import trl_actfocus

    class Recorded(trl_actfocus.ActFocusTrainer):
        def weighted(self, played):
            self.plain = played["advantages"].clone()
            return super().weighted(played)

        def _generate_and_score_completions(self, inputs):
            played = super()._generate_and_score_completions(inputs)
            rank = self.accelerator.process_index
            noise = torch.randn(
                played["completion_ids"].shape, generator=generator.manual_seed(rank)
            )
            played["old_per_token_logps"] = played["sampling_per_token_logps"] + 0.3 * noise
            torch.save(played | {"plain": self.plain}, out / f"rank{rank}.pt")
            return played

        def compute_loss(self, *inputs, **options):
            loss = super().compute_loss(*inputs, **options)
            losses.append(loss.item())  # of a micro-batch
            return loss

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            if trainer.accelerator.is_main_process:
                model = trainer.accelerator.unwrap_model(model)
                grads = {name: p.grad.clone() for name, p in model.named_parameters()}
                torch.save(grads, out / "gradient.pt")

    def uneven(completions, **_):  # whatever happened: every group has something to learn from
        return [float(i * i % 7) for i in range(len(completions))]

    trl_actfocus.earned = uneven
    generator, losses = torch.Generator(), []
    world = int(os.environ.get("WORLD_SIZE", 1))
    config = trl_actfocus.config(
        output_dir=str(out), max_steps=1, per_device_train_batch_size=8 // world, use_cpu=True,
        num_generations=4, gradient_accumulation_steps=2, steps_per_generation=2,
        max_grad_norm=1e9, bf16=False,
    )  # fmt: skip
    trainer = trl_actfocus.make_trainer(
        "frozenlake", start_folder("frozenlake"), config, Recorded, max_tokens=900
    )
    trainer.add_callback(Gradients())
    trainer.train()
    (out / f"rank{trainer.accelerator.process_index}.txt").write_text(str(sum(losses)))
    trl_actfocus.leave(trainer)


@pytest.mark.parametrize("processes", [1, 2])
def test_loss_and_gradient_in_trl_are_those_of_the_written_loss(processes, tmp_path):
    pytest.importorskip("trl")
    command = [sys.executable, __file__, str(tmp_path)]
    if processes > 1:
        command[1:1] = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # a script sees only its own folder
    for _ in range(2):  # gloo has been seen to abort as a process ended, once in forty runs
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if "SIGABRT" not in done.stderr:
            break
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    played = [torch.load(path) for path in sorted(tmp_path.glob("rank*.pt"))]
    assert len(played) == processes and sum(len(each["plain"]) for each in played) == 16
    gradient = torch.load(tmp_path / "gradient.pt")

    policy = load_policy(start_folder("frozenlake"))
    parts = {"logprob": [], "old": [], "energy": [], "labels": []}
    longest = max(each["completion_ids"].shape[1] for each in played)
    for each in played:
        response = (each["completion_mask"] * each["tool_mask"]).bool()
        ids = torch.cat([each["prompt_ids"], each["completion_ids"]], dim=1)
        seen = torch.cat([each["prompt_mask"], each["completion_mask"]], dim=1)
        start = each["prompt_ids"].shape[1]
        logits = policy.model(ids, attention_mask=seen).logits[:, start - 1 : -1]
        logprob = logits.log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)
        labels = segment_batch(each["completion_ids"], response, policy.bytes_of)
        found = {"logprob": logprob, "old": each["old_per_token_logps"], "labels": labels}
        found["energy"] = token_energy(logits.detach())
        for name, value in found.items():
            parts[name].append(pad(value, (0, longest - value.shape[1])))
    logprob, old, energy, labels = (torch.cat(values) for values in parts.values())
    advantages, response = torch.cat([each["plain"] for each in played]), labels != Segment.OTHER
    assert (advantages > 0).any() and (advantages < 0).any() and (~response).any()
    reasoning, action = labels == Segment.REASONING, labels == Segment.ACTION
    weights = actfocus_weights(energy, reasoning, action, response)
    ratio = (logprob - old)[response].exp()
    assert (ratio > 1.28).any() and (ratio < 0.8).any() and action.any() and reasoning.any()
    loss = clipped_loss(logprob, old, advantages, weights, 0.2, 0.28)
    in_trl = [float(path.read_text()) for path in tmp_path.glob("rank*.txt")]
    assert len(in_trl) == processes  # DDP averages over them
    assert sum(in_trl) / processes == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for name, p in policy.model.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad, atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize(
    "option, said",
    [
        ({"loss_type": "grpo"}, "loss_type='grpo'"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"steps_per_generation": 8}, "steps_per_generation=8 and gradient_accumulation_steps=4"),
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"delta": 2.0}, "delta"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    ],
)
def test_settings_that_would_train_with_another_loss_are_refused(option, said, tmp_path):
    pytest.importorskip("trl")
    from examples.trl_actfocus import config, refuse

    refuse(config(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    with pytest.raises(ValueError, match=f"ActFocus cannot be trained with {said}"):
        refuse(config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **option))


def test_what_the_template_opens_and_what_is_not_tagged_is_noticed(tmp_path):
    pytest.importorskip("trl")
    from examples import trl_actfocus

    policy = load_policy(foreign_checkpoint(tmp_path, "byte-level", THINKING_TEMPLATE))
    assert trl_actfocus.opened(policy.tokenizer) == policy.opening == b"<think>\n"
    assert trl_actfocus.opened(load_policy(start_folder("shop")).tokenizer) == b""

    class Bare(trl_actfocus.ActFocusTrainer):  # the weighting alone
        alpha, focus, opening, bytes_of = 0.1, 0.5, b"", TURN
        accelerator = SimpleNamespace(
            gather=lambda x: x, pad_across_processes=lambda x, dim: x, process_index=0
        )

        def __init__(self):
            pass

        def energy(self, out):
            return torch.zeros(out["completion_ids"].shape)

    ids, mask = torch.tensor([[0, 1, 2, 4, 5, 6, 7]]), torch.ones(1, 7, dtype=torch.int64)
    out = {"completion_ids": ids, "completion_mask": mask, "advantages": torch.tensor([2.0])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighted = Bare().weighted(out)  # weights 1, .1, 1, 1, 1.25, 1, 1 of sum 6.35
    expected = 2 * 7 / 6.35 * torch.tensor([[1, 0.1, 1, 1, 1.25, 1, 1]])
    torch.testing.assert_close(weighted, expected)
    for untagged, missing in (([0, 1, 2, 3, 3], "action"), ([3, 4, 5, 6, 7], "reasoning")):
        some = {"completion_ids": torch.tensor([untagged]), "completion_mask": mask[:, :5]}
        with pytest.warns(UserWarning, match=f"nothing played is {missing}"):
            Bare().weighted(out | some)


# --------------------------------------------------------------------------------------------- verl
def test_settings_of_verl_that_would_train_with_another_loss_are_refused():
    from examples.verl_actfocus import refuse

    def config(correction=None, **options):
        usual = {"loss_mode": "vanilla", "loss_agg_mode": "token-mean", "clip_ratio_c": 1e9}
        actor = usual | options
        actor["policy_loss"] = {"loss_mode": actor.pop("loss_mode")}
        algorithm = {"rollout_correction": correction}
        return {"actor_rollout_ref": {"actor": actor}, "algorithm": algorithm}

    refuse(config())
    refuse(config(correction={"rollout_rs": None}))
    for wrong, said in (
        ({"loss_mode": "gspo"}, "loss_mode=gspo"),
        ({"loss_agg_mode": "seq-mean-token-mean"}, "loss_agg_mode=seq-mean-token-mean"),
        ({"clip_ratio_c": 3.0}, "clip_ratio_c=3.0"),
        ({"correction": {"rollout_rs": "token_k1"}}, "rollout_rs=token_k1"),
    ):
        with pytest.raises(ValueError, match=f"ActFocus cannot be trained with .*{said}"):
            refuse(config(**wrong))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_loss_and_gradient_through_verl_are_those_of_the_written_loss(micro_batches):
    """Off-policy, asymmetric clip, both signs of the advantage, tool responses between turns."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig

    from examples.verl_actfocus import weigh

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(len(TURN), (8, 60), generator=generator)
    response = torch.rand(8, 60, generator=generator) < 0.8
    old, noise, energy = torch.randn(3, 8, 60, generator=generator, dtype=torch.float64)
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    labels = segment_batch(ids, response, TURN)
    reasoning, action = labels == Segment.REASONING, labels == Segment.ACTION
    assert reasoning.any() and action.any()
    weights = actfocus_weights(energy, reasoning, action, response)

    logprob = (old + 0.3 * noise).requires_grad_()
    expected = clipped_loss(logprob, old, advantages, weights, 0.2, 0.28)
    (expected_gradient,) = torch.autograd.grad(expected, logprob)

    tokens = {"dp_size": 1, "batch_num_tokens": response.sum()}
    config = ActorConfig(
        strategy="fsdp", rollout_n=4, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1e9,
        ppo_mini_batch_size=8, ppo_micro_batch_size_per_gpu=8, global_batch_info=tokens,
    )  # fmt: skip
    broadcast = advantages[:, None] * response
    weighed = weigh(ids, response.long(), broadcast, energy, TURN)
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(8).chunk(micro_batches):
        loss, _ = core.compute_policy_loss_vanilla(
            old[rows], logprob[rows], weighed[rows], response[rows].double(), "token-mean", config
        )
        total = total + loss
    (gradient,) = torch.autograd.grad(total, logprob)
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-8, rtol=1e-6)


def test_what_verl_trains_on_needs_torch_alone():
    from examples.verl_actfocus import weigh

    ids = torch.tensor([[0, 1, 2, 4, 5, 6, 7, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    energy = torch.zeros(1, 8)
    weighed = weigh(ids, mask, 2.0 * mask, energy, TURN, alpha=0.5, beta=0.0)
    # weights 1, .5, 1, 1, 1, 1, 1 of sum 6.5 over 7 tokens
    expected = 2 * 7 / 6.5 * torch.tensor([[1, 0.5, 1, 1, 1, 1, 1, 0]])
    torch.testing.assert_close(weighed, expected)


if __name__ == "__main__":
    train_one_update(Path(sys.argv[1]))
