"""ActFocus in TRL: a GRPOTrainer whose per-token advantages carry the weights, with this project's
worlds as its rollouts. It needs `pip install trl==1.16.0`. Run it from the root of the project:

    python -m examples.trl_actfocus --env frozenlake                # one process; a CPU will do
    torchrun --nproc-per-node 2 -m examples.trl_actfocus            # several, on CPUs as well
    accelerate launch --num_processes 2 -m examples.trl_actfocus    # several, on GPUs

ActFocusTrainer takes what GRPOTrainer takes: any tools, environment or reward. Its loss and
gradient are those of `clipped_loss` with `actfocus_weights` over the rollouts of all processes
(tests/test_examples.py). Settings that would silently make it another loss are refused.

- Each update uses the whole generation once, so its ratios leave 1, and can be clipped, only with
  num_iterations > 1.
- With vLLM, TRL also multiplies each token's loss by its importance ratio.
- With the built-in model, an update takes 1.11 times as long as in plain TRL (`--plain`;
  results/speed.md).
- The reference model is whole on every process. FSDP and ZeRO-3, which would split only the policy,
  were not tried.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from actfocus import actfocus_weights, reweight_advantages
from energy import token_energy
from policy import Policy, load_policy
from rollout import rollout
from segment import Segment, segment_batch, token_bytes
from support.warm_start import start_folder
from worlds import make_env


class ActFocusTrainer(GRPOTrainer):
    """GRPOTrainer with ActFocus's weights. alpha: of reasoning tokens; focus: how much more an
    uncertain action token weighs (the paper's beta, which is TRL's name for the KL coefficient);
    opening: what the chat template opens a turn with, b"<think>\\n" or b""; else read off it.

    Raises ValueError for settings with which TRL's loss is no mean over the tokens of one update.
    """

    def __init__(
        self, model, reward_funcs, args: GRPOConfig, *,
        alpha: float = 0.1, focus: float = 0.5, opening: bytes | None = None, **options,
    ):  # fmt: skip
        refuse(args)
        # A copy before TRL changes the model's forward pass. With KL on, TRL has one, too.
        own = model if isinstance(model, str) else copy.deepcopy(model)
        super().__init__(model, reward_funcs, args, **options)
        self.alpha, self.focus = alpha, focus
        self.opening = opened(self._tokenizer) if opening is None else opening
        if isinstance(own, str):
            init = (args.model_init_kwargs or {}) | {"dtype": self.model.dtype}
            own = AutoModelForCausalLM.from_pretrained(own, **init)
        self.frozen = own.to(self.accelerator.device).eval().requires_grad_(False)
        self.bytes_of = token_bytes(self._tokenizer)

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        if self.model.training:
            out["advantages"] = self.weighted(out)
        return out

    @torch.no_grad()
    def weighted(self, out: dict[str, Tensor]) -> Tensor:
        """(B, T): A * w * N / sum(w), N and sum(w) over the rollouts of all processes, as mean and
        spread of the energies are."""
        response = (out["completion_mask"] * out.get("tool_mask", 1)).bool()  # (B, T)
        labels = segment_batch(out["completion_ids"], response, self.bytes_of, self.opening)
        energy, labels = self.energy(out), labels.to(response.device)
        everywhere = [
            self.accelerator.gather(self.accelerator.pad_across_processes(each, dim=1))
            for each in (energy, labels, out["advantages"][:, None])
        ]  # (B of all processes, T of the longest); advantages (B, 1)
        energy, labels, advantages = everywhere
        reasoning, action = labels == Segment.REASONING, labels == Segment.ACTION
        response = labels != Segment.OTHER
        if not (reasoning.any() and action.any()):
            missing = "reasoning in <think>" if action.any() else "action in <tool_call>"
            what = f"nothing played is {missing}, and so nothing is weighed as such"
            warnings.warn(f"{what}: check the form of the turns", stacklevel=2)
        weights = actfocus_weights(energy, reasoning, action, response, self.alpha, self.focus)
        weighted = reweight_advantages(advantages[:, 0], weights, response)
        rows, columns = out["completion_ids"].shape
        first = self.accelerator.process_index * rows
        return weighted[first : first + rows, :columns]

    def energy(self, out: dict[str, Tensor]) -> Tensor:
        """(B, T): of the frozen reference's raw logits, not divided by the temperature."""
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
        mask = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
        length, found = out["completion_ids"].shape[1], []
        for some, seen in zip(ids.split(4), mask.split(4), strict=True):  # the logits are large
            with self.accelerator.autocast():
                logits = self.frozen(some, attention_mask=seen, logits_to_keep=length + 1).logits
            found.append(token_energy(logits[:, :-1]))  # position t - 1 predicts the token at t
        return torch.cat(found)


