"""diagnose.py: the statistics against hand-computed values, the choice of tokens, and a real run whose page is taken apart."""

import csv
import math
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from diagnose import (
    SIGNALS, TOKENS, correlations, draw_tokens, measure, pieces, printable, spearman, spearman_test, token_choices, turn_numbers,
)  # fmt: skip
from energy import TokenStats
from rollout import Rollouts
from segment import Segment

ROOT = Path(__file__).parents[1]
O, F, R, A = Segment.OTHER, Segment.FORMAT, Segment.REASONING, Segment.ACTION


# -------------------------------------------------------------------------------------------------------------- statistics
def test_spearman_by_hand():
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])) == pytest.approx(0.8)  # 1 - 6 * 4 / 120
    assert spearman(np.array([1.0, 1, 2, 2]), np.array([1.0, 2, 3, 4])) == pytest.approx(4 / math.sqrt(20))  # ties share ranks
    assert math.isnan(spearman(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])))


def test_a_true_correlation_is_found_and_noise_is_not():
    rng, found, inside, ps = np.random.default_rng(0), 0, 0, []
    for _ in range(40):
        a = rng.normal(size=100)
        rho, low, high, p = spearman_test(a, a + rng.normal(size=100), rng, resamples=200)
        assert -1 <= low < rho < high <= 1
        found, inside = found + (p < 0.01), inside + (low < 6 / math.pi * math.asin(math.sqrt(0.5) / 2) < high)
        ps.append(spearman_test(a, rng.normal(size=100), rng, resamples=200)[3])
    assert found == 40 and inside >= 34  # 95 % of 40 is 38
    assert 0.25 < np.mean(ps) < 0.75 and min(ps) < 0.3  # uniform under the null


# ------------------------------------------------------------------------------------------------------- what a group shows
def two_rollouts():
    """Two episodes of two turns each, five tokens a turn, hand-made; both form one group."""
    turn = [F, R, A, A, F]
    labels = torch.tensor([[O] + turn + [O] + turn, [O] + turn + [O, O, O, O, O, O]])
    numbers = torch.arange(24, dtype=torch.float32).reshape(2, 12)
    zeros, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    rollouts = Rollouts(
        ids=torch.zeros(2, 12, dtype=torch.int64), labels=labels, old_logprob=-numbers, rewards=torch.tensor([0.0, 1.0]),
        success=torch.tensor([False, True]), lengths=torch.tensor([12, 6]), finished=torch.tensor([False, True]),
        turns=torch.tensor([2, 1]), factless=zeros, facts=ones, true_facts=ones,
    )  # fmt: skip
    entropy = torch.zeros(2, 12)
    entropy[0, 3], entropy[0, 10], entropy[1, 4], entropy[0, 2] = 1.0, 2.0, 0.5, 9.0  # 9 is on reasoning: it must not count
    return rollouts, TokenStats(logprob=-numbers - 1, energy=10 * numbers, entropy=entropy)


def test_the_decision_is_the_most_uncertain_action_token_of_each_turn():
    rollouts, frozen = two_rollouts()
    chosen = token_choices(rollouts, frozen)
    assert chosen["decision"].nonzero().tolist() == [[0, 3], [0, 10], [1, 4]]
    assert chosen["action"].sum() == 6 and chosen["reasoning"].sum() == 3 and chosen["all"].sum() == 15


def test_turns_are_counted_and_those_without_a_call_found():
    rollouts, _ = two_rollouts()
    labels = torch.tensor([[O, R, F, O, O, R, A, F, O, F], [O, O, A, A, O, R, R, O, O, O]])
    rollouts = rollouts.__class__(**{**vars(rollouts), "labels": labels})
    assert turn_numbers(rollouts).tolist() == [[0, 1, 1, 1, 1, 2, 2, 2, 2, 3], [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]]
    without_call = runpy.run_path(str(ROOT / "results" / "sudoku" / "blame.py"))["without_call"](rollouts)
    assert without_call.nonzero().tolist() == [[0, 1], [0, 2], [0, 9], [1, 5], [1, 6]]


def test_group_means_by_hand():
    rollouts, frozen = two_rollouts()
    (row,) = measure(rollouts, frozen, range(7, 8), group_size=2)
    assert (row["seed"], row["success"], row["reward_variance"], row["turns"]) == (7, 0.5, 0.5, 1.5)
    assert row["action_fraction"] == pytest.approx(6 / 15) and row["tokens"] == 7.5
    assert row["energy_action"] == pytest.approx(10 * (3 + 4 + 9 + 10 + 15 + 16) / 6)
    assert row["energy_reasoning"] == pytest.approx(10 * (2 + 8 + 14) / 3)
    assert row["nll_decision"] == pytest.approx((3 + 10 + 16) / 3) and row["shift_all"] == pytest.approx(1.0)


