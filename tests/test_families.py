"""Families of chat models, each as a tiny checkpoint with what sets it apart: its architecture, its
kind of tokenizer and its chat template. The templates here are shortened ones; where TRL is
installed, those that it carries are tried as they are."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from test_policy import QWEN25_TEMPLATE, SMOLLM2_TEMPLATE, as_text, foreign_checkpoint
from test_train import read, run_script
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from chat import describe_tools
from envs import read_call, write_turn
from policy import Policy, load_policy
from rollout import rollout, score_all
from segment import Segment, segment_turn
from studies.diagnose import DiagnoseConfig, diagnose
from support.warm_start import CHAT_TEMPLATE, WarmStart, demonstrations, imitate
from worlds import make_env

# Qwen3's leaves earlier thoughts out.
QWEN3_TEMPLATE = QWEN25_TEMPLATE.replace(
    "message.content + '<|im_end|>'", "message.content.split('</think>')[-1] + '<|im_end|>'"
)
# Llama 3's (3.1, 3.2) wants calls of another form, shows tools in the first user message, and
# makes a JSON string of a tool's response.
LLAMA3_TEMPLATE = """{{ bos_token }}{% set ns = namespace(tools=tools) %}{% for m in messages -%}
<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>

{% if m.role == 'user' and ns.tools %}Respond in the format {"name": name, "parameters": {...}}.
{% for t in ns.tools %}{{ t | tojson(indent=4) }}
{% endfor %}{% set ns.tools = none %}{% endif -%}
{{ m.content | tojson if m.role == 'tool' else m.content | trim }}<|eot_id|>
{%- endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
# Gemma 3's has no system messages (they open the user's first one), no tools and no tool messages.
GEMMA3_TEMPLATE = """{{ bos_token }}{% set prefix = '' %}{% set rest = messages %}
{%- if messages[0].role == 'system' %}{% set prefix = messages[0].content + '\n\n' %}
{%- set rest = messages[1:] %}{% endif %}{% for m in rest -%}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ prefix if loop.first else '' }}{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "initializer_range": 0.1,
}  # fmt: skip
FAMILIES = {  # template, control tokens, bos, end of turn, config
    "qwen2.5": (QWEN25_TEMPLATE, CHATML, None, CHATML[2], transformers.Qwen2Config),
    "qwen3": (QWEN3_TEMPLATE, CHATML, None, CHATML[2], transformers.Qwen3Config),
    "llama3": (LLAMA3_TEMPLATE, HEADERS, HEADERS[0], HEADERS[3], transformers.LlamaConfig),
    "smollm2": (SMOLLM2_TEMPLATE, CHATML, CHATML[1], CHATML[2], transformers.LlamaConfig),
    "gemma3": (GEMMA3_TEMPLATE, GEMMA, GEMMA[2], GEMMA[5], transformers.Gemma3TextConfig),
}
LESSON = WarmStart("frozenlake", thoughts=0, episodes=60, window_steps=60, episode_steps=0, lr=1e-2)


def learn(name, texts):
    """The tokenizer of a family, learned from texts."""
    _, control, bos, *_ = FAMILIES[name]
    if name == "gemma3":  # spaces are ▁, what is not in the vocabulary is bytes
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps)
        alphabet, more = [], [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Sequence([digits, split]) if name == "smollm2" else split
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, more = pre_tokenizers.ByteLevel.alphabet(), []
    trainer = BpeTrainer(
        vocab_size=900, special_tokens=control + more, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    if more:  # bytes are ordinary tokens
        data = json.loads(tokenizer.to_str())
        data["added_tokens"] = [each for each in data["added_tokens"] if each["content"] in control]
        tokenizer = Tokenizer.from_str(json.dumps(data))
    if bos in HEADERS + GEMMA:  # put before every text, unless that is forbidden
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A checkpoint of each family that has just learned to call a tool."""
    template, control, bos, end, config_class = FAMILIES[request.param]
    env = make_env("frozenlake", thoughts=0)
    episodes = demonstrations(env, LESSON)
    texts = [text for seen, said in episodes for text in seen + said]
    texts += [env.system + describe_tools(env.tools)] * 20
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=learn(request.param, texts), chat_template=template, bos_token=bos,
        eos_token=end, pad_token=control[0], extra_special_tokens=control,
    )  # fmt: skip
    if request.param.startswith("qwen"):
        tokenizer.add_tokens(TAGS)  # whole tokens, but no control tokens
    more = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if request.param == "gemma3":  # shorter than an episode
        more |= {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    config = config_class(**SMALL, **more, vocab_size=len(tokenizer) + 7)  # rows of no token
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "new")
    tokenizer.save_pretrained(folder / "new")
    policy = load_policy(folder / "new")
    imitate(policy, env, episodes, LESSON)
    policy.save(folder / "taught")
    return folder / "taught"