def opened(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """What the chat template has written of a turn's thought before the model begins."""
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
    )
    _, tag, rest = shown.rpartition("<think>")
    return f"{tag}{rest}".encode() if tag and "</think>" not in rest else b""


def refuse(args: GRPOConfig) -> None:
    """Raise ValueError, naming the setting, for what would silently train with another loss."""
    steps, accumulated = args.steps_per_generation, args.gradient_accumulation_steps
    wrong = {
        f"loss_type={args.loss_type!r}: its loss is no mean over tokens": args.loss_type != "dapo",
        "use_liger_kernel: its fused loss takes one advantage a sequence": args.use_liger_kernel,
        "importance_sampling_level='sequence': its ratios are of sequences": (
            args.importance_sampling_level != "token"
        ),
        f"steps_per_generation={steps} and gradient_accumulation_steps={accumulated}: the weights "
        "of an update are divided by those of the whole generation": steps != accumulated,
        "sync_ref_model: the reference of the energy has to stay frozen": args.sync_ref_model,
        "top_entropy_quantile: it leaves tokens out after they were weighed": (
            args.top_entropy_quantile < 1
        ),
        "delta: it bounds the ratio once more": args.delta is not None,
        "off_policy_mask_threshold: it takes one advantage a sequence": (
            args.off_policy_mask_threshold is not None
        ),
    }
    for reason, refused in wrong.items():
        if refused:
            raise ValueError(f"ActFocus cannot be trained with {reason}")


# ------------------------------------------------------------------- this project's worlds in TRL
def play_in(env: str, policy: Policy, **limits) -> Callable:
    """A `rollout_func`: the prompt of a row is the seed of an episode. policy: around the model
    that TRL trains. Processes draw different random numbers, so equal seeds differ there, too."""

    def rollout_func(prompts: list, trainer: GRPOTrainer) -> dict:
        seeds = [int(messages[-1]["content"]) for messages in prompts]
        number = trainer.state.global_step * trainer.accelerator.num_processes
        number += trainer.accelerator.process_index
        training = policy.model.training
        policy.model.eval()  # TRL's gradient checkpointing has no key-value cache
        rollouts = rollout(
            policy,
            lambda: make_env(env),
            seeds,
            trainer.temperature,
            sampling_seed=number,
            **limits,
        )
        policy.model.train(training)
        out = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
        for row, length in enumerate(rollouts.lengths.tolist()):
            start = int(rollouts.response[row].int().argmax())  # the first token that it sampled
            ids = rollouts.ids[row, :length].tolist()
            out["prompt_ids"].append(ids[:start])
            out["completion_ids"].append(ids[start:])
            out["logprobs"].append(rollouts.old_logprob[row, start:length].tolist())
            out["env_mask"].append(rollouts.response[row, start:length].int().tolist())
        return out | {"earned": rollouts.rewards.tolist()}

    return rollout_func


def earned(completions: list, earned: list[float], **_) -> list[float]:
    """The reward function: what the world paid."""
    return earned


def make_trainer(env: str, folder: str, args: GRPOConfig, trainer=ActFocusTrainer, **limits):
    """A trainer on a world. folder: a checkpoint."""
    policy = load_policy(folder, args.device, args.bf16)
    prompts = [[{"role": "user", "content": str(seed)}] for seed in range(999)]
    return trainer(
        policy.model,
        reward_funcs=earned,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=policy.tokenizer,
        rollout_func=play_in(env, policy, **limits),
    )


def config(**options) -> GRPOConfig:
    """The paper's clip, no KL; group size 8, 64 rollouts an update."""
    usual = {
        "output_dir": "runs/trl", "per_device_train_batch_size": 16, "num_generations": 8,
        "gradient_accumulation_steps": 4, "steps_per_generation": 4, "epsilon": 0.2,
        "epsilon_high": 0.28, "beta": 0.0, "learning_rate": 3e-4, "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": not torch.cuda.is_available(), "bf16": torch.cuda.is_available(),
    }  # fmt: skip
    return GRPOConfig(**usual | options)


def leave(trainer: GRPOTrainer) -> None:
    """End all processes together: one that left early would break the others' exit."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env", default="frozenlake")
    parser.add_argument("--model", help="checkpoint folder or hub id (the world's built-in model)")
    parser.add_argument("--steps", type=int, default=10, help="updates")
    parser.add_argument("--plain", action="store_true", help="TRL's own GRPO, to compare with")
    args = parser.parse_args()
    kind = GRPOTrainer if args.plain else ActFocusTrainer
    folder = args.model or start_folder(args.env)
    trainer = make_trainer(args.env, folder, config(max_steps=args.steps), kind)
    trainer.train()
    leave(trainer)


if __name__ == "__main__":
    main()
