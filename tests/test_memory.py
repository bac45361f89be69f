"""memory.py: the estimate against what a run takes."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_train import run_script

from policy import load_policy
from studies import diagnose
from support import memory
from support.config import ActFocusConfig

ROOT = Path(__file__).parents[1]
SHAPE = {
    "hidden_size": 384, "intermediate_size": 1280, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip
RUN = """
import json, resource, sys
import torch
import train_grpo, transformers
from support import memory
from support.config import ActFocusConfig
from policy import load_policy
from support.warm_start import STARTS
model, out, *more = sys.argv[1:]
config = ActFocusConfig(
    env="frozenlake",
    model=model, out=out, iterations=1, prompts=1, group_size=6, minibatch=6, eval_episodes=1,
    micro_tokens=2400, max_tokens=400, checkpoint_every=0, device="cpu",
    gradient_checkpointing="recompute" in more, lora=16 if "lora" in more else None,
)
config.validate()
said = []
memory.describe = lambda needed, there: said.append(needed)
page = resource.getpagesize()
small = load_policy(STARTS / "frozenlake")  # what is imported late is no part of it
small.hidden(torch.zeros(1, 500, dtype=torch.int64)).sum().backward()
if config.lora:
    import peft
before = int(open("/proc/self/statm").read().split()[1]) * page
arms = {"actfocus": config.chosen_arms()["actfocus"]}
train_grpo.run(config, arms)
# Not ru_maxrss of getrusage: that counts what the parent of this process had taken.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
peak = 1024 * int(peak)
print(json.dumps([peak - before, {moment: sum(by.values()) for moment, by in said[0].items()}]))
"""


@pytest.fixture(scope="module")
def larger(start, tmp_path_factory):
    """A model that is large enough to be weighed: 8M parameters."""
    folder = tmp_path_factory.mktemp("larger")
    tokenizer = load_policy(start).tokenizer
    config = transformers.Qwen2Config(
        **SHAPE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="what a run took is read from /proc")
@pytest.mark.parametrize("more", [[], ["recompute"], ["lora"]], ids=" ".join)
def test_the_estimate_is_what_a_run_takes(larger, more, tmp_path):
    env = dict(os.environ)
    if "lora" in more:
        pytest.importorskip("peft")
        # Large tensors go back to the system when they are freed. Otherwise the holes that frozen
        # layers leave in the heap, whose inputs are not kept, would be counted as taken.
        env["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    command = [sys.executable, "-c", RUN, str(larger), str(tmp_path / "run"), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    taken, said = json.loads(done.stdout.splitlines()[-1])
    assert taken == pytest.approx(max(said.values()), rel=0.25)


FREED = """
import resource
import torch
from support import memory

def taken():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = taken()
tensors = [torch.ones(500_000) for _ in range(200)]  # 2 MB each
tensors = tensors[::10]  # the heap cannot shrink: some of each part of it are in use
kept = taken() - before
memory.give_back()
print(kept, taken() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep less")
def test_what_was_freed_is_given_back():
    """Else the memory of an update stays taken while the next episodes are played."""
    command = [sys.executable, "-c", FREED]
    # the most that glibc comes to by itself, after it has seen a block of that size freed
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(2**25))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    kept, left = map(int, done.stdout.split())
    assert kept > 300e6  # else there is nothing to give back, and this test says nothing
    assert left < 100e6  # of which 40 MB are in use


def test_a_model_that_does_not_fit_is_named_before_it_is_loaded(start, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1e8)
    monkeypatch.setattr("train_grpo.load_policy", lambda *_: sys.exit("loaded"))
    result = run_script("train_actfocus.py", start, tmp_path / "run")
    assert "There are 0.1 GB: lower --micro-tokens or add --gradient-checkpointing" in result.stdout
    assert result.stderr.endswith("loaded\n")