def test_correlations_name_what_is_constant_or_missing():
    rng = np.random.default_rng(0)
    groups = [{f"{signal}_{tokens}": float(rng.normal()) for signal in SIGNALS for tokens in TOKENS} for _ in range(20)]
    for i, row in enumerate(groups):
        row |= {"success": i / 20, "reward_variance": row["energy_action"] ** 3, "shift_all": 1e-9 * i, "nll_reasoning": math.nan}
    table = {(each.signal, each.tokens): each for each in correlations(groups, rng)}
    assert len(table) == len(SIGNALS) * len(TOKENS) + 1
    assert table["energy", "action"].rho == pytest.approx(1) and table["energy", "action"].p < 0.001
    assert math.isnan(table["shift", "all"].rho) and math.isnan(table["nll", "reasoning"].rho) and table["nll", "reasoning"].groups == 0


# ---------------------------------------------------------------------------------------------------------------- pictures
def test_nothing_invisible_or_misleading_reaches_the_page():
    assert printable("a\x00b\u202ec\u200b\td\ne") == "a\\x00b\\u202ec\\u200b\\td\ne"


def test_a_long_transcript_is_drawn(tmp_path):
    draw_tokens(tmp_path / "t.png", "title", [("system\nx\nuser\ngame", None)] + [("word$\n", 0)] * 300 + [("end", None)], [1.2])
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tips, self.text, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        if tag == "b" and dict(attributes).get("data-tip"):
            self.tips.append(dict(attributes)["data-tip"])
            self.text.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "b" in self.open and self.tips:
            self.text[-1] += data


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("diagnosis")
    flags = f"--model {tiny_folder} --groups 9 --group-size 4 --batch 12 --max-turn-tokens 40 --device cpu --out {out}"
    result = subprocess.run([sys.executable, "diagnose.py", *flags.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_a_run_leaves_tables_and_pictures(run):
    out, said = run
    assert {path.name for path in out.iterdir()} == {
        "config.json", "groups.csv", "correlations.csv", "bottleneck.png", "tokens.html", "tokens.png",
    }  # fmt: skip
    with (out / "groups.csv").open() as file:
        groups = list(csv.DictReader(file))
    assert len(groups) == 9 and len({row["seed"] for row in groups}) == 9
    with (out / "correlations.csv").open() as file:
        table = {(row["signal"], row["tokens"]): row for row in csv.DictReader(file)}
    assert table["shift", "all"]["rho"] == "nan" and len(table) == 17
    assert "9 groups" in said and "shift all" in said


def test_the_page_holds_every_sampled_token_and_loads_nothing(run):
    text = (run[0] / "tokens.html").read_text()
    assert "http" not in text and "url(" not in text and "@import" not in text
    page = Page()
    page.feed(text)
    assert page.open == [] and page.tags <= {"html", "meta", "title", "style", "h1", "h2", "p", "span", "s", "b", "i", "pre"}
    assert len(page.tips) > 100 and all(len(tip.split("·")) == 4 for tip in page.tips)
    weights = [float(tip.split("·")[1].split()[1]) for tip in page.tips]
    for tip, weight in zip(page.tips, weights, strict=True):
        name = tip.split(" ")[0]
        assert {"REASONING": weight == 0.1, "FORMAT": weight == 1, "ACTION": 1 <= weight <= 1.5}[name]


def test_transcripts_are_whole_and_escaped(tiny):
    forged = "</pre><script>alert(1)</script>&amp;"
    ids = tiny.encode(forged)
    labels = torch.tensor([[O] * 3 + [F] * (len(ids) - 3)])
    none = torch.zeros(1, dtype=torch.int64)
    rollouts = Rollouts(
        torch.tensor([ids]), labels, torch.zeros(labels.shape), none.float(), none.bool(), torch.tensor([len(ids)]),
        none.bool(), none, none, none, none,
    )  # fmt: skip
    found = pieces(tiny, rollouts, 0)
    assert "".join(text for text, _ in found) == forged
    assert [position for _, position in found] == [None, *range(3, len(ids))]


def test_a_trained_policy_can_play_and_a_foreign_tokenizer_is_refused(tiny_folder, tmp_path):
    flags = f"--model {tiny_folder} --checkpoint {tmp_path}/nowhere --groups 8 --group-size 2 --out {tmp_path}/out"
    result = subprocess.run([sys.executable, "diagnose.py", *flags.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "the policy cannot be loaded" in result.stderr and "Traceback" not in result.stderr
