"""The Action Bottleneck, measured without training: which tokens teach, and does energy tell?

    python -m studies.diagnose --env sokoban         # the built-in model plays itself
    python -m studies.diagnose --env sokoban --checkpoint runs/mine/actfocus   # a trained one
    python -m studies.diagnose --env sokoban --turns 1   # within one state, see below

A group is the rollouts of one prompt. GRPO learns from a prompt only if its rollouts end
differently, so the variance of a group's rewards is what there is to learn from it. The paper finds
(Figures 1 and 2) that the reference's mean energy over a group's action tokens goes along with that
variance, and that its mean energy over the reasoning tokens does not.

Later turns of a group are in different states, and how many turns there are depends on how well the
rollouts do. A mean over all turns therefore also tells how long a group's episodes are. With
--turns 1 whole episodes are played, and the variance is that of their rewards, but signals are
averaged over the first turn alone, in which all rollouts of a group are in the same state. Beside
each correlation stand two partial ones: given the group's success, and given its number of turns.

A diagnosis plays some groups, batch by batch, and leaves in its folder:

    signal.csv, signal.png      how much signal and how much noise the policy gradient of the first
                                prompts has, by kind of token and by weighting (gradient_signal.py)
    tokens.html, tokens.png     some episodes, each sampled token coloured by its ActFocus weight
    groups.csv                  a row for each group: how it ended, and the means of four signals
                                over four choices of its tokens
    correlations.csv            a row for each signal and choice of tokens: its rank correlation
                                with the reward variance, a bootstrap interval, a permutation p,
                                and the two partial correlations
    bottleneck.png              the picture of these two tables
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor
from tqdm import tqdm

from actfocus import actfocus_weights
from arms import SIGNALS, token_signals, turn_numbers
from energy import TokenStats
from model_checks import check_length
from policy import Policy, load_policy
from rollout import Rollouts, repeated
from studies.gradient_signal import (
    PROMPTS_PER_BLOCK,
    Block,
    block_size,
    draw_signal,
    measure_blocks,
    signal_rows,
)
from studies.gradient_signal import summary as signal_summary
from support import memory
from support.config import (
    DEVICE,
    Config,
    check_device,
    check_range,
    flag,
    new_folder,
    parse,
    same_flag,
)
from support.logs import log_files, write_rows
from support.transcripts import draw_transcripts
from support.warm_start import start_folder
from train_grpo import play, score
from worlds import make_env
from worlds.imported import world_name

DIAGNOSE_SEEDS = 3_000_000_000  # and on: seeds that nothing else draws
TOKENS = {  # choices of tokens: label, color
    "action": ("action tokens", "tab:red"),
    "decision": ("most uncertain action\ntoken of each turn", "tab:orange"),
    "reasoning": ("reasoning tokens", "tab:blue"),
    "all": ("all tokens", "tab:gray"),
}


@dataclass
class DiagnoseConfig:
    """The settings of a diagnosis, each of which is a flag."""

    env: str = same_flag(Config, "env", "frozenlake")
    model: str | None = flag(
        None,
        "The reference, as a folder or a Hugging Face id. Without this flag it is the built-in "
        "model of the world.",
    )
    checkpoint: str | None = flag(
        None,
        "The folder of a trained policy that plays. Without this flag the reference plays itself.",
    )
    skill: float | None = flag(
        None,
        "How often the demonstrator of the built-in model picks a best move; other values than the "
        "default need a new warm start.",
    )
    thoughts: int | None = flag(
        None,
        "How many filler sentences each demonstrated thought of the built-in model contains; other "
        "values than the default need a new warm start.",
    )
    warm_start_seed: int | None = flag(
        None, "The seed of the warm start. Another seed makes another built-in model."
    )
    groups: int = flag(128, "How many prompts are played: each of them gives a group.")
    blocks: int = flag(
        12,
        "How many blocks of two prompts have their gradients compared. With 0, gradients are not "
        "measured.",
    )
    group_size: int = flag(16, "How many rollouts of each prompt are played.")
    turns: int | None = flag(
        None,
        "How many of an episode's first turns the signals are averaged over. With 1, all rollouts "
        "of a group are in the same state. Without this flag they are averaged over all turns.",
    )
    temperature: float = flag(1.0, "The temperature at which rollouts are sampled.")
    alpha: float = flag(0.1, "The weight of a reasoning token in the pictures of tokens.")
    beta: float = flag(0.5, "How much more an uncertain action token weighs in these pictures.")
    play_batch: int = same_flag(Config, "play_batch", 256)
    micro_tokens: int = flag(
        8192, "How many tokens one forward pass may hold, padding included. Fewer need less memory."
    )
    max_turn_tokens: int = same_flag(Config, "max_turn_tokens", 160)
    max_tokens: int = same_flag(Config, "max_tokens", 4096)
    seed: int = flag(0, "The seed of sampling.")
    device: str = flag(DEVICE, "The torch device to compute on.")
    bfloat16: bool = flag(False, "Compute in bfloat16 on a CPU as well.")
    out: str | None = same_flag(Config, "out", None)

    def shaping(self) -> dict:
        """What was asked of the built-in model, by fields of `WarmStart`."""
        asked = {"skill": self.skill, "thoughts": self.thoughts, "seed": self.warm_start_seed}
        return {name: value for name, value in asked.items() if value is not None}

    def validate(self) -> None:
        """Raise ValueError for settings that cannot run, or would not do what was asked."""
        check_range(self, 1, math.inf, "play_batch", "micro_tokens", "max_turn_tokens")
        check_range(self, 1, math.inf, "max_tokens", "turns")
        check_range(self, 0, math.inf, "warm_start_seed", "beta", "seed")
        check_range(self, 0, 1, "skill", "alpha")
        check_range(self, 0, 30, "thoughts")
        check_range(self, 8, math.inf, "groups")
        check_range(self, 0, 64, "blocks")
        check_range(self, 2, math.inf, "group_size")
        check_range(self, 0.01, math.inf, "temperature")
        check_device(self.device)
        make_env(self.env)  # raises ValueError for a world that there is not
        if 0 < self.blocks < 4:
            raise ValueError(f"--blocks is {self.blocks}: it must be 0, or at least 4")
        for name in self.shaping() if self.model else ():
            given = "--warm-start-seed" if name == "seed" else f"--{name}"
            raise ValueError(f"{given} shapes the built-in model: leave it out, or --model")
        if self.out and log_files(Path(self.out)):
            raise ValueError(f"--out {self.out} holds a training run: choose another folder")


class Batch(NamedTuple):
    """Whole groups that were played, and what the two policies say of their tokens."""

    prompts: range  # seeds, one for each group
    rollouts: Rollouts
    reference_stats: TokenStats  # (B, T) each, of the reference
    player: TokenStats  # (B, T) each, of the policy that played


def diagnose(config: DiagnoseConfig) -> None:
    """Play the groups, measure each, correlate, draw."""
    advice = "lower --micro-tokens or --play-batch"
    with memory.explain_out_of_memory(config.device, advice):
        reference, policy = load_policies(config)
        out = make_folder(config)
        blocks_wanted = min(config.blocks, config.groups // PROMPTS_PER_BLOCK)
        groups, blocks = [], []
        batches = split_prompts(config)
        for prompts in tqdm(batches, desc="groups", unit="batch", dynamic_ncols=True):
            batch = play_and_score(reference, policy, prompts, config)
            if len(blocks) < blocks_wanted:
                missing = blocks_wanted - len(blocks)
                blocks += measure_blocks(
                    policy, batch.rollouts, batch.reference_stats, batch.player, config, missing
                )
                if len(blocks) == blocks_wanted:
                    report_signal(out, blocks, config)
            if prompts == batches[0]:
                draw_weights(out, policy, batch, config)
            groups += measure_groups(batch, config.group_size, config.turns)
            write_rows(out / "groups.csv", groups)  # an interrupted diagnosis keeps what it played
        report_groups(out, groups, config)


def make_folder(config: DiagnoseConfig) -> Path:
    """The folder of the results, with the settings in it."""
    out = Path(config.out or new_folder(f"{world_name(config.env)}-diagnosis"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    return out


def split_prompts(config: DiagnoseConfig) -> list[range]:
    """The seeds of the prompts, in batches of whole blocks that are played at once."""
    seeds = range(DIAGNOSE_SEEDS, DIAGNOSE_SEEDS + config.groups)
    blocks_at_once = max(1, config.play_batch // block_size(config))
    at_once = PROMPTS_PER_BLOCK * blocks_at_once
    return [seeds[i : i + at_once] for i in range(0, len(seeds), at_once)]


def play_and_score(
    reference: Policy, policy: Policy, prompts: range, config: DiagnoseConfig
) -> Batch:
    """Play a group of each prompt, and read every sampled token with both policies."""
    seeds = repeated(prompts, config.group_size)
    rollouts = play(policy, config, seeds, config.temperature, config.seed)
    reference_stats = score(reference, rollouts, rollouts.response, config)
    # The rollouts have the player's log-probs already, noted while sampling. But a decoding step
    # with a cache rounds otherwise than a full forward pass, and rounding can correlate. So both
    # policies are asked in the same way: the shift of a policy from itself is exactly 0.
    player = reference_stats
    if policy is not reference:
        player = score(policy, rollouts, rollouts.response, config)
    return Batch(prompts, rollouts, reference_stats, player)


def report_signal(out: Path, blocks: list[Block], config: DiagnoseConfig) -> None:
    """Table and picture of what the gradients show, as soon as it is known."""
    size = block_size(config)
    rows = signal_rows(blocks, size)
    write_rows(out / "signal.csv", rows)
    world = world_name(config.env)
    title = (
        f"{world}: signal and noise of the policy gradient, {len(blocks)} blocks of "
        f"{PROMPTS_PER_BLOCK} prompts x {config.group_size} rollouts; 95 % jackknife intervals"
    )
    draw_signal(out / "signal.png", rows, size, title)
    tqdm.write(f"{signal_summary(rows, size)}\n{out / 'signal.png'} shows it\n")


def report_groups(out: Path, groups: list[dict[str, float]], config: DiagnoseConfig) -> None:
    """Tables and picture of what goes along with the variance of a group's rewards."""
    table = correlations(groups, np.random.default_rng(config.seed))
    write_rows(out / "correlations.csv", [result._asdict() for result in table])
    draw_bottleneck(out / "bottleneck.png", groups, table, config)
    print(summary(groups, table), f"pictures and tables are in {out}", sep="\n")


