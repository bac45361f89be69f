"""train_grpo.py and train_actfocus.py: the scripts as a user runs them, on tiny settings, and the
parts of the loop."""

import contextlib
import csv
import io
import json
import math
import random
import runpy
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import train_grpo
from actfocus import clipped_loss, group_advantages
from arms import ARMS
from envs import FrozenLake
from fused_loss import policy_loss
from policy import load_policy
from rollout import CannotPlay, rollout, score_all, scored_hidden
from segment import Segment
from studies.diagnose import DiagnoseConfig
from support import side_by_side
from support.config import ActFocusConfig, Config, flags_of, make_parser, parse, read_config
from support.logs import COLUMNS, column, write_samples
from support.warm_start import EVAL_SEEDS
from train_grpo import Batch, Guard, play, run, trained_on, update
from train_ppo import PPOConfig
from worlds import ENVIRONMENTS, make_env

ROOT = Path(__file__).parents[1]
GRPO, FOCUS = ARMS["grpo"], ARMS["actfocus"]
# Episodes end at 680 tokens, after which few of those that are played here would still be won.
SMALL = (
    "--env frozenlake --iterations 2 --prompts 2 --group-size 4 --minibatch 4 --eval-episodes 4 "
    "--eval-every 2 --max-tokens 680 --lr 1e-3"
)
# For what looks at weights and not at episodes: a turn of a tiny model's babble.
BABBLE = "--max-turn-tokens 16 --max-tokens 380"


def run_script(script, model, out, *flags, process=False):
    """A script as a user runs it, in this process, which spares imports and trains the arms one
    after the other, or in one of its own."""
    argv = [script, "--model", str(model), "--out", str(out), "--device", "cpu"]
    argv += [*SMALL.split(), *flags]
    if process:
        command = [sys.executable, *argv]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said, complained, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", argv)
        patch.setattr(side_by_side, "usable_cores", lambda: 1)
        with contextlib.redirect_stderr(complained):
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as error:  # as the interpreter ends a script
                code = error.code if isinstance(error.code, int) else 1
                complained.write(f"{error.code}\n")
    return subprocess.CompletedProcess(argv, code, said.getvalue(), complained.getvalue())


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def both_arms(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    result = run_script("train_actfocus.py", start, out, "--save", process=True)
    assert result.returncode == 0, result.stderr
    return out, result


def test_one_command_trains_both_arms_and_leaves_everything_behind(both_arms):
    out, result = both_arms
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "curves.png",
        "episodes.html",
        "grpo",
        "actfocus",
    }
    of_arm = {
        "config.json",
        "prompts.csv",
        "evaluations.csv",
        "samples.txt",
        "episodes",
        "policy",
    }
    side_by_side = {"curves.png", "episodes.html", "output.txt"}  # on a machine of several cores
    for arm in ("grpo", "actfocus"):
        names = {path.name for path in (out / arm).iterdir()}
        assert names - side_by_side == of_arm | {f"{arm}.csv"}
        settings = json.loads((out / arm / "config.json").read_text())
        assert settings["prompts"] == 2 and settings["arms"] == arm
        assert settings["out"] == str(out / arm)
    assert json.loads((out / "config.json").read_text())["arms"] == "grpo,actfocus"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG") and (
        out / "curves.png"
    ).stat().st_size > 20_000
    for arm in ("grpo", "actfocus"):
        samples = (out / arm / "samples.txt").read_text()
        for title in (f"{arm} after 0", f"{arm} after 2"):
            assert f"===== {title} iterations: " in samples
        assert "<|im_start|>assistant" in samples and "<tool_response>" in samples
    assert result.stdout.count("The loss stays near zero") == 1
    said = result.stdout.splitlines()
    header = said.index(next(line for line in said if line.startswith("arm  ")))
    assert [line.split()[0] for line in said[header + 1 : header + 3]] == ["grpo", "actfocus"]
    at = said.index(next(line for line in said if line.startswith("actfocus minus grpo")))
    paired, training, evaluation, curves, *_ = said[at:]
    assert "in percentage points" in paired
    assert training.startswith("  in training: ") and "over 4 prompts" in training
    assert "too few to tell" in training
    assert evaluation.startswith("  evaluation after 2 iterations: ")
    assert curves.endswith(str(out / "curves.png"))
    for arm in ("grpo", "actfocus"):  # what each evaluation's mean is of
        for row in read(out / arm / f"{arm}.csv"):
            if row["eval_success"]:
                each = [
                    float(one["success"])
                    for one in read(out / arm / "evaluations.csv")
                    if (one["arm"], one["iteration"]) == (arm, row["iteration"])
                ]
                assert sum(each) / len(each) == pytest.approx(float(row["eval_success"]), abs=1e-5)


