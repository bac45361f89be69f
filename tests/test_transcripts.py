"""support/transcripts.py: the pages hold every sampled token, load nothing and escape whatever a
model writes; episodes.html shows the same episodes of every arm, before training and after."""

import copy
import itertools
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from actfocus import actfocus_weights
from rollout import Rollouts, rollout, score_all
from segment import Segment
from support import logs, transcripts
from support.transcripts import (
    LINE_LENGTH,
    SHOWN_EPISODES,
    Episode,
    Piece,
    Token,
    after_instructions,
    as_html,
    draw_tokens,
    draw_transcripts,
    lay_out,
    page_of,
    pieces,
    printable,
    save_episodes,
    shown_episodes,
    write_episodes_page,
)
from worlds import make_env

O, F, R, A = Segment.OTHER, Segment.FORMAT, Segment.REASONING, Segment.ACTION  # noqa: E741
TAGS = "html meta title style h1 h2 h3 p span s b i em pre details summary div table tr th td a"
GROUP_SIZE = 2


class Page(HTMLParser):
    """A page taken apart: its tags, its tokens' tips and texts, and whether its tags are nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tips, self.tokens, self.tags, self.links = [], [], [], set(), []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        if tag != "meta":
            self.open.append(tag)
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "b" and "data-tip" in attributes:
            self.tips.append(attributes["data-tip"].split("\n"))
            self.tokens.append("")
        assert not any(name.startswith("on") or name == "src" for name in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "b" in self.open and self.tokens:
            self.tokens[-1] += data


def check_that_it_loads_nothing(text):
    policy = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; """
    assert policy + """style-src 'unsafe-inline'">""" in text  # no script, no picture, no font
    assert text.count("http") == 1 and "url(" not in text and "@import" not in text
    page = Page(text)
    assert page.tags <= set(TAGS.split())
    assert all(link.startswith("#") for link in page.links)
    return page


def as_shown(policy, rollouts, row):
    """The texts of the sampled tokens of an episode, as boxes show them."""
    sampled = [piece for piece in pieces(policy, rollouts, row) if piece.position is not None]
    assert len(sampled) == rollouts.response[row].sum()
    return [text.replace("\n", "⏎\n") for text, _ in sampled]


@pytest.fixture(scope="module")
def evaluation(built_in):
    """Five groups of two, with the statistics and ActFocus weights of their tokens."""
    seeds = [seed for seed in range(100, 105) for _ in range(GROUP_SIZE)]
    rollouts = rollout(built_in, lambda: make_env("frozenlake"), seeds, temperature=0.5)
    return rollouts, *scored(built_in, rollouts)


def scored(policy, rollouts, alpha=0.1, beta=0.5):
    stats = score_all(policy, rollouts, rollouts.response, temperature=0.5, micro_tokens=4096)
    reasoning, action = rollouts.labels == R, rollouts.labels == A
    weights = actfocus_weights(stats.energy, reasoning, action, rollouts.response, alpha, beta)
    return stats, weights


# -------------------------------------------------------------------------------------- any page
def test_the_page_holds_every_sampled_token_and_loads_nothing(built_in, evaluation, tmp_path):
    rollouts, stats, weights = evaluation
    draw_transcripts(tmp_path, "a <title>", built_in, rollouts, stats, weights)
    text = (tmp_path / "tokens.html").read_text()
    page = check_that_it_loads_nothing(text)
    assert "<title>a &lt;title&gt;</title>" in text
    succeeded = rollouts.success.nonzero().flatten().tolist()
    failed = (~rollouts.success).nonzero().flatten().tolist()
    rows = succeeded[:2] + failed[:2]
    assert page.tokens == [shown for row in rows for shown in as_shown(built_in, rollouts, row)]
    positions = [(row, i) for row in rows for i in rollouts.response[row].nonzero().flatten()]
    for (row, i), (kind, weight, energy, entropy, logprob) in zip(
        positions, page.tips, strict=True
    ):
        assert kind == f"{Segment(rollouts.labels[row, i].item()).name} token"
        assert weight == f"weight in the loss {weights[row, i]:.2f}"
        assert float(energy.split()[1]) == pytest.approx(stats.energy[row, i].item(), abs=0.006)
        assert float(entropy.split()[1]) == pytest.approx(stats.entropy[row, i].item(), abs=0.006)
        sampled, of_frozen = logprob.removeprefix("log-probability ").split(" (frozen model: ")
        assert float(sampled) == pytest.approx(rollouts.old_logprob[row, i].item(), abs=0.006)
        assert float(of_frozen[:-1]) == pytest.approx(stats.logprob[row, i].item(), abs=0.006)
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


