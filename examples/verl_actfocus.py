"""ActFocus in verl: the weights as a function of verl's own tensors, and a trainer that applies
them. The function `weigh` needs torch alone; the trainer needs `pip install verl==0.9.0`.

    from examples import verl_actfocus    # in the script that starts verl's processes
    verl_actfocus.register()              # then choose the trainer "actfocus_sync"

Start that script from the root of the project with `python -m`, so that `examples` is found.

verl's advantages are per token, and with `loss_agg_mode="token-mean"` its loss is a mean over the
tokens of a mini-batch. Weights are never negative, so they can be multiplied into the advantages.

This was checked on a CPU: loss and gradient through the `compute_policy_loss_vanilla` of the
installed verl equal `clipped_loss` with `actfocus_weights` (tests/test_examples.py). The trainer
itself was not run here, because it needs vLLM or SGLang and Ray on GPUs.

- Set `clip_ratio_low=0.2`, `clip_ratio_high=0.28`, and `clip_ratio_c` high (1e9). verl's dual clip
  bounds what a negative advantage costs, at 3 by default, and the paper's loss does not. `refuse`
  raises for this setting, and for others that would silently make it another loss.
- The weights are divided by those of the batch that `weigh` sees. The paper divides by those of the
  mini-batch, which is the same if the batch is one mini-batch. Otherwise the step of an update is
  off by the ratio between the two mean weights.
- verl's reference worker returns log-probs and no energies. With a worker that also writes
  `ref_energy` (minus the logsumexp of the raw logits, (bs, response length)), the trainer below is
  the paper's. Without one it warns and uses the log-prob shift, another signal that the paper
  tried. The shift is zero before the first update, so at first the discount acts alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from actfocus import actfocus_weights, reweight_advantages
from segment import Segment, segment_batch


def weigh(
    responses: Tensor,
    response_mask: Tensor,
    advantages: Tensor,
    signal: Tensor,
    bytes_of: Sequence[bytes],
    alpha: float = 0.1,
    beta: float = 0.5,
    opening: bytes = b"",
) -> Tensor:
    """A * w * N / sum(w), (bs, L): advantages to train on with `loss_agg_mode="token-mean"`.

    responses: (bs, L) ids; response_mask: (bs, L), 1 where the model sampled, 0 at tool responses
    and padding; advantages, signal: (bs, L) float. bytes_of: `segment.token_bytes(tokenizer)`.
    opening: what the chat template opens a turn with.
    """
    response = response_mask.bool()
    labels = segment_batch(responses, response, bytes_of, opening)
    reasoning, action = labels == Segment.REASONING, labels == Segment.ACTION
    weights = actfocus_weights(signal, reasoning, action, response, alpha, beta)
    return reweight_advantages(advantages, weights, response)


def refuse(config) -> None:
    """Raise ValueError, naming the setting, for what would silently train with another loss.
    config: verl's, as its trainers get it."""
    actor = config["actor_rollout_ref"]["actor"]
    loss_mode, averaged = actor["policy_loss"]["loss_mode"], actor["loss_agg_mode"]
    dual_clip = actor["clip_ratio_c"]
    rejection = (config["algorithm"].get("rollout_correction") or {}).get("rollout_rs")
    wrong = {
        f"policy_loss.loss_mode={loss_mode}: set it to vanilla": loss_mode != "vanilla",
        f"loss_agg_mode={averaged}: set it to token-mean": averaged != "token-mean",
        f"clip_ratio_c={dual_clip}: its dual clip is not the paper's, set it to 1e9": (
            dual_clip < 1e6
        ),
        f"rollout_correction.rollout_rs={rejection}: a call with a token taken out of it is not "
        "found, set it to null": rejection is not None,
    }
    for reason, refused in wrong.items():
        if refused:
            raise ValueError(f"ActFocus cannot be trained with {reason}")


def register(opening: bytes = b"") -> None:
    """Make the trainer known to verl as "actfocus_sync".

    opening: as in `weigh`. A template that begins turns with "<think>\\n" needs b"<think>\\n" here;
    without it no thought is found, and so none is weighed as reasoning.
    """
    import transfer_queue as tq
    from tensordict import TensorDict
    from verl.trainer.ppo.v1.trainer_base import get_trainer_cls, register_trainer
    from verl.workers.utils.padding import response_to_nested

    from segment import token_bytes

    @register_trainer("actfocus_sync")
    class ActFocusTrainer(get_trainer_cls("sync")):
        def __init__(self, config):
            refuse(config)
            super().__init__(config)
            self.bytes_of = None  # of the tokenizer, which comes later

        def _compute_advantage(self, batch, metrics):
            batch = super()._compute_advantage(batch, metrics)
            where = {"keys": batch.keys, "partition_id": batch.partition_id}
            fields = ["responses", "response_mask", "advantages", "old_log_probs", "ref_log_prob"]
            data = tq.kv_batch_get(**where, select_fields=[*fields, "ref_energy"])
            nested_mask, data = data["response_mask"], data.to_padded_tensor()
            if "ref_energy" in data:
                signal = data["ref_energy"]
            elif "ref_log_prob" in data:
                warnings.warn(
                    "no ref_energy: the log-prob shift takes the energy's place", stacklevel=2
                )
                signal = data["old_log_probs"] - data["ref_log_prob"]
            else:
                raise ValueError(
                    "no reference to take a signal from: set actor.use_kl_loss=True, kl_loss_coef=0"
                )
            self.bytes_of = self.bytes_of or token_bytes(self.tokenizer)
            advantages = weigh(
                data["responses"],
                data["response_mask"],
                data["advantages"],
                signal,
                self.bytes_of,
                opening=opening,
            )
            nested = {"advantages": response_to_nested(advantages, nested_mask)}
            return tq.kv_batch_put(**where, fields=TensorDict(nested, batch_size=len(batch)))
