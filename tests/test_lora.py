"""support/lora.py: adapters are trained, and the model beneath them is the reference.

They need peft, and are skipped where it is not installed.
"""

import csv
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import DEVICES
from test_train import run_script

import fused_loss
import train_grpo
from arms import ARMS
from fused_loss import fused_policy_loss
from policy import load_policy
from rollout import repeated, rollout, score_all, scored_hidden
from support.checkpoint import Checkpoints
from support.config import ActFocusConfig, parse
from support.logs import appended_files
from support.processes import Interruption
from worlds import make_env

pytest.importorskip("peft")
from support.lora import add_adapters, is_adapter, load_with_adapters  # noqa: E402

ROOT = Path(__file__).parents[1]


def config_of(**changes):
    """Settings of a small run in FrozenLake with adapters of rank 4."""
    settings = {
        "env": "frozenlake", "lora": 4, "iterations": 2, "prompts": 1, "group_size": 4,
        "minibatch": 2, "eval_episodes": 1, "checkpoint_every": 1, "device": "cpu", "lr": 1e-2,
        "max_turn_tokens": 12, "max_tokens": 460,
    }  # fmt: skip
    config = ActFocusConfig(**settings | changes)
    config.validate()
    config.resolve()
    return config


@pytest.fixture(scope="module")
def played(built_in):
    """Rollouts of the built-in model: two groups of two."""
    seeds = repeated([11, 12], times=2)
    return rollout(built_in, lambda: make_env("frozenlake"), seeds, max_tokens=900)


def randomise(policy, scale=0.05):
    """Give every weight of the adapters a value, as if they had been trained."""
    rng = torch.Generator().manual_seed(0)
    drawn = {
        name: scale * torch.randn(value.shape, generator=rng)
        for name, value in policy.state_dict().items()
    }
    policy.load_state_dict(drawn)


def loss_of(policy, rollouts):
    """The loss of a mini-batch of all rollouts, with advantages that are drawn."""
    hidden, targets = scored_hidden(
        policy, rollouts, torch.arange(len(rollouts.ids)), rollouts.response
    )
    rng = torch.Generator().manual_seed(0)
    advantages = torch.randn(len(targets), generator=rng).to(hidden.device)
    old_logprob = rollouts.old_logprob[rollouts.response]
    with policy.autocast():
        return fused_policy_loss(
            hidden, policy.head, targets, old_logprob, advantages, torch.ones_like(advantages)
        ).loss


# ------------------------------------------------------------------------- how training begins
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_policy_begins_as_the_reference(bfloat16, device, start, played):
    """Bit for bit, and both as the model without adapters, whose weights are rounded as theirs."""
    policy = load_with_adapters(start, config_of(bfloat16=bfloat16, device=device))
    plain = load_policy(start, device, bfloat16, next(policy.model.parameters()).dtype)
    for field in ("ids", "labels", "lengths"):
        setattr(played, field, getattr(played, field).to(device))
    found = [
        score_all(each, played, played.response, temperature=1.0, micro_tokens=4096)
        for each in (policy, policy.frozen_copy(), plain)
    ]
    for stats in found[1:]:
        for ours, its in zip(found[0], stats, strict=True):
            assert torch.equal(ours, its)
    for name, weight in policy.model.named_parameters():
        rounded = policy.bfloat16 and not is_adapter(name)
        assert weight.dtype == (torch.bfloat16 if rounded else torch.float32)


def test_the_reference_stays_and_holds_no_weights_of_its_own(start, played):
    policy = load_with_adapters(start, config_of())
    reference = policy.frozen_copy()
    assert reference.model is policy.model

    def score(each):
        return score_all(each, played, played.response, temperature=1.0, micro_tokens=4096).logprob

    before = score(policy)
    randomise(policy)
    assert torch.equal(score(reference), before)
    assert not torch.allclose(score(policy), before, atol=0.1)
    assert all(weight.requires_grad for weight in adapters_of(policy))  # on again


def adapters_of(policy):
    return [p for name, p in policy.model.named_parameters() if is_adapter(name)]


def test_the_seed_decides_what_the_adapters_begin_with(start):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (
        load_with_adapters(start, config_of(seed=seed)).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)  # and they draw from no one else's numbers
    for name, value in first.items():
        assert torch.equal(value, same[name])
        assert ("lora_B" in name) == torch.equal(value, other[name])  # B begins at 0
        assert ("lora_B" in name) == (not value.any())