def load_policies(config: DiagnoseConfig) -> tuple[Policy, Policy]:
    """The reference, and the policy that plays: the same one without --checkpoint. Raises
    SystemExit with the reason if they cannot be used."""
    try:
        folder = config.model or start_folder(config.env, **config.shaping())
        reference = load_policy(folder, config.device, config.bfloat16)
        check_length(reference.model.config, config.max_tokens)
        if not config.checkpoint:
            return reference, reference
        policy = load_policy(config.checkpoint, config.device, config.bfloat16)
        check_length(policy.model.config, config.max_tokens)
    except (OSError, ValueError) as error:
        raise SystemExit(f"the policy cannot be loaded: {error}") from None
    if policy.bytes_of != reference.bytes_of:
        raise SystemExit(
            f"--checkpoint {config.checkpoint} has another tokenizer than the reference: "
            "choose one trained from it"
        )
    return reference, policy


def draw_weights(out: Path, policy: Policy, batch: Batch, config: DiagnoseConfig) -> None:
    """Episodes as text, coloured by the weights that ActFocus would give."""
    rollouts, reference_stats = batch.rollouts, batch.reference_stats
    weights = actfocus_weights(
        reference_stats.energy,
        rollouts.reasoning,
        rollouts.action,
        rollouts.response,
        alpha=config.alpha,
        beta=config.beta,
    )
    title = f"{world_name(config.env)}: every sampled token by its ActFocus weight "
    title += f"(alpha {config.alpha:g}, beta {config.beta:g})"
    draw_transcripts(out, title, policy, rollouts, reference_stats, weights)