def test_in_bfloat16_the_ratio_of_a_first_update_is_one(start, tmp_path):
    """A decoding step with a cache rounds otherwise than a whole forward pass: what was sampled is
    scored again, or the first update would see a policy that has moved. Weights stay float32."""
    flags = "--bfloat16 --arms actfocus --save --minibatch 8 --iterations 1 --max-tokens 450"
    result = run_script("train_actfocus.py", start, tmp_path / "run", *flags.split())
    assert result.returncode == 0, result.stderr
    row = read(tmp_path / "run" / "actfocus.csv")[0]
    assert abs(float(row["kl"])) < 1e-7 and float(row["clip_fraction"]) == 0
    assert float(row["grad_norm"]) > 0
    assert load_policy(tmp_path / "run" / "policy").head.dtype == torch.float32


def test_gradient_agreement_is_the_cosine_of_successive_gradients(built_in, played):
    """Mini-batches of the same rollouts twice agree fully; large models leave the column empty."""
    twice = played.take(torch.arange(12).repeat(2))
    advantages = group_advantages(twice.rewards, 4)[:, None].expand(twice.ids.shape)
    optimizer = torch.optim.SGD(built_in.model.parameters(), lr=0.0)
    weights, config = twice.response.float(), Config(minibatch=12, entropy_coef=0.0)

    class Rng:  # every rollout once in the first half, once in the second
        sample = staticmethod(lambda population, k: list(population))

    batch = Batch(twice, advantages, weights, None)
    row = update(built_in, optimizer, batch, config, Rng, Guard("grpo"))
    assert row["gradient_agreement"] == pytest.approx(1.0, abs=1e-4)
    whole = Config(minibatch=24, entropy_coef=0.0)
    row = update(built_in, optimizer, batch, whole, Rng, Guard("grpo"))
    assert "gradient_agreement" not in row


def test_logs_have_their_columns_and_make_sense(both_arms):
    for name in ("grpo", "actfocus"):
        rows = read(both_arms[0] / name / f"{name}.csv")
        assert [row["iteration"] for row in rows] == ["0", "1", "2"] and list(rows[0]) == list(
            COLUMNS
        )
        assert 0 < float(rows[0]["train_success"]) < 1 and float(rows[0]["equal_groups"]) < 1
        for row in rows[:2]:
            absent = {"kl_reference", "value_loss", "explained_variance"}
            absent |= {"final_success", "final_stderr"}
            if row is rows[1]:  # evaluated before and after training
                absent |= {key for key in COLUMNS if key.startswith("eval")}
            values = {key: float(row[key]) for key in COLUMNS if key not in absent}
            assert all(math.isfinite(value) for value in values.values())
            assert (
                0 <= values["train_success"] <= 1
                and 0.1 < values["action_fraction"] < 0.2
                and values["response_tokens"] > 10
            )
            assert (
                0.8 < values["reasoning_accuracy"] <= 1 and 0 <= values["turns_without_facts"] < 0.2
            )
            assert values["train_success"] <= values["train_finished"] <= 1
            assert (
                values["seconds"] > 0
                and values["entropy"] > 0
                and values["kl"] >= 0
                and 0 <= values["clip_fraction"] < 1
            )
        assert rows[2]["seconds"] == "" and rows[2]["eval_success"] != ""
    share = {
        name: column(both_arms[0] / name / f"{name}.csv", "reasoning_weight_share")[1][0]
        for name in ("grpo", "actfocus")
    }
    assert share["actfocus"] < 0.4 < 0.7 < share["grpo"]
    weight = {
        name: column(both_arms[0] / name / f"{name}.csv", "mean_weight")[1][0] for name in share
    }
    assert weight["grpo"] == 1 and 0.15 < weight["actfocus"] < 0.45


def test_both_arms_start_alike_and_part(both_arms):
    grpo, focus = (read(both_arms[0] / name / f"{name}.csv") for name in ("grpo", "actfocus"))
    for key in (
        "train_success",
        "train_reward",
        "eval_success",
        "response_tokens",
        "action_fraction",
    ):
        assert grpo[0][key] == focus[0][key]
    assert grpo[1]["entropy"] != focus[1]["entropy"]


def test_saved_policies_load_again(both_arms, tmp_path):
    """With the weights that they had: the last evaluation is played once more, to the letter."""
    out = both_arms[0] / "actfocus"
    config = read_config(ActFocusConfig, out / "config.json")
    saved = load_policy(out / "policy")
    seeds = range(EVAL_SEEDS, EVAL_SEEDS + config.eval_episodes)
    again = play(saved, config, seeds, config.eval_temperature, sampling_seed=0)
    title = "actfocus after 2 iterations"
    write_samples(tmp_path / "samples.txt", title, saved, again)
    assert (out / "samples.txt").read_text().endswith((tmp_path / "samples.txt").read_text())