def test_the_first_iteration_weighs_as_without_adapters(start, tmp_path, monkeypatch):
    """ActFocus's rollouts, advantages and weights are those of the run that trains all weights."""

    class Seen(Exception):
        pass

    def see(policy, optimizer, batch, *others):
        raise Seen(batch.rollouts.ids, batch.advantages, batch.weights)

    monkeypatch.setattr(train_grpo, "update", see)
    found = []
    for rank in (None, 4):
        config = config_of(
            lora=rank, model=str(start), out=str(tmp_path / f"{rank}"),
            max_turn_tokens=160, max_tokens=600,
        )  # fmt: skip
        with pytest.raises(Seen) as seen:
            train(config, "actfocus")
        found.append(seen.value.args)
    for plain, adapted in zip(*found, strict=True):
        assert torch.equal(plain, adapted)
    assert found[0][2].unique().numel() > 3


# ------------------------------------------------------------------------------ what is trained
def test_gradients_reach_every_adapter_and_nothing_else(start, played, monkeypatch):
    """In the first step only B has one, since what reaches A comes through B, which is 0."""
    monkeypatch.setattr(fused_loss, "add_matmul", lambda *_: pytest.fail("a gradient of the head"))
    policy = load_with_adapters(start, config_of())
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=1e-2)
    for step in range(2):
        loss_of(policy, played).backward()
        for name, weight in policy.model.named_parameters():
            if is_adapter(name):
                assert bool(weight.grad.any()) == (step == 1 or "lora_B" in name)
            else:
                assert weight.grad is None
        optimizer.step()
        optimizer.zero_grad()