# ------------------------------------------------------------------------------ what a group shows
def token_choices(rollouts: Rollouts, reference_stats: TokenStats) -> dict[str, Tensor]:
    """The masks (B, T) bool of TOKENS.

    In a JSON call most tokens are boilerplate, and few decide. So `decision` is the action token of
    each turn at which the reference's entropy is highest.
    """
    turn = turn_numbers(rollouts.response)  # (B, T)
    entropy = reference_stats.entropy.masked_fill(~rollouts.action, -1.0)
    lowest = torch.full_like(entropy, -1.0)
    highest = lowest.scatter_reduce(1, turn, entropy, "amax")  # (B, T), by number of the turn
    return {
        "action": rollouts.action,
        "decision": rollouts.action & (entropy == highest.gather(1, turn)),
        "reasoning": rollouts.reasoning,
        "all": rollouts.response,
    }


def measure_groups(
    batch: Batch, group_size: int, turns: int | None = None
) -> list[dict[str, float]]:
    """groups.csv: for each group the columns of `outcome`, and the mean of each signal over each
    choice of its tokens (nan where it has none of them).

    turns: the signals are averaged over so many first turns of each episode; None: over all turns.
    The outcome is always that of whole episodes.
    """
    signals = token_signals(batch.reference_stats, batch.player.logprob)
    choices = token_choices(batch.rollouts, batch.reference_stats)
    if turns is not None:
        early = turn_numbers(batch.rollouts.response) <= turns  # (B, T)
        choices = {tokens: mask & early for tokens, mask in choices.items()}
    rows = []
    for i, seed in enumerate(batch.prompts):
        group = torch.arange(i * group_size, (i + 1) * group_size, device=choices["all"].device)
        row = {"seed": seed} | outcome(batch.rollouts.take(group))
        for signal, values in signals.items():
            for tokens, mask in choices.items():
                row[f"{signal}_{tokens}"] = float(values[group][mask[group]].mean())
        rows.append(row)
    return rows