def test_weights_follow_the_classes(built_in, evaluation, tmp_path):
    draw_transcripts(tmp_path, "title", built_in, *evaluation)
    page = Page((tmp_path / "tokens.html").read_text())
    assert len(page.tips) > 100
    kinds = set()
    for kind, weight, *_ in page.tips:
        value = float(weight.split()[-1])
        kind = kind.split()[0]
        kinds.add(kind)
        if kind == "ACTION":
            assert 1 <= value <= 1.5
        else:
            assert value == {"REASONING": 0.1, "FORMAT": 1.0}[kind]
    assert kinds == {"ACTION", "REASONING", "FORMAT"}


def test_transcripts_are_whole_and_escaped(tiny):
    forged = "</pre><script>alert(1)</script>&amp;"
    ids = tiny.encode(forged)
    labels = torch.tensor([[O] * 3 + [F] * (len(ids) - 3)])
    none = torch.zeros(1, dtype=torch.int64)
    rollouts = Rollouts(
        ids=torch.tensor([ids]),
        labels=labels,
        old_logprob=torch.zeros(labels.shape),
        rewards=none.float(),
        success=none.bool(),
        lengths=torch.tensor([len(ids)]),
        finished=none.bool(),
        turns=none,
        turns_without_facts=none,
        facts=none,
        true_facts=none,
    )
    found = pieces(tiny, rollouts, 0)
    assert "".join(text for text, _ in found) == forged
    assert [position for _, position in found] == [None, *range(3, len(ids))]
    # an id of no token, of which a padded vocabulary has some, is sampled by an untaught model
    padded = copy.copy(tiny)
    padded.bytes_of = tiny.bytes_of + [b""]
    rollouts.ids[0, -1] = len(tiny.bytes_of)
    assert pieces(padded, rollouts, 0)[-1].text == f"<{len(tiny.bytes_of)}>"


@pytest.mark.parametrize("place", ["token", "class", "prompt", "observation"])
def test_no_text_becomes_markup(place):
    """Wherever it stands: in a token, in the folded instructions, in a tool's response."""
    forged = "</pre></b><script>alert(1)</script><img src=x onerror=alert(1)>\"' TITLE BODY STOPS"
    token = Token("a", "ACTION", 1.0, -9.0, 0.5, -0.1, -0.2)
    shown = {
        "token": ["prompt", token._replace(text=forged)],
        "class": ["prompt", token._replace(kind=forged)],
        "prompt": [f"system {forged}\nuser\ngame", token],
        "observation": ["prompt", token, forged, token],
    }[place]
    page = check_that_it_loads_nothing(page_of(forged, as_html(Episode(True, 1.0, 1, shown))))
    assert "script" not in page.tags and forged in page.text
    assert len(page.tips) == len([piece for piece in shown if isinstance(piece, Token)])


def test_nothing_stays_invisible():
    assert printable("a\x00b\u202ec\u200b\td\ne") == "a\\x00b\\u202ec\\u200b\\td\ne"