def test_how_many_runs_fit_side_by_side(start, monkeypatch):
    config = ActFocusConfig(env="frozenlake", device="cpu")
    config.resolve()
    needed = memory.estimate_run(start, config, [])
    largest = max(sum(sizes.values()) for sizes in needed.values())
    for there, fit in ((3.5 * largest, 3), (0.1 * largest, 1), (None, 1)):
        monkeypatch.setattr(memory, "available", lambda device, there=there: there)
        assert memory.how_many_fit(start, config, []) == fit
    assert memory.how_many_fit("/nowhere", config, []) == 1


def test_will_it_fit_is_answered_without_loading_the_model(start, monkeypatch, capsys):
    monkeypatch.setattr("policy.load_policy", lambda *_: sys.exit("loaded"))
    flags = ["--model", str(start), "--device", "cpu", "--arms", "ppo", "--prompts", "16"]
    monkeypatch.setattr(memory, "available", lambda device: 3e9)
    memory.main(flags)
    assert capsys.readouterr().out.endswith("It will fit: there are 3.0 GB.\n")
    monkeypatch.setattr(memory, "available", lambda device: 1e8)
    with pytest.raises(SystemExit, match="It will not fit"):
        memory.main(flags)
    assert "There are 0.1 GB: lower --micro-tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="the memory of this run cannot be estimated"):
        memory.main(["--model", "/nowhere", "--device", "cpu"])


def test_a_system_that_does_not_tell_its_memory_is_no_error(start, monkeypatch, capsys):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown)
    assert memory.available("cpu") is None
    monkeypatch.delattr("os.sysconf")  # as on Windows
    assert memory.available("cpu") is None
    config = ActFocusConfig(env="frozenlake", device="cpu")
    config.resolve()
    memory.print_estimate(str(start), config, [])
    said = capsys.readouterr().out
    assert "memory while playing" in said and "There are" not in said


def test_an_estimate_that_fails_ends_no_run(tmp_path, capsys):
    config = ActFocusConfig(env="frozenlake", device="cpu")
    config.resolve()
    memory.print_estimate(str(tmp_path / "nothing"), config, [])
    assert "note: the memory that this run needs cannot be estimated" in capsys.readouterr().out


def test_a_diagnosis_out_of_memory_names_its_own_flags(monkeypatch):
    def hungry(config):
        torch.empty(2**60)

    monkeypatch.setattr(diagnose, "load_policies", hungry)
    with pytest.raises(SystemExit, match="out of memory on cpu: lower --micro-tokens or --play-"):
        diagnose.diagnose(diagnose.DiagnoseConfig(device="cpu"))


QWEN25 = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, is the head tied
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (2048, 11008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False),
}


def gigabytes_of_qwen(size, rollouts, lora=None):
    """What a run at the paper's settings takes on a GPU, with gradient checkpointing."""
    hidden, intermediate, layers, heads, key_value_heads, vocabulary, tied = QWEN25[size]
    shape = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_value_heads,
        tie_word_embeddings=tied,
    )  # fmt: skip
    parts = memory.estimate(
        shape, "cuda", bfloat16=True, reference=True, critic=False, recompute=True,
        micro_tokens=8192, rollouts=rollouts, max_tokens=3600, lora=lora,
    )  # fmt: skip
    return max(sum(by_part.values()) for by_part in parts.values()) / 1e9


def test_what_the_readme_says_of_qwen():
    readme = " ".join((ROOT / "README.md").read_text().split())
    most = [gigabytes_of_qwen(size, rollouts=128) for size in ("0.5B", "1.5B", "3B")]
    assert "0.5B, 1.5B and 3B take {:.0f}, {:.0f} and {:.0f} GB".format(*most) in readme


def test_what_the_readme_says_of_qwen_with_lora():
    pytest.importorskip("peft")
    readme = " ".join((ROOT / "README.md").read_text().split())
    most = [gigabytes_of_qwen(size, rollouts=64, lora=16) for size in QWEN25]
    said = "0.5B, 1.5B, 3B and 7B take {:.0f}, {:.0f}, {:.0f} and {:.0f} GB".format(*most)
    assert said in readme