def test_gradient_checkpointing_changes_no_gradient(start, played):
    found = []
    for recomputes in (False, True):
        policy = load_with_adapters(start, config_of())
        randomise(policy)
        if recomputes:
            policy.recompute()
        loss_of(policy, played).backward()
        found.append([weight.grad for weight in adapters_of(policy)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.any()


def test_peft_chooses_the_layers_and_all_of_them_in_a_model_that_it_does_not_know():
    small = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    queries_and_values = {"q_proj", "v_proj"}
    every_layer = queries_and_values | {"k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    expected = {"Qwen2": queries_and_values, "Llama": queries_and_values, "Olmo2": every_layer}
    for family, layers in expected.items():
        config = getattr(transformers, f"{family}Config")(**small)
        model = transformers.AutoModelForCausalLM.from_config(config)
        add_adapters(model, rank=2)
        found = {re.sub(r".*\.(\w+)\.lora_.*", r"\1", name) for name in model.state_dict()}
        assert found & {*every_layer, "lm_head"} == layers, family


# ------------------------------------------------------------------------------- what is kept
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_saved_folder_plays_as_the_adapted_model(bfloat16, start, played, tmp_path):
    policy = load_with_adapters(start, config_of(bfloat16=bfloat16))
    randomise(policy)
    policy.save(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert opened.dtype == torch.float32
    untouched = transformers.AutoModelForCausalLM.from_pretrained(start)
    assert opened.state_dict().keys() == untouched.state_dict().keys()
    merged = load_policy(tmp_path / "merged")
    policy.model.float()  # the merged folder is not rounded
    policy.bfloat16 = False
    with torch.no_grad():
        ours, its = (each.hidden(played.ids) @ each.head.T for each in (policy, merged))
        plain = untouched(played.ids).logits
    assert (its - ours).abs().max() < 1e-5 * ours.abs().max()
    assert not torch.allclose(ours, plain, atol=0.1)
    assert torch.equal(ours.argmax(-1), its.argmax(-1))
    greedy = [
        rollout(each, lambda: make_env("frozenlake"), [3, 4], temperature=1e-3, max_tokens=700).ids
        for each in (policy, merged)
    ]
    assert torch.equal(*greedy)


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def train(config, name):
    """One arm as train_grpo.py trains it, with a policy that is loaded anew. Returns the policy and
    the checkpoints."""
    Path(config.out).mkdir(exist_ok=True)
    model = config.model
    policy = load_with_adapters(model, config) if config.lora else load_policy(model)
    start = train_grpo.copy_of_weights(policy)
    out = Path(config.out)
    checkpoints = Checkpoints(out, out, config.checkpoint_every, {}, appended_files, Interruption())
    if config.resume:
        checkpoints.load_latest()
    train_grpo.train(policy, start, config, name, ARMS[name], checkpoints)
    return policy, checkpoints


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_folder, tmp_path, monkeypatch):
    """Its checkpoints hold the adapters and their optimizer, and not the model."""

    def left_behind(config, policy):
        policy.save(Path(config.out) / "policy")
        with (Path(config.out) / "actfocus.csv").open(newline="") as file:
            rows = [dict(row, seconds="", seconds_play="") for row in csv.DictReader(file)]
        return rows, (Path(config.out) / "policy" / "model.safetensors").read_bytes()

    whole = config_of(model=str(tiny_folder), out=str(tmp_path / "whole"), iterations=3)
    expected = left_behind(whole, train(whole, "actfocus")[0])

    killed = config_of(model=str(tiny_folder), out=str(tmp_path / "killed"), iterations=3)
    calls, update = [], train_grpo.update

    def die(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return update(*args)

    monkeypatch.setattr(train_grpo, "update", die)
    with pytest.raises(Killed):
        train(killed, "actfocus")
    killed.resume = killed.out
    policy, checkpoints = train(killed, "actfocus")
    assert left_behind(killed, policy) == expected
    saved = torch.load(checkpoints.newest_undamaged(), weights_only=True)["stateful"]
    assert saved["policy"].keys() == policy.state_dict().keys()
    assert all(is_adapter(name) for name in saved["policy"])
    assert len(saved["optimizer"]["state"]) == len(saved["policy"])


def test_a_run_goes_on_only_with_the_frozen_weights_that_it_had(start):
    origins = []
    for scale in (1.0, 1.0, 1.01):
        policy = load_with_adapters(start, config_of())
        policy.head.data.mul_(scale)
        origins.append(train_grpo.origin_of(config_of(), policy.model.state_dict(), [1]))
    assert origins[0] == origins[1] != origins[2]


def test_both_arms_train_and_are_saved(tiny_folder, tmp_path):
    """In bfloat16, with every option that has to do with the model."""
    flags = "--lora 4 --bfloat16 --gradient-checkpointing --kl-coef 0.01 --save --lr 1e-2"
    short = "--iterations 1 --eval-episodes 2 --max-turn-tokens 12 --max-tokens 460"
    out = tmp_path / "run"
    result = run_script("train_actfocus.py", tiny_folder, out, *flags.split(), *short.split())
    assert result.returncode == 0, result.stderr
    saved = sorted(out.rglob("model.safetensors"))
    assert len(saved) == 2
    before = load_policy(tiny_folder).model.state_dict()
    for path in saved:
        after = load_policy(path.parent).model.state_dict()
        changed = {name for name in before if not same(before[name], after[name])}
        assert changed
        assert all("q_proj.weight" in name or "v_proj.weight" in name for name in changed)


def same(weight, saved):
    """Is a weight as it was, but that it has been rounded to bfloat16?"""
    return torch.equal(weight.to(torch.bfloat16).float(), saved)


# ---------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--lora 0", "--lora is 0: it must be at least 1"),
        ("--lora 4 --lora-alpha 0", "--lora-alpha is 0.0: it must be"),
        ("--lora-alpha 8", "--lora-alpha is 8.0: it is for adapters, so give --lora with it"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        parse(ActFocusConfig, "", [*flags.split(), "--device", "cpu"])
    assert sentence in capsys.readouterr().err


def test_a_critic_is_refused(start, tmp_path):
    result = run_script("train_ppo.py", start, tmp_path / "run", "--lora", "4")
    assert result.returncode == 2
    assert "--lora is 4: the arm ppo has a critic" in result.stderr


def test_the_learning_rate_is_that_of_adapters():
    """As far as it is not given; the paper's is of all weights."""
    expected = {"": 1e-2, "--model FOLDER": 1e-5, "--lr 0.5": 0.5, "--model F --preset paper": 1e-5}
    for flags, rate in expected.items():
        config = parse(ActFocusConfig, "", [*flags.split(), "--lora", "4", "--device", "cpu"])
        config.resolve()
        assert (config.lr, config.lora_alpha) == (rate, 32)


def test_without_peft_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("support.config.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse(ActFocusConfig, "", ["--lora", "16", "--device", "cpu"])
    assert "--lora is 16: it needs peft, which is not installed" in capsys.readouterr().err


def test_only_one_file_imports_peft_and_only_when_it_is_needed():
    imports = re.compile(r"^( *)(?:import|from) peft\b", re.MULTILINE)
    found = {
        str(path.relative_to(ROOT)): imports.findall(path.read_text())
        for path in ROOT.rglob("*.py")
        if path.parts[len(ROOT.parts)] not in ("tests", ".venv")
    }
    found = {name: indents for name, indents in found.items() if indents}
    assert found.keys() == {"support/lora.py"}
    assert all(found["support/lora.py"])  # indented: within a function