def test_a_long_transcript_is_drawn(tmp_path):
    start, end = Piece("system\nx\nuser\ngame", None), Piece("end", None)
    transcript = [start] + [Piece("word$\n", 0)] * 300 + [end]
    draw_tokens(tmp_path / "t.png", "title", transcript, [1.2])
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_of_a_picture_stand_side_by_side():
    """Over random transcripts: no box leaves its line or covers another, and nothing is lost."""
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(1, 250, size=20) if random.random() < 0.2 else [3] * 90
        transcript = [
            Piece("x" * int(length), None if random.random() < 0.1 else position)
            for position, length in enumerate(lengths)
        ]
        boxes = lay_out(transcript)
        assert "".join(box.text for box in boxes) == "".join(piece.text for piece in transcript)
        assert all(box.x + len(box.text) <= LINE_LENGTH for box in boxes)
        for before, after in itertools.pairwise(boxes):
            beside = after.line == before.line and after.x == before.x + len(before.text)
            assert beside or (after.line == before.line + 1 and after.x == 0)


def test_only_the_instructions_are_left_out_of_a_picture():
    assert after_instructions("system\nx user\nuser\ngame\nP b2") == "user\ngame\nP b2"
    assert after_instructions("game\nP b2") == "game\nP b2"


def test_the_instructions_are_folded_and_whole():
    token = Token("a", "ACTION", 1.0, -9.0, 0.5, -0.1, -0.2)
    text = as_html(Episode(False, 0.0, 1, ["system\nYou are P.\nuser\nP b2\n", token]))
    folded, shown = text.split("</details>")
    assert "You are P." in folded and "P b2" not in folded
    assert "user\nP b2" in shown and "You are P." not in shown


# --------------------------------------------------------------------------------- episodes.html
def save(out, arm_name, iteration, policy, rollouts):
    """What the loop does after an evaluation, with the policy itself as the frozen model."""
    few = shown_episodes(rollouts, GROUP_SIZE)
    shape = {"grpo": (1.0, 0.0), "actfocus": (0.1, 0.5)}[arm_name]
    save_episodes(out, arm_name, iteration, policy, few, *scored(policy, few, *shape))


def test_the_shown_episodes_are_chosen_without_a_look_at_them(evaluation):
    rollouts = evaluation[0]
    few = shown_episodes(rollouts, GROUP_SIZE)
    assert len(few.ids) == SHOWN_EPISODES == 4
    assert few.ids.equal(rollouts.ids[[0, 2, 4, 6]])
    assert few.rewards.equal(rollouts.rewards[[0, 2, 4, 6]])
    turned = copy.copy(rollouts)
    turned.success = ~rollouts.success
    assert shown_episodes(turned, GROUP_SIZE).ids.equal(few.ids)
    assert len(shown_episodes(rollouts.take(torch.arange(2)), GROUP_SIZE).ids) == 1


def test_episodes_of_all_arms_before_and_after(built_in, evaluation, tmp_path):
    rollouts = evaluation[0]
    later = rollouts.take(torch.tensor([1, 0, 3, 2, 5, 4, 7, 6]))  # the other rollout of each group
    assert write_episodes_page(tmp_path) is None
    for arm_name in ("actfocus", "grpo"):
        save(tmp_path, arm_name, 0, built_in, rollouts)
        save(tmp_path, arm_name, 6, built_in, later)
    assert write_episodes_page(tmp_path) == tmp_path / "episodes.html"
    page = check_that_it_loads_nothing((tmp_path / "episodes.html").read_text())
    # episode by episode, arm by arm: the same ones of both arms, before and after
    expected = []
    for index in range(SHOWN_EPISODES):
        before = as_shown(built_in, rollouts, GROUP_SIZE * index)
        after = as_shown(built_in, rollouts, GROUP_SIZE * index + 1)
        expected += 2 * (before + after)
    assert page.tokens == expected
    for arm in ("GRPO", "ActFocus"):
        assert page.text.count(f"{arm}, before training") == SHOWN_EPISODES
        assert page.text.count(f"{arm}, after 6 iterations") == SHOWN_EPISODES
    # GRPO weighs all tokens alike, and yet shows the energy of each
    first = len(as_shown(built_in, rollouts, 0))
    assert {weight for _, weight, *_ in page.tips[:first]} == {"weight in the loss 1.00"}
    assert len({energy for _, _, energy, *_ in page.tips[:first]}) > 20