def outcome(group: Rollouts) -> dict[str, float]:
    """How the rollouts of one group ended, and how long they are."""
    tokens = group.response.sum()
    columns = {
        "success": group.success.float().mean(),
        "reward": group.rewards.mean(),
        "reward_variance": group.rewards.double().var(),  # of equal rewards exactly 0
        "turns": group.turns.float().mean(),
        "tokens": tokens / len(group.ids),
        "action_fraction": group.action.sum() / tokens,
    }
    return {name: float(value) for name, value in columns.items()}


# -------------------------------------------------------------------------------------- statistics
class RankTest(NamedTuple):
    """Spearman's rank correlation; all are nan if one of the two columns is constant."""

    rho: float
    low: float  # of the 95 % percentile bootstrap interval, over pairs
    high: float
    p: float  # two-sided, by permutation


class Correlation(NamedTuple):
    """A signal of the groups against their reward variance: rho, low, high and p as in RankTest,
    and the partial rank correlations given another column of the groups. For comparison, the signal
    against their success rate."""

    signal: str
    tokens: str
    rho: float
    low: float
    high: float
    p: float
    groups: int  # that have such tokens
    rho_success: float
    rho_given_success: float
    rho_given_turns: float


Results = dict[tuple[str, str], Correlation]  # by signal and tokens


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks.

    >>> ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist()
    [3.5, 1.0, 3.5, 2.0]
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; nan if either is constant.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
    1.0
    """
    a = ranks(a) - (len(a) + 1) / 2
    b = ranks(b) - (len(b) + 1) / 2
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")


def spearman_test(
    a: np.ndarray, b: np.ndarray, rng: np.random.Generator, resamples: int = 2000
) -> RankTest:
    """Spearman's correlation of two columns (n,), its interval and its p-value.

    The interval is of `resamples` bootstrap samples of the pairs, the p-value of five times as many
    permutations of one column.
    """
    rho = spearman(a, b)
    if np.isnan(rho):
        return RankTest(rho, rho, rho, rho)
    draws = rng.integers(len(a), size=(resamples, len(a)))
    low, high = np.nanpercentile([spearman(a[draw], b[draw]) for draw in draws], [2.5, 97.5])
    a = ranks(a) - (len(a) + 1) / 2
    b = ranks(b) - (len(b) + 1) / 2
    shuffled = rng.permuted(np.tile(a, (5 * resamples, 1)), axis=1)  # (5 resamples, n)
    null = shuffled @ b / np.sqrt((a @ a) * (b @ b))
    as_far = (abs(null) >= abs(rho) - 1e-12).sum()
    p = (1 + as_far) / (1 + len(null))
    return RankTest(rho, float(low), float(high), float(p))


def partial_spearman(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """The rank correlation of a and b that is left once both are predicted from `given`: of what
    remains of their ranks after a straight line through the ranks of `given`. nan if one of the
    three is constant, or if a or b has the same order as `given`.

    >>> given = np.array([1.0, 2.0, 3.0, 4.0])
    >>> a = np.array([2.0, 1.0, 4.0, 3.0])  # rank correlation with given: 0.6
    >>> b = np.array([1.0, 3.0, 2.0, 4.0])  # with given 0.8, with a 0
    >>> round(partial_spearman(a, b, given), 3)  # (0 - 0.6 * 0.8) / (0.8 * 0.6)
    -1.0
    """
    with_a, with_b = spearman(a, given), spearman(b, given)
    unexplained = (1 - with_a**2) * (1 - with_b**2)
    if not unexplained > 1e-12:
        return float("nan")
    return (spearman(a, b) - with_a * with_b) / math.sqrt(unexplained)


def partial_interval(
    a: np.ndarray, b: np.ndarray, given: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of `partial_spearman`, over triples."""
    draws = rng.integers(len(a), size=(resamples, len(a)))
    found = [partial_spearman(a[draw], b[draw], given[draw]) for draw in draws]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def correlations(groups: list[dict[str, float]], rng: np.random.Generator) -> list[Correlation]:
    """Each signal over each choice of tokens against the reward variance. Last comes the success
    rate itself, with an empty choice of tokens."""
    column = {name: np.array([row[name] for row in groups]) for name in groups[0]}
    names = {(signal, tokens): f"{signal}_{tokens}" for signal in SIGNALS for tokens in TOKENS}
    names["success", ""] = "success"
    table = []
    for (signal, tokens), name in names.items():
        known = ~np.isnan(column[name])
        values, variance, success, turns = (
            column[each][known] for each in (name, "reward_variance", "success", "turns")
        )
        test = spearman_test(values, variance, rng)
        others = (
            spearman(values, success),
            partial_spearman(values, variance, success),
            partial_spearman(values, variance, turns),
        )
        table.append(Correlation(signal, tokens, *test, int(known.sum()), *others))
    return table