def test_a_turn_is_framed_as_the_template_does(family):
    """The prompt, a turn and a response, one after the other, are what the family's template makes
    of the same messages: tools in the system message and a response from the user where it cannot
    show them."""
    policy, env = load_policy(family), make_env("frozenlake")
    template, tools = policy.tokenizer.chat_template, env.tools
    first, turn = env.reset(1), write_turn("Up is ice.", "move", {"direction": "up"})
    system, response, role = env.system, "You moved.\nYou are on a1.", "tool"
    ids = policy.prompt(system, tools, first) + policy.encode(turn)
    ids += [policy.end_of_turn, *policy.result(response)]
    if template not in (QWEN25_TEMPLATE, QWEN3_TEMPLATE):
        system, tools = system + describe_tools(tools), None
    if template in (LLAMA3_TEMPLATE, GEMMA3_TEMPLATE):
        response, role = f"<tool_response>\n{response}\n</tool_response>", "user"
        assert ids.count(policy.tokenizer.bos_token_id) == 1
    contents = {"system": system, "user": first, "assistant": "@"}  # Qwen3's would cut the turn
    messages = [{"role": key, "content": text} for key, text in contents.items()]
    expected = policy.tokenizer.apply_chat_template(
        [*messages, {"role": role, "content": response}],
        tools=tools, tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert policy.tokenizer.decode(ids) == expected.replace("@", turn)
    # what was said is heard, and the call is the action
    sampled = policy.encode(turn)
    assert policy.turn_text(sampled) == turn and read_call(turn, env.tools)[1] == ""
    labels = segment_turn([policy.bytes_of[token] for token in sampled])
    action = [
        token for token, label in zip(sampled, labels, strict=True) if label == Segment.ACTION
    ]
    assert '"direction": "up"' in as_text(policy, action)


def test_it_calls_tools_and_is_scored_as_it_was_sampled(family):
    """Episodes are longer than Gemma's sliding window: a decoding step with the cache sees of them
    what a whole pass does."""
    policy = load_policy(family)
    rollouts = rollout(policy, lambda: make_env("frozenlake"), list(range(8)), max_turn_tokens=120)
    assert rollouts.action.sum() > 8 * 5 and rollouts.facts.sum() > 8
    stats = score_all(policy, rollouts, rollouts.response, temperature=1.0, micro_tokens=4096)
    assert (stats.logprob - rollouts.old_logprob).abs().max() < 1e-3


def test_both_arms_train_and_the_diagnosis_runs(family, tmp_path):
    flags = "--save --max-turn-tokens 100 --max-tokens 600 --lr 1e-4"
    result = run_script("train_actfocus.py", family, tmp_path / "run", *flags.split())
    assert result.returncode == 0, result.stderr
    assert "class       energy     grpo   actfocus   token\n" in result.stdout
    for arm in ("grpo", "actfocus"):
        rows = read(tmp_path / "run" / arm / f"{arm}.csv")
        assert len(rows) == 3
        assert sum(float(row["action_fraction"]) for row in rows[:2]) > 0  # some turns are cut
        saved = tmp_path / "run" / arm / "policy"
        assert {"chat_template.jinja", "config.json", "tokenizer.json"} <= {
            path.name for path in saved.iterdir()
        }
        kept = ["chat_template.jinja", "generation_config.json"]  # as they were, byte for byte
        assert all((saved / name).read_bytes() == (family / name).read_bytes() for name in kept)
        transformers.AutoModelForCausalLM.from_pretrained(saved)
        assert load_policy(saved).end_of_turn == load_policy(family).end_of_turn
    diagnose(
        DiagnoseConfig(
            model=str(family), groups=8, blocks=4, group_size=2, max_turn_tokens=100,
            max_tokens=600, device="cpu", out=str(tmp_path / "diagnosis"),
        )
    )  # fmt: skip
    assert (tmp_path / "diagnosis" / "signal.csv").exists()


def test_a_family_without_system_messages_is_refused_with_the_reason(tmp_path):
    gemma2 = GEMMA3_TEMPLATE.replace(
        "{%- if messages[0].role == 'system' %}",
        "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}",
    )
    assert gemma2 != GEMMA3_TEMPLATE
    with pytest.raises(ValueError, match="refuses .* system, .*: System role not supported"):
        load_policy(foreign_checkpoint(tmp_path, "byte-level", gemma2))


def test_a_template_that_loses_the_next_turn_after_a_tool_gets_responses_from_the_user(tmp_path):
    """DeepSeek-R1's writes nothing after a tool's message; a turn there opens with a thought."""
    template = """{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' -%}
<|im_start|>tool {{ m.content }}{% else %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>
{%- endif %}{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' -%}
<|im_start|>assistant <think>
{% endif %}"""
    policy = load_policy(foreign_checkpoint(tmp_path, "byte-level", template))
    assert policy.opening == b"<think>\n"
    shown = policy.tokenizer.decode(policy.result("You moved."))
    expected = "<|im_start|>user <tool_response>\nYou moved.\n</tool_response><|im_end|>"
    assert shown == expected + "<|im_start|>assistant <think>\n"


def test_llama_3_does_not_tell_todays_date(tmp_path):
    """Another day would be another prompt, and a run that goes on another run."""
    template = LLAMA3_TEMPLATE.replace(
        "{{ bos_token }}", "{{ date_string if date_string is defined else strftime_now('%d %b') }}"
    )
    policy = load_policy(
        foreign_checkpoint(tmp_path, "byte-level", template.replace("eot_id", "im_end"))
    )
    assert policy.tokenizer.decode(policy.prompt("s", [], "o")).startswith("26 Jul 2024")


@pytest.mark.parametrize(
    "form",
    ["a list [{...}] in <tool_call>", "<tool_call><function=NAME></tool_call>", "[NAME(...)]"],
)
def test_a_template_that_asks_for_calls_of_another_form_is_not_followed(form, tmp_path, capsys):
    tools = "{{ '<tools>' + tools | tojson + '</tools> " + form + "' }}"
    template = CHAT_TEMPLATE.replace("{{ '\n<tools>' }}", tools)
    assert template != CHAT_TEMPLATE
    policy, env = (
        load_policy(foreign_checkpoint(tmp_path, "byte-level", template)),
        make_env("shop"),
    )
    shown = as_text(policy, policy.prompt(env.system, env.tools, "o"))
    if "<tool_call>" in form:
        assert describe_tools(env.tools) in shown and form not in shown
        assert "of another form" in capsys.readouterr().err


# ------------------------------------------------------------------- real templates, where they are
TRL = importlib.util.find_spec("trl")
REAL = {  # which of TRL's templates show tools as the worlds need them
    "qwen2_5": True, "qwen3": True, "qwen3_instruct_2507": True, "qwen3_5_think": False,
    "llama3_1": False, "llama3_2": False, "gemma3": False, "phi3_5": False,
    "deepseek_r1_distill": False,
}  # fmt: skip


@pytest.mark.skipif(TRL is None, reason="needs trl, which carries them: pip install trl==1.16.0")
@pytest.mark.parametrize("name, shows_tools", REAL.items())
def test_a_real_template(name, shows_tools, built_in, capsys):
    template = (Path(TRL.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
        built_in.tokenizer.name_or_path
    )
    control = set(re.findall(r"<[|｜][^|｜<>]+[|｜]>|<(?:start|end)_of_turn>", template))
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(control), "bos_token": "<bos>"})
    tokenizer.chat_template, tokenizer.init_kwargs["made_by"] = template, ""
    model = transformers.AutoModelForCausalLM.from_pretrained(built_in.tokenizer.name_or_path)
    model.resize_token_embeddings(len(tokenizer))
    policy = Policy(model, tokenizer)
    env = make_env("frozenlake")
    prompt = tokenizer.decode(policy.prompt(env.system, env.tools, env.reset(1)))
    assert ("takes no tools" not in capsys.readouterr().err) == shows_tools
    assert prompt.count("<tool_call>") >= 2 and json.dumps(env.tools[0])[:40] in prompt
    assert "You moved.\nUp" in tokenizer.decode(policy.result("You moved.\nUp"))
    if shows_tools:  # a turn's call is what the template itself makes of a call
        arguments = {"direction": "up"}
        turn = write_turn("Up is ice.", "move", arguments)
        call = {"type": "function", "function": {"name": "move", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "o"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        rendered = tokenizer.apply_chat_template(messages, tools=env.tools, tokenize=False)
        assert turn[turn.index("<tool_call>") :] in rendered