def test_arms_stand_in_the_order_of_the_run(built_in, evaluation, tmp_path):
    """Each arm in its own folder, and the first of --arms first."""
    for arm_name in ("grpo", "actfocus"):
        (tmp_path / arm_name).mkdir()
        save(tmp_path / arm_name, arm_name, 0, built_in, evaluation[0])
        log = tmp_path / arm_name / f"{arm_name}.csv"
        logs.log(log, {"iteration": 0, "eval_success": 0.25})
    for arms, first, second in (
        ("actfocus,grpo", "ActFocus", "GRPO"), ("grpo,actfocus", "GRPO", "ActFocus")
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({"arms": arms}))
        write_episodes_page(tmp_path)
        text = Page((tmp_path / "episodes.html").read_text()).text
        assert text.index(f"{first}, before training") < text.index(f"{second}, before training")
        assert text.index(f"{first}before training") < text.index(f"{second}before training")
        assert text.count("25% succeed") == 2


def test_a_resumed_run_still_shows_what_was_before(built_in, evaluation, tmp_path):
    """A resumed run evaluates later iterations only; what it shows of before training is kept."""
    rollouts = evaluation[0]
    save(tmp_path, "grpo", 0, built_in, rollouts)
    write_episodes_page(tmp_path)
    page = Page((tmp_path / "episodes.html").read_text())
    assert page.text.count("GRPO, before training") == page.text.count("not played yet") == 4
    before = (tmp_path / "episodes" / "grpo-before.json").read_bytes()
    for iteration in (2, 4):
        save(tmp_path, "grpo", iteration, built_in, rollouts)
    assert (tmp_path / "episodes" / "grpo-before.json").read_bytes() == before
    assert len(list((tmp_path / "episodes").iterdir())) == 2
    write_episodes_page(tmp_path)
    page = Page((tmp_path / "episodes.html").read_text())
    assert page.text.count("GRPO, before training") == page.text.count("after 4 iterations") - 1
    assert "after 2 iterations" not in page.text and "not played yet" not in page.text


def test_the_page_says_how_the_whole_evaluation_ended(built_in, evaluation, tmp_path):
    """Four episodes are an anecdote: the rate that they belong to stands beside them."""
    for iteration, success in ((0, 0.25), (1, 0.75)):
        logs.log(tmp_path / "grpo.csv", {"iteration": iteration, "eval_success": success})
        save(tmp_path, "grpo", iteration, built_in, evaluation[0])
    write_episodes_page(tmp_path)
    text = Page((tmp_path / "episodes.html").read_text()).text
    assert "25% succeed" in text and "75% succeed" in text and "after 1 iteration " not in text


def test_a_death_while_writing_leaves_what_was_there(built_in, evaluation, tmp_path, monkeypatch):
    save(tmp_path, "grpo", 0, built_in, evaluation[0])
    save(tmp_path, "grpo", 2, built_in, evaluation[0])
    write_episodes_page(tmp_path)
    found = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    def half(path, text, **options):
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(transcripts.Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "grpo", 4, built_in, evaluation[0])
    with pytest.raises(KeyboardInterrupt):
        write_episodes_page(tmp_path)
    assert {path: path.read_bytes() for path in found} == found
    monkeypatch.undo()
    write_episodes_page(tmp_path)  # what was left half written is not read
    assert (tmp_path / "episodes.html").read_bytes() == found[tmp_path / "episodes.html"]


def test_what_is_kept_is_plain_json(built_in, evaluation, tmp_path):
    save(tmp_path, "actfocus", 0, built_in, evaluation[0])
    kept = json.loads((tmp_path / "episodes" / "actfocus-before.json").read_text())
    assert kept["iteration"] == 0 and len(kept["episodes"]) == SHOWN_EPISODES
    iteration, episodes = transcripts.load_episodes(tmp_path / "episodes" / "actfocus-before.json")
    assert episodes[0].success == evaluation[0].success[0]
    assert all(isinstance(piece, (str, Token)) for piece in episodes[0].pieces)