def summary(groups: list[dict[str, float]], table: list[Correlation]) -> str:
    """The table that is printed."""
    success = np.mean([row["success"] for row in groups])
    actions = np.mean([row["action_fraction"] for row in groups])
    varied = np.mean([row["reward_variance"] > 0 for row in groups])
    columns = f"{'rho':>7}{'95 % interval':>18}{'p':>9}{'given success':>15}{'given turns':>13}"
    columns += f"{'rho with success':>18}"
    lines = [
        f"{len(groups)} groups: success {success:.1%}, action tokens {actions:.1%} of those "
        f"generated, rewards differ in {varied:.1%} of the groups",
        f"{'Spearman with the reward variance':34}{columns}",
    ]
    for each in table:
        line = f"{each.signal + ' ' + each.tokens:34}"
        if np.isnan(each.rho):
            line += f"{'constant: no correlation':>34}"
        else:
            interval = f"[{each.low:+.2f}, {each.high:+.2f}]"
            line += f"{each.rho:>+7.2f}{interval:>18}{each.p:>9.4f}"
            line += f"{each.rho_given_success:>+15.2f}{each.rho_given_turns:>+13.2f}"
            line += f"{each.rho_success:>+18.2f}"
        lines.append(line)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the picture
def draw_bottleneck(
    path: Path, groups: list[dict[str, float]], table: list[Correlation], config: DiagnoseConfig
) -> None:
    """bottleneck.png. Above, energy against reward variance, a point for each group; below, every
    correlation with its interval."""
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1))
    results = {(each.signal, each.tokens): each for each in table}
    success = 100 * np.mean([row["success"] for row in groups])
    share = 100 * np.mean([row["action_fraction"] for row in groups])
    who = "a trained policy" if config.checkpoint else "the reference"
    above.suptitle(
        f"{world_name(config.env)}: {len(groups)} groups of {config.group_size} rollouts by {who}, "
        f"temperature {config.temperature:g}, success {success:.0f} %; "
        f"{share:.0f} % of generated tokens are action tokens"
        f"{f'; signals of the first {config.turns} turns' if config.turns else ''}"
    )
    draw_groups(above, groups, results)
    draw_correlations(below.subplots(), results)
    figure.savefig(path, dpi=110)


