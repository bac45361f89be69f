"""examples/: loss and gradient in other people's trainers are this project's, on real rollouts.

Needs `pip install trl==1.16.0`, and is left out without it. As a script it is one process of a run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from actfocus import actfocus_weights, clipped_loss  # noqa: E402
from energy import token_energy  # noqa: E402
from policy import load_policy  # noqa: E402
from segment import Segment, segment_batch  # noqa: E402
from warm_start import start_folder  # noqa: E402


# ---------------------------------------------------------------------------------------------- TRL
def train_one_update(out: Path) -> None:
    """Of one process: an update of 16 rollouts over all processes, in two micro-batches each,
    off-policy; leaves what was played and the gradient behind."""
    import trl_actfocus
    from transformers import TrainerCallback

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

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            if trainer.accelerator.is_main_process:
                model = trainer.accelerator.unwrap_model(model)
                grads = {name: p.grad.clone() for name, p in model.named_parameters()}
                torch.save(grads, out / "gradient.pt")

    def uneven(completions, **_):  # whatever happened: every group has something to learn from
        return [float(i * i % 7) for i in range(len(completions))]

    trl_actfocus.earned = uneven
    generator = torch.Generator()
    world = int(os.environ["WORLD_SIZE"])
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


@pytest.mark.parametrize("processes", [1, 2])
def test_the_gradient_in_trl_is_that_of_the_written_loss(processes, tmp_path):
    pytest.importorskip("trl")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--master-port=29571", __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
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
    clipped_loss(logprob, old, advantages, weights, 0.2, 0.28).backward()
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
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    ],
)
def test_settings_that_would_train_with_another_loss_are_refused(option, said, tmp_path):
    pytest.importorskip("trl")
    from trl_actfocus import config, refuse

    refuse(config(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    with pytest.raises(ValueError, match=f"ActFocus cannot be trained with {said}"):
        refuse(config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **option))


if __name__ == "__main__":
    train_one_update(Path(sys.argv[1]))