def test_alpha_one_beta_zero_is_the_grpo_run_bit_for_bit(both_arms, start, tmp_path):
    focus = run_script(
        "train_actfocus.py",
        start,
        tmp_path / "a",
        "--arms",
        "actfocus",
        "--alpha",
        "1",
        "--beta",
        "0",
        "--save",
    )
    grpo = run_script("train_grpo.py", start, tmp_path / "b", "--save")
    assert focus.returncode == grpo.returncode == 0, focus.stderr + grpo.stderr
    assert (
        not (tmp_path / "a" / "grpo.csv").exists()
        and not (tmp_path / "b" / "actfocus.csv").exists()
    )
    paths = [
        tmp_path / "a" / "actfocus.csv",
        tmp_path / "b" / "grpo.csv",
        both_arms[0] / "grpo" / "grpo.csv",
    ]
    rows = [[dict(row, seconds="", seconds_play="") for row in read(path)] for path in paths]
    assert rows[0] == rows[1] == rows[2]
    weights = [
        (tmp_path / path / "policy" / "model.safetensors").read_bytes() for path in ("a", "b")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--alpha 1.5", "--alpha is 1.5: it must be at least 0 and at most 1"),
        ("--beta -1", "--beta is -1.0"),
        ("--lr nan", "--lr is nan"),
        ("--iterations 0", "--iterations is 0: it must be at least 1"),
        ("--keep-groups 2", "--keep-groups is 2.0"),
        ("--temperature 0", "--temperature is 0.0"),
        ("--env pong", "there is no environment 'pong'"),
        ("--device nonsense", "--device nonsense cannot be used"),
        ("--iterations many", "invalid int value: 'many'"),
        ("--alhpa 1", "unrecognized arguments"),
        ("--arms grpo,pong", "there is no arm 'pong'"),
        ("--arms grpo,grpo", "names an arm twice"),
        ("--arms grpo,ppo", "ppo has a critic, so train it with train_ppo.py"),
        ("--signal noise", "--signal is noise: choose one of energy"),
        # an arm whose name says what it weighs is not made another one under that name
        ("--arms grpo,discount,energy --beta 2", "--beta is 2.0, but the arm discount (discount"),
        ("--arms energy --alpha 0.5", "--alpha is 0.5, but the arm energy (energy alone) has"),
        ("--arms nll --signal energy", "--signal is energy, but the arm nll (with policy NLL)"),
        ("--arms actfocus,placebo --alpha 0", "--alpha is 0.0, but the arm placebo (placebo)"),
        ("--arms blame --beta 1", "the flag is for actfocus and ppo-actfocus"),
        (
            "--group-size 1",
            "--group-size is 1: GRPO compares the rollouts of a prompt and needs at",
        ),
        (
            "--eval-episodes 10 --eval-group-size 4",
            "--eval-episodes is 10: it must be a multiple of",
        ),
        ("--model x --eval-group-size 64", "--eval-episodes is 32: it must be a multiple of"),
        ("--preset fast", "--preset is fast: there is only paper"),
        ("--thoughts 31", "--thoughts is 31: it must be at least 0 and at most 30"),
        (
            "--thoughts 0 --model x",
            "--thoughts is 0: it shapes the built-in model, so leave it out",
        ),
        ("--iter 3", "unrecognized arguments: --iter"),  # no abbreviations
        ("--no-baseline", "unrecognized arguments: --no-baseline"),
        (f"--seed {10**400}", "it must be at least 0 and at most 1e+09"),
        ("--lr inf", "--lr is inf"),
        ("--lr nan", "--lr is nan"),
    ],
)
def test_wrong_flags_are_refused_before_anything_runs(flags, said, capsys):
    with pytest.raises(SystemExit):
        parse(ActFocusConfig, "", flags.split())
    assert said in capsys.readouterr().err


def test_weights_that_are_given_are_those_of_actfocus():
    """Uniform arms stay uniform, and a value that an arm has anyway changes nothing of it."""
    flags = "--arms grpo,ppo,actfocus,ppo-actfocus --beta 2 --alpha 0.3 --signal entropy"
    arms = parse(PPOConfig, "", flags.split()).chosen_arms()
    assert arms["grpo"] == ARMS["grpo"] and arms["ppo"] == ARMS["ppo"]
    for name in ("actfocus", "ppo-actfocus"):
        assert arms[name] == replace(ARMS[name], beta=2.0, alpha=0.3, signal="entropy")
    assert parse(ActFocusConfig, "", ["--beta", "2"]).chosen_arms()["actfocus"].beta == 2
    flags = ["--arms", "discount,actfocus", "--alpha", "0.1"]
    assert parse(ActFocusConfig, "", flags).chosen_arms()["discount"] == ARMS["discount"]