def draw_groups(figure: SubFigure, groups: list[dict[str, float]], results: Results) -> None:
    """A point for each group, for three choices of tokens."""
    variance = [row["reward_variance"] for row in groups]
    success = [row["success"] for row in groups]
    panels = figure.subplots(1, 3, sharey=True)
    for axes, tokens in zip(panels, ("action", "reasoning", "all"), strict=True):
        energy = [row[f"energy_{tokens}"] for row in groups]
        points = axes.scatter(energy, variance, c=success, cmap="viridis", vmin=0, vmax=1, s=22)
        result = results["energy", tokens]
        numbers = (
            f"ρ = {result.rho:+.2f} [{result.low:+.2f}, {result.high:+.2f}], p = {result.p:.2g}"
        )
        axes.set_title(f"{tokens} tokens\n{numbers}", fontsize=11)
        axes.set_xlabel("mean reference energy of the group")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("variance of the group's rewards")
    figure.colorbar(points, ax=panels, label="success rate of the group")


def draw_correlations(axes: Axes, results: Results) -> None:
    """A dot with its interval for each signal and choice of tokens."""
    for i, signal in enumerate(SIGNALS):
        drawn = 0
        for j, (tokens, (_, color)) in enumerate(TOKENS.items()):
            result = results[signal, tokens]
            if np.isnan(result.rho):
                continue
            drawn += 1
            x = i + (j - 1.5) / 6
            bars = [[abs(result.rho - result.low)], [abs(result.high - result.rho)]]
            axes.errorbar([x], [result.rho], bars, fmt="o", color=color, capsize=3)
        if not drawn:  # the shift is 0 where the reference itself played
            reason = "constant" if signal == "shift" else "no variance"
            axes.text(i, 0.04, reason, ha="center", color="dimgray")
    for label, color in TOKENS.values():
        axes.plot([], [], "o", color=color, label=label)
    axes.axhline(
        results["success", ""].rho,
        color="tab:green",
        linestyle="--",
        label="success rate of the\ngroup, for comparison",
    )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylim=(-1, 1), xlim=(-0.6, len(SIGNALS) - 0.4))
    axes.set_title("Rank correlation with the reward variance, 95 % bootstrap intervals")
    axes.set(ylabel="Spearman's ρ", xlabel="signal, averaged over these tokens of the group")
    axes.set_xticks(range(len(SIGNALS)), SIGNALS.values())
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


if __name__ == "__main__":
    diagnose(parse(DiagnoseConfig, __doc__.partition("\n")[0]))