@pytest.mark.parametrize("config_class", [Config, ActFocusConfig, PPOConfig, DiagnoseConfig])
def test_every_flag_is_explained_in_whole_sentences_and_checked(config_class):
    """No flag is forgotten by `validate`: a number far outside any range is refused, and so is one
    that is not finite."""
    flags = [action for action in make_parser(config_class, "")._actions if action.dest != "help"]
    assert [flag.dest for flag in flags] == [each.name for each in fields(config_class)]
    for flag in flags:
        sentence = flag.help.partition(" (default: ")[0]
        assert sentence[0].isupper() and sentence.endswith(".") and " " in sentence, flag.dest
        assert flag.option_strings == ["--" + flag.dest.replace("_", "-")]
        if flag.type in (int, float):
            for value in (-1, math.inf, math.nan):
                config = replace(config_class(device="cpu"), **{flag.dest: value})
                with pytest.raises(ValueError, match=f"{flag.option_strings[0]} is {value}"):
                    config.validate()


def test_help_lists_the_columns_of_the_logs(capsys):
    with pytest.raises(SystemExit):
        parse(Config, "", ["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in COLUMNS)


def test_a_preset_gives_way_to_the_flags_beside_it():
    flags = ["--preset", "paper", "--env", "sokoban", "--lr", "1e-5", "--device", "cpu"]
    config = parse(ActFocusConfig, "", flags)
    assert (config.iterations, config.group_size, config.keep_groups) == (200, 16, 0.25)
    assert config.lr == 1e-5
    critic = parse(PPOConfig, "", ["--preset", "paper", "--device", "cpu"])
    assert (critic.critic_lr, critic.keep_groups, critic.lr) == (1e-5, 0.25, 1e-6)


def test_a_config_can_be_written_as_flags():
    """Of any values; and of an arm whose preset would be another one without the others."""
    flags = "--preset paper --env sokoban --arms grpo,ppo --lr 1e-5 --kl-coef 0.1 --save"
    config = parse(PPOConfig, "", [*flags.split(), "--device", "cpu", "--model=-a name"])
    config.resolve()
    assert parse(PPOConfig, "", flags_of(config)) == config
    alone = replace(config, arms="grpo", out="runs/a b/grpo", lr=1 / 3, env="frozenlake")
    assert parse(PPOConfig, "", flags_of(alone)) == alone and alone.keep_groups == 0.25
    assert parse(PPOConfig, "", ["--preset", "paper", "--arms", "grpo"]).keep_groups == 1


def test_settings_of_an_earlier_version_can_be_read(tmp_path):
    """One that is gone is ignored, one that was not there yet has its default."""
    path = tmp_path / "config.json"
    path.write_text('{"env": "shop", "lr": 0.1, "no_baseline": false}')
    assert read_config(PPOConfig, path) == PPOConfig(env="shop", lr=0.1)


def test_runs_of_the_same_second_get_folders_of_their_own(monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20261126-120000")
    one, other = Config(), Config()
    one.resolve()
    monkeypatch.setattr("os.getpid", lambda: 7)
    other.resolve()
    assert one.out != other.out == "runs/20261126-120000-sudoku-seed0-7"


def test_an_earlier_run_is_never_overwritten(both_arms, start, tiny_folder):
    before = (both_arms[0] / "grpo" / "grpo.csv").read_bytes()
    result = run_script("train_grpo.py", start, both_arms[0])
    assert result.returncode == 2 and "holds an earlier run: choose another folder" in result.stderr
    assert (both_arms[0] / "grpo" / "grpo.csv").read_bytes() == before


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    result = run_script("train_grpo.py", tmp_path / "nowhere", tmp_path / "out")
    assert (
        result.returncode == 1
        and "the run cannot begin" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_room_is_one_sentence(start, tmp_path):
    result = run_script("train_grpo.py", start, tmp_path / "out", "--max-tokens", "100")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "max_tokens is 100, raise it" in result.stderr and not (tmp_path / "out").exists()


def test_a_policy_that_only_babbles_trains_without_a_crash(bytes_folder, both_arms, tmp_path):
    """No action tokens, all rewards equal, every turn malformed and cut. That ActFocus has nothing
    to weigh down is said once, and not of a model that thinks in tags."""
    flags = "--max-turn-tokens 3 --max-tokens 960 --kl-coef 0.01"
    result = run_script("train_actfocus.py", bytes_folder, tmp_path / "out", *flags.split())
    assert result.returncode == 0, result.stderr
    row = read(tmp_path / "out" / "actfocus" / "actfocus.csv")[0]
    assert float(row["action_fraction"]) == 0
    assert float(row["equal_groups"]) == float(row["cut_turns"]) == 1
    assert row["skipped_updates"] == "0"
    assert float(row["train_reward"]) == pytest.approx(-0.2)  # two turns
    assert math.isfinite(float(row["loss"])) and math.isfinite(float(row["kl_reference"]))
    said = "of the generated tokens are reasoning in <think> </think>"
    assert (result.stdout + result.stderr).count(f"note: 0.0% {said}") == 1
    assert said not in both_arms[1].stdout + both_arms[1].stderr


class Uneven(FrozenLake):
    """The lake, with a prompt that is too long for every third seed."""

    def reset(self, seed):
        return super().reset(seed) + " Wait." * 700 * (seed % 3 == 1)


def test_prompts_that_are_too_long_end_no_run(start, tmp_path, monkeypatch, unevaluated):
    """Each rollout is a mini-batch of its own: one of such a prompt would be empty."""
    monkeypatch.setattr(train_grpo, "make_env", lambda name: Uneven())
    flags = ["--prompts", "6", "--group-size", "2", "--minibatch", "1", "--kl-coef", "0.01"]
    argv = ["--model", str(start), "--out", str(tmp_path), *SMALL.split(), *flags]
    run(parse(Config, "", argv), {"grpo": GRPO})
    rows = read(tmp_path / "grpo.csv")
    assert all(math.isfinite(float(row["loss"])) for row in rows[:2])
    prompts = [int(row["prompt"]) for row in read(tmp_path / "prompts.csv")]
    assert 0 < sum(prompt % 3 == 1 for prompt in prompts) < len(prompts)


def test_groups_that_could_not_be_played_are_not_trained_on(built_in):
    config = Config(group_size=2)
    seeds = [1, 1, 2, 2, 3, 3, 4, 4]  # the first and the last group cannot be played
    played = rollout(built_in, Uneven, seeds, max_tokens=680)
    assert torch.equal(trained_on(played, config).ids, played.ids[2:6])
    alike = replace(played, rewards=torch.zeros(8))  # the filter would keep the first of them
    kept = trained_on(alike, replace(config, keep_groups=0.25))
    assert torch.equal(kept.ids, played.ids[2:4])
    assert kept.response.any(dim=1).all()
    with pytest.raises(CannotPlay, match="max_tokens is 4096, raise it"):
        trained_on(played.take(torch.tensor([0, 2])), config)


def test_a_run_from_python_is_checked_as_one_from_the_command_line(start, tmp_path):
    config = Config(model=str(start), out=str(tmp_path / "out"), group_size=1)
    with pytest.raises(ValueError, match="--group-size is 1"):
        run(config, {"grpo": GRPO})
    with pytest.raises(ValueError, match="mine: no such arm; add a line to ARMS"):
        run(replace(config, group_size=2), {"grpo": GRPO, "mine": replace(FOCUS, alpha=0.3)})
    assert not (tmp_path / "out").exists()


def test_group_filter_and_reference_run(start, tmp_path):
    result = run_script(
        "train_actfocus.py", start, tmp_path / "out", "--keep-groups", "0.5", "--micro-tokens", "1",
        "--iterations", "1", "--arms", "actfocus", "--max-tokens", "400",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------- the parts of the loop
@pytest.fixture(scope="module")
def played(built_in):
    """Three groups, each with rollouts that won before they were cut."""
    seeds = [s for s in (15, 18, 30) for _ in range(4)]
    rollouts = rollout(built_in, lambda: make_env("frozenlake"), seeds, max_tokens=680)
    assert (group_advantages(rollouts.rewards, 4) != 0).all()
    return rollouts


def test_score_matches_the_full_logits_of_single_rows(built_in, played):
    everything = score_all(built_in, played, played.response, 0.7, 2000)
    for row, length in enumerate(played.lengths.tolist()):
        ids, response = played.ids[row, :length], played.response[row, 1:length]
        with torch.no_grad():
            logits = built_in.model(ids[None]).logits[0, :-1].double()
        logp = logits.log_softmax(-1)
        exact = (
            (logits / 0.7).log_softmax(-1).gather(1, ids[1:, None]).squeeze(1),
            -logits.logsumexp(-1),
            -(logp.exp() * logp).sum(-1),
        )
        for full, expected in zip(everything, exact, strict=True):
            torch.testing.assert_close(
                full[row, 1:length][response].double(), expected[response], atol=1e-4, rtol=1e-5
            )
            assert (full[row][~played.response[row]] == 0).all()
    action = played.action
    some = score_all(
        built_in, played, action, 0.7, 2000
    )  # as ActFocus reads the reference: the action tokens alone
    torch.testing.assert_close(some.energy, everything.energy * action, atol=1e-4, rtol=1e-5)


def test_micro_batches_hold_every_row_once_within_the_limit(played):
    for limit in (1, 1000, 2000, 10**6):
        batches = played.micro_batches(torch.arange(12), limit)
        assert sorted(torch.cat(batches).tolist()) == list(range(12))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * played.lengths[batch].max() <= limit
    assert (
        len(played.micro_batches(torch.arange(12), 10**6)) == 1
        and len(played.micro_batches(torch.arange(12), 1)) == 12
    )


def gradients(policy, rollouts, focus, **options):
    """Gradient and logged row of one mini-batch step over everything, without changing the
    policy."""
    config = ActFocusConfig(
        **({"minibatch": 100, "entropy_coef": 0.01, "kl_coef": 0.1, "max_grad_norm": 1e9} | options)
    )
    reference_stats = score_all(policy, rollouts, rollouts.response, 1.0, 10**5)
    advantages = group_advantages(rollouts.rewards, 4)[:, None].expand(rollouts.ids.shape)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    caught = []
    optimizer.register_step_pre_hook(
        lambda *_: caught.extend(p.grad.clone() for p in policy.model.parameters())
    )
    weights = focus.weights(rollouts, reference_stats, seed=0)
    batch = Batch(rollouts, advantages, weights, reference_stats)
    row = update(policy, optimizer, batch, config, random.Random(0), Guard("grpo"))
    return caught, row


def test_micro_batching_does_not_change_the_gradient(built_in, played):
    whole, row = gradients(built_in, played, FOCUS, micro_tokens=10**6)
    parts, other = gradients(built_in, played, FOCUS, micro_tokens=1)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    for key in row:
        assert row[key] == pytest.approx(other[key], abs=1e-5), key


def test_recomputing_activations_saves_memory_and_changes_nothing(start, played):
    """The same gradient from far fewer saved bytes; playing, which has a cache, is as it was."""
    policy, found = load_policy(start), []
    for recomputes in (False, True):
        if recomputes:
            policy.recompute()
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden, _ = scored_hidden(policy, played, torch.arange(12), played.response)
        hidden.square().sum().backward()
        found.append((saved, [p.grad.clone() for p in policy.model.parameters()]))
        policy.model.zero_grad()
    (plain, gradient), (less, same) = found
    assert less < 0.2 * plain
    for a, b in zip(gradient, same, strict=True):
        assert torch.equal(a, b)
    again = rollout(policy, lambda: make_env("frozenlake"), [15] * 4, max_tokens=680)
    assert again.rewards.tolist() == played.rewards[:4].tolist()
    assert not any(module.training for module in policy.model.modules())


def test_the_update_follows_the_gradient_of_the_written_formula(built_in, played):
    """A plain full-logits GRPO loss with autograd, against the loop's packed, chunked,
    micro-batched one."""
    caught, row = gradients(
        built_in, played, GRPO, kl_coef=0.0, entropy_coef=0.001, micro_tokens=1500
    )
    logits = built_in.model(played.ids).logits[:, :-1]
    logp, response = logits.log_softmax(-1), played.response[:, 1:]
    logprob = logp.gather(2, played.ids[:, 1:, None]).squeeze(2)
    loss = clipped_loss(
        logprob, played.old_logprob[:, 1:], group_advantages(played.rewards, 4), response.float()
    )
    entropy = -(logp.exp() * logp).sum(-1)[response].mean()
    expected = torch.autograd.grad(loss - 0.001 * entropy, list(built_in.model.parameters()))
    for a, b in zip(caught, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert row["entropy"] == pytest.approx(entropy.item(), abs=1e-4)
    assert row["loss"] == pytest.approx((loss - 0.001 * entropy).item(), abs=1e-5)
    assert (
        row["kl"] == pytest.approx(0, abs=1e-6)
        and row["clip_fraction"] == 0
        and "kl_reference" not in row
    )


def test_the_kl_penalty_pulls_towards_the_reference(built_in, played):
    """With the ratio before it, k1's gradient is the policy's: where log pi > log ref, a token's
    log-prob is pushed down."""
    reference_stats = score_all(built_in, played, played.response, 1.0, 10**5)
    # As if the reference found every token e times less likely.
    shifted = reference_stats._replace(logprob=(reference_stats.logprob - 1.0) * played.response)
    config = Config(minibatch=100, entropy_coef=0.0, kl_coef=1.0)
    optimizer, caught = torch.optim.SGD(built_in.model.parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(
        lambda *_: caught.extend(p.grad.clone() for p in built_in.model.parameters())
    )
    batch = Batch(played, torch.zeros(played.ids.shape), played.response.float(), shifted)
    row = update(built_in, optimizer, batch, config, random.Random(0), Guard("grpo"))
    hidden, targets = scored_hidden(built_in, played, torch.arange(12), played.response)
    logp = (hidden @ built_in.head.T).log_softmax(-1)
    logprob = logp.gather(-1, targets[:, None]).squeeze(-1)
    expected = torch.autograd.grad(
        2 * logprob.mean(), list(built_in.model.parameters())
    )  # d(ratio * k1) = (k1 + 1) d logprob
    scale = caught[0].norm() / expected[0].norm()  # the gradient was clipped to norm 1
    torch.testing.assert_close(caught[0], expected[0] * scale, atol=1e-4, rtol=1e-2)
    assert row["kl_reference"] == pytest.approx(1.0, abs=1e-3) and row["loss"] == pytest.approx(
        1.0, abs=1e-3
    )


def test_a_step_with_a_bad_gradient_is_skipped(built_in, played):
    before = [p.detach().clone() for p in built_in.model.parameters()]
    advantages = torch.full(played.ids.shape, float("nan"))
    optimizer = torch.optim.Adam(built_in.model.parameters(), lr=0.1)
    batch = Batch(played, advantages, played.response.float(), None)
    update(built_in, optimizer, batch, Config(minibatch=6), random.Random(0), Guard("grpo"))
    assert all(torch.equal(a, b) for a, b in zip(before, built_in.model.parameters(), strict=True))


@pytest.fixture
def unevaluated(monkeypatch):
    """Runs of this test play for their updates alone, which takes half of the time."""
    monkeypatch.setattr(train_grpo, "evaluate", lambda *_: {})


def test_arms_differ_in_their_weights_only(start, tmp_path, monkeypatch, unevaluated):
    """The real loop: what reaches the update is the same, but for the weights."""
    given = {}

    def spy(policy, optimizer, batch, config, rng, guard):
        given[len(given)] = batch
        return dict.fromkeys(("loss", "entropy", "kl", "clip_fraction", "grad_norm"), 0.0)

    monkeypatch.setattr(train_grpo, "update", spy)
    flags = ["--model", str(start), "--out", str(tmp_path), *SMALL.split(), "--iterations", "1"]
    config = parse(ActFocusConfig, "", flags)
    run(config, {"grpo": GRPO, "actfocus": replace(FOCUS, alpha=0.2, beta=1.0)})
    (plain, advantages, uniform, none), (rollouts, same, weights, reference_stats) = given.values()
    assert (reference_stats.energy[rollouts.action] != 0).all()
    assert torch.equal(plain.ids, rollouts.ids) and torch.equal(advantages, same) and none is None
    assert torch.equal(uniform, plain.response.float())
    labels = rollouts.labels
    assert (weights[labels == Segment.REASONING] == 0.2).all()
    assert (weights[labels == Segment.FORMAT] == 1).all()
    action = weights[labels == Segment.ACTION]
    assert ((action > 1) & (action < 2)).all() and action.std() > 0
    assert (weights[~rollouts.response] == 0).all()


def test_a_model_that_plays_otherwise_than_it_trains_is_found_out(
    both_arms, start, tmp_path, monkeypatch, unevaluated
):
    """The log-probs noted while sampling are held against those of the first training pass."""
    for name in ("grpo", "actfocus"):
        assert max(column(both_arms[0] / name / f"{name}.csv", "sampling_gap")[1]) < 1e-3

    def play_otherwise(*args, **options):
        rollouts = play(*args, **options)
        rollouts.sampled_logprob = rollouts.sampled_logprob - 0.2
        return rollouts

    monkeypatch.setattr(train_grpo, "play", play_otherwise)
    flags = ["--model", str(start), *SMALL.split(), "--iterations", "1", "--out"]
    with pytest.raises(SystemExit, match="the sampling of the same tokens differ by 0.2 nats"):
        run(parse(Config, "", [*flags, str(tmp_path / "float32")]), {"grpo": GRPO})
    # In bfloat16, rounding alone makes some hundredths of a nat: 0.2 is let pass. A low temperature
    # divides the logits, and so enlarges what rounding does to them.
    gaps = torch.full((100,), 0.2)
    train_grpo.check_sampling_gaps(gaps, bfloat16=False, temperature=0.2)
    with pytest.raises(SystemExit, match="rounding makes less than 0.1"):
        train_grpo.check_sampling_gaps(gaps, bfloat16=False, temperature=0.5)
    run(parse(Config, "", [*flags, str(tmp_path / "bfloat16"), "--bfloat16"]), {"grpo": GRPO})


def test_the_fused_loss_trains_as_the_plain_one(start, tmp_path, monkeypatch, unevaluated):
    """A fixed-seed run gives the same CSV within float tolerance, whether the loss is fused or
    written out."""

    logs = []
    for folder in ("fused", "plain"):
        config = parse(
            ActFocusConfig,
            "",
            [
                "--model",
                str(start),
                "--out",
                str(tmp_path / folder),
                *SMALL.split(),
                "--kl-coef",
                "0.01",
            ],
        )
        run(config, {"actfocus": FOCUS})
        logs.append(read(tmp_path / folder / "actfocus.csv"))
        monkeypatch.setattr("train_grpo.fused_policy_loss", policy_loss)
    for one, other in zip(*logs, strict=True):
        for name in one:
            if one[name] and not name.startswith("seconds"):
                assert float(one[name]) == pytest.approx(
                    float(other[name]), rel=1e-3, abs=1e-4, nan_ok=True
                ), name


def test_the_start_is_kept_on_the_cpu_and_given_back_to_each_arm(
    tiny_folder, tmp_path, monkeypatch
):
    seen = []

    def spy(policy, optimizer, *_):
        seen.append([p.detach().clone() for p in policy.model.parameters()])
        with torch.no_grad():
            for p in policy.model.parameters():
                p.add_(1.0)

        return dict.fromkeys(("loss", "entropy", "kl", "clip_fraction", "grad_norm"), 0.0)

    monkeypatch.setattr(train_grpo, "update", spy)
    flags = f"--model {tiny_folder} --out {tmp_path} {SMALL} --iterations 1 {BABBLE}"
    config = parse(ActFocusConfig, "", flags.split())
    run(config, {"grpo": GRPO, "actfocus": FOCUS})
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_the_paper_has_its_settings_for_each_world():
    """method.md, "Defaults of the paper's runs"; a flag that is given counts."""
    for flags, wanted in {
        "--env frozenlake": (200, 8, 16, 1.0, 3600, 0.0),
        "--env sokoban": (200, 8, 16, 0.25, 3600, 0.0),
        "--env sudoku --iterations 3": (3, 8, 16, 0.25, 3600, 0.0),
        "--env shop": (100, 16, 8, 1.0, 8192, 0.001),
    }.items():
        config = parse(ActFocusConfig, "", ["--preset", "paper", *flags.split()])
        assert (
            config.iterations, config.prompts, config.group_size, config.keep_groups,
            config.max_tokens, config.kl_coef,
        ) == wanted  # fmt: skip
        assert (config.lr, config.minibatch, config.max_turn_tokens) == (1e-6, 32, 400)
        assert (config.eval_every, config.eval_episodes, config.eval_group_size) == (10, 512, 16)
        assert (config.clip_low, config.clip_high, config.entropy_coef) == (0.2, 0.28, 0.001)
    for flags, wanted in {
        "--env frozenlake": (0.25, 0.0),
        "--env frozenlake-planned": (0.25, 0.0),
        "--env shop": (1.0, 0.0),
        "--arms grpo,actfocus": (1.0, 0.0),  # no critic, though this script could train one
        "--arms grpo,actfocus --env shop": (1.0, 0.001),
        "--arms grpo,ppo": (0.25, 0.0),
    }.items():
        config = parse(PPOConfig, "", ["--preset", "paper", *flags.split()])
        assert (config.keep_groups, config.kl_coef) == wanted
    flags = ["--preset", "paper", "--env", "frozenlake"]
    assert parse(Config, "", flags).keep_groups == 1.0  # train_grpo.py


def test_what_was_not_given_is_filled_in_one_place():
    for config, lr, episodes in (
        (Config(), 3e-4, 128),
        (Config(env="shop"), 1e-4, 128),
        (Config(model="x"), 1e-6, 32),
        (Config(model="x", lr=0.5, eval_episodes=7), 0.5, 7),
    ):
        config.resolve()
        assert (config.lr, config.eval_episodes) == (lr, episodes)
        assert config.out.startswith("runs/")
    for env in ENVIRONMENTS:  # as many thoughts as the world's own is the same as none given
        own = make_env(env).thoughts
        for thoughts, wanted in ((own, None), (own + 1, own + 1), (0, 0)):
            config = Config(env=env, thoughts=thoughts)
            config.resolve()
            assert config.thoughts == wanted
    given = Config(out="here", lr=0.0)
    given.resolve()
    assert given.out == "here" and given.lr == 0.0


def test_help_explains_every_flag_and_column(capsys):
    with pytest.raises(SystemExit):
        parse(ActFocusConfig, "What it does.", ["--help"])
    shown = capsys.readouterr().out
    for name in COLUMNS:
        assert f"  {name} " in shown
    for flag in ("--keep-groups", "--alpha", "--lr", "--model"):
        assert flag in shown
    assert "(default: 0.28)" in shown and "None" not in shown
