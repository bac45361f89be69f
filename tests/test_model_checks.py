"""model_checks.py: checkpoints that would be trained as another model than they are.

Each test makes a tiny checkpoint with random weights and one fault, or one of a kind that must
still load.
"""

import json
import shutil

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_policy import foreign_checkpoint
from tokenizers import normalizers

from arms import ARMS
from kv_cache import preallocated_cache
from model_checks import check_length
from policy import load_policy
from support.config import Config
from support.warm_start import CHAT_TEMPLATE, EVAL_SEEDS
from train_grpo import first_prompt, load, origin_of
from worlds import make_env

SMALL = {
    "vocab_size": 420, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A checkpoint whose tokenizer the checkpoints below share."""
    return foreign_checkpoint(tmp_path_factory.mktemp("tokenizer"), "byte-level")


@pytest.fixture
def checkpoint(tokenizer_folder, tmp_path):
    """A function (config class, **fields) -> the folder of a tiny checkpoint."""

    def make(config_class, **fields):
        folder = tmp_path / "model"
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config_class(**fields))
        model.save_pretrained(folder)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def llama(tokenizer_folder, tmp_path):
    """A copy of a tiny Llama, to be damaged."""
    return shutil.copytree(tokenizer_folder, tmp_path / "llama")


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder, change):
    """Rewrite the weights of a folder: change(name, tensor) is a (name, tensor), or None."""
    path = folder / "model.safetensors"
    changed = [change(*item) for item in load_file(path).items()]
    save_file(dict(item for item in changed if item), path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------- what loads as it is
KINDS = {
    "qwen2": (transformers.Qwen2Config, SMALL | {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, GROUPED),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "llama tied": (transformers.LlamaConfig, GROUPED | {"tie_word_embeddings": True}),
    "llama untied": (transformers.LlamaConfig, GROUPED | {"tie_word_embeddings": False}),
    "mistral with a window": (transformers.MistralConfig, GROUPED | {"sliding_window": 8}),
    "gemma 3 text": (
        transformers.Gemma3TextConfig,
        GROUPED | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "smollm2": (  # its fields, as its config.json has them
        transformers.LlamaConfig,
        SMALL | {
            "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3,
            "rope_theta": 100000, "tie_word_embeddings": True, "max_position_embeddings": 8192,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["one file", "sharded", "without a generation config"])
def test_what_loads_is_scored_as_it_is(kind, form, checkpoint):
    """Hidden states times head are the logits of the model as transformers loads it, and decoding
    with the cache gives them too."""
    config_class, fields = KINDS[kind]
    folder = checkpoint(config_class, **fields)
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if form == "sharded":
        (folder / "model.safetensors").unlink()
        own.save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").exists()
    if form == "without a generation config":
        (folder / "generation_config.json").unlink()
    policy = load_policy(folder)
    ids = torch.randint(400, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = own(ids).logits
        whole = policy.hidden(ids) @ policy.head.T
        cache = preallocated_cache(policy.model, 20)
        steps = [policy.hidden(ids[:, at : at + 1], cache) for at in range(20)]
        decoded = torch.cat(steps, dim=1) @ policy.head.T
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)
    for name, value in own.state_dict().items():  # the probes have changed nothing
        assert torch.equal(policy.model.state_dict()[name], value)


def test_superfluous_tensors_that_transformers_knows_of_do_no_harm(llama):
    """Old Llama checkpoints carry their rotary frequencies, and some tied ones carry the head."""
    edit_json(llama / "config.json", tie_word_embeddings=True)
    weights = load_file(llama / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    load_policy(llama)


# --------------------------------------------------------------------- weights that do not belong
def test_weights_of_a_compiled_model_are_refused(llama):
    """transformers would take none of them, and train random weights."""
    edit_weights(llama, lambda name, value: (f"_orig_mod.{name}", value))
    with pytest.raises(
        ValueError, match="missing: lm_head.* and 18 more; .*model: _orig_mod.lm_head"
    ):
        load_policy(llama)


def test_a_missing_tensor_is_named(llama):
    edit_weights(llama, lambda name, value: None if name == "model.norm.weight" else (name, value))
    with pytest.raises(ValueError, match="missing: model.norm.weight.*save_pretrained"):
        load_policy(llama)


def test_a_superfluous_tensor_is_named(llama):
    weights = load_file(llama / "model.safetensors") | {"v_head.summary.weight": torch.ones(1, 32)}
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not of this model: v_head.summary.weight"):
        load_policy(llama)


def test_a_vocabulary_of_another_size_is_named(llama):
    edit_json(llama / "config.json", vocab_size=700)
    with pytest.raises(ValueError, match=r"another shape .*embed_tokens.weight \(\d+, 32\) for"):
        load_policy(llama)


def test_more_tokens_than_rows_are_refused(llama):
    """Without this, the first evaluation would look up a row that is not there."""
    rows = 300
    edit_json(llama / "config.json", vocab_size=rows)
    edit_weights(
        llama, lambda name, value: (name, value[:rows].clone() if len(value) > rows else value)
    )
    with pytest.raises(ValueError, match="tokenizer has .* tokens .* only 300 rows"):
        load_policy(llama)


# ------------------------------------------------------------------------ folders of another kind
def test_quantised_weights_are_refused(llama):
    edit_json(llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantised weights .*unquantised"):
        load_policy(llama)


@pytest.mark.parametrize("beside_a_model", [True, False])
def test_an_adapter_is_refused(beside_a_model, llama):
    (llama / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not beside_a_model:
        (llama / "config.json").unlink()
        (llama / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter .*merge it"):
        load_policy(llama)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_damaged_file_is_named(name, llama):
    (llama / name).write_text("")
    with pytest.raises(ValueError, match=f"{name} is damaged .*fetch it again"):
        load_policy(llama)


def test_a_tokenizer_of_another_form_is_named(llama):
    (llama / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="tokenizer.json of .* cannot be read"):
        load_policy(llama)


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "runs/nothing/grpo", "./nothing", "../nothing"]
)
def test_a_path_that_does_not_exist_is_no_riddle(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"there is no folder {path}"):
        load_policy(path)


def test_a_file_or_an_empty_folder_is_no_riddle(llama, tmp_path):
    with pytest.raises(ValueError, match="is a file"):
        load_policy(llama / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        load_policy(tmp_path / "empty")


def test_a_template_that_fails_in_its_own_code_is_refused(tmp_path):
    template = "{{ messages[0].content + 1 }}"  # raises TypeError
    with pytest.raises(ValueError, match="chat template fails at .*TypeError"):
        load_policy(foreign_checkpoint(tmp_path, "byte-level", template))


# ------------------------------------------------------- played and scored under one distribution
PHI3 = SMALL | {
    "hidden_size": 32, "max_position_embeddings": 4096, "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 4,
        "short_factor": [1.0] * 4, "original_max_position_embeddings": 64,
    },
}  # fmt: skip
DYNAMIC = GROUPED | {
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
}
OPT = SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1}


@torch.no_grad()
def difference_between_playing_and_scoring(policy, tokens):
    """Of logits: decoded with the cache, one token at a time, and in one pass."""
    ids = torch.randint(300, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = preallocated_cache(policy.model, tokens)
    steps = [policy.hidden(ids[:, at : at + 1], cache) for at in range(tokens)]
    decoded = torch.cat(steps, dim=1) @ policy.head.T
    return (decoded - policy.hidden(ids) @ policy.head.T).abs().max().item()


@pytest.mark.parametrize(
    "kind, config_class, fields",
    [
        ("longrope", transformers.Phi3Config, PHI3),
        ("dynamic", transformers.LlamaConfig, DYNAMIC),
    ],
)
def test_frequencies_that_depend_on_the_length_are_refused(kind, config_class, fields, checkpoint):
    """Only where an episode can become long enough to change them."""
    policy = load_policy(checkpoint(config_class, **fields))
    check_length(policy.model.config, max_tokens=64)
    assert difference_between_playing_and_scoring(policy, tokens=64) < 1e-4
    assert difference_between_playing_and_scoring(policy, tokens=100) > 1e-2
    with pytest.raises(ValueError, match=rf"\({kind}\) .* more than 64 .* is 65, lower it to 64"):
        check_length(policy.model.config, max_tokens=65)


def test_frequencies_of_each_kind_of_layer_are_looked_at():
    coding = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    config = transformers.Gemma3TextConfig()
    config.rope_parameters = {"full_attention": coding, "sliding_attention": {"rope_theta": 1.0}}
    with pytest.raises(ValueError, match="longrope"):
        check_length(config, max_tokens=65)


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_frequencies_that_do_not_depend_on_the_length_are_taken(kind, checkpoint):
    coding = {
        "rope_type": kind, "factor": 2.0, "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    if kind == "llama3":
        coding |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = checkpoint(
        transformers.LlamaConfig, **GROUPED, max_position_embeddings=64, rope_parameters=coding
    )
    policy = load_policy(folder)
    check_length(policy.model.config, max_tokens=64)
    assert difference_between_playing_and_scoring(policy, tokens=64) < 1e-4


def test_layers_that_drop_out_in_training_mode_cannot_recompute(checkpoint):
    """OPT's layers do, and transformers recomputes a layer only in training mode."""
    policy = load_policy(checkpoint(transformers.OPTConfig, **OPT))
    with pytest.raises(ValueError, match="leave out --gradient-checkpointing, or set its dropout"):
        policy.recompute()


@pytest.mark.parametrize(
    "config_class, fields",
    [
        (transformers.OPTConfig, OPT | {"dropout": 0.0}),
        (transformers.LlamaConfig, GROUPED | {"attention_dropout": 0.5}),
        (transformers.GPT2Config, SMALL | {"resid_pdrop": 0.5, "attn_pdrop": 0.5}),
    ],
)
def test_a_pass_with_gradient_is_the_pass_without(config_class, fields, checkpoint):
    """The dropout of modules inside a layer stays off."""
    policy = load_policy(checkpoint(config_class, **fields))
    policy.recompute()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        played = policy.hidden(ids)
    torch.testing.assert_close(policy.hidden(ids).detach(), played, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------- context length
@pytest.mark.parametrize(
    "config_class, fields",
    [
        (transformers.GPT2Config, SMALL | {"n_positions": 700}),
        (transformers.OPTConfig, OPT | {"max_position_embeddings": 700}),
    ],
)
def test_more_tokens_than_learned_positions_are_refused(config_class, fields, checkpoint):
    policy = load_policy(checkpoint(config_class, **fields))
    check_length(policy.model.config, max_tokens=700)
    with pytest.raises(ValueError, match="700 positions: --max-tokens is 701, lower it to 700"):
        check_length(policy.model.config, max_tokens=701)


def test_a_run_with_more_tokens_than_positions_does_not_begin(checkpoint):
    folder = checkpoint(transformers.GPT2Config, **SMALL | {"n_positions": 700})
    config = Config(model=str(folder), max_tokens=1500)
    config.resolve()
    with pytest.raises(SystemExit, match="cannot begin: .* 700 positions"):
        load(config, {"grpo": ARMS["grpo"]})


def test_a_rotary_model_beyond_its_maximum_gets_a_note(llama, capsys):
    config = load_policy(llama).model.config
    check_length(config, max_tokens=config.max_position_embeddings)
    assert "note" not in capsys.readouterr().err
    check_length(config, max_tokens=config.max_position_embeddings + 1)
    assert "made for texts of at most 2048 tokens" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- soft caps
def test_a_cap_on_small_logits_is_refused_by_its_field(checkpoint):
    """With its own initialisation, Gemma 2's logits are so small that 30 tanh(x / 30) is x."""
    folder = checkpoint(transformers.Gemma2Config, **GROUPED | {"initializer_range": 0.02})
    with pytest.raises(ValueError, match="final_logit_softcapping is 30"):
        load_policy(folder)


def test_a_cap_that_no_field_tells_of_is_found(checkpoint, monkeypatch):
    folder = checkpoint(transformers.Gemma2Config, **GROUPED | {"initializer_range": 0.02})
    monkeypatch.setattr("model_checks.SOFT_CAPS", ())
    with pytest.raises(ValueError, match="changes its logits after the head"):
        load_policy(folder)


def test_a_cap_that_is_switched_off_is_no_cap(checkpoint):
    """Nor is one on the scores of attention, which the model computes itself."""
    policy = load_policy(
        checkpoint(transformers.Gemma2Config, **GROUPED, final_logit_softcapping=None)
    )
    assert difference_between_playing_and_scoring(policy, tokens=20) < 1e-4


# ------------------------------------------------------- attention that is called by parameter name
def test_a_model_may_name_the_mask_of_its_attention(checkpoint):
    """Doge does."""
    policy = load_policy(checkpoint(transformers.DogeConfig, **GROUPED))
    assert policy.model.config._attn_implementation == "packed_sdpa"
    assert difference_between_playing_and_scoring(policy, tokens=20) < 1e-4


# -------------------------------------------------------------- a tokenizer that changes its texts
@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),  # Llama 2
        normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")]),
        normalizers.Sequence(
            [normalizers.NFD(), normalizers.StripAccents(), normalizers.Replace(" ", "▁")]
        ),
        normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" ", "▁")]),
    ],
)
def test_a_tokenizer_that_changes_a_text_is_refused(normalizer, tmp_path):
    folder = foreign_checkpoint(tmp_path, "sentencepiece")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizer
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="the tokenizer makes .* of .* adds and changes nothing"):
        load_policy(folder)


def test_a_byte_level_tokenizer_that_puts_a_space_before_is_refused(llama):
    """RoBERTa's does."""
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (llama / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="the tokenizer makes ' .* adds and changes nothing"):
        load_policy(llama)


# ------------------------------------------------------------------------------- the clock of a run
@pytest.mark.parametrize("before", ["", "\n", "\n\n"])
def test_no_template_tells_todays_date(before, tmp_path):
    """SmolLM3's asks for it: another day would be another prompt."""
    dated = "{{ strftime_now('%d %B %Y') }}, {{ strftime_now('%A %-d. %b %H:%M') }}"
    policy = load_policy(foreign_checkpoint(tmp_path, "byte-level", before + dated + CHAT_TEMPLATE))
    shown = policy.tokenizer.decode(policy.prompt("s", [], "o"))
    assert shown.startswith(before + "26 July 2024, Friday 26. Jul 00:00<|im_start|>system")
    policy.save(tmp_path / "saved")  # the template is saved as it was
    saved = (tmp_path / "saved" / "chat_template.jinja").read_text()
    assert saved == before + dated + CHAT_TEMPLATE


def test_a_run_is_compared_by_its_first_prompt(tiny):
    """A resumed run whose template now writes another prompt is another run."""
    config = Config(device="cpu")
    config.resolve()
    prompt = first_prompt(tiny, config)
    text = b"".join(tiny.bytes_of[token] for token in prompt).decode()
    env = make_env(config.env)
    assert env.system in text and env.reset(EVAL_SEEDS) in text
    origins = [origin_of(config, {}, ids) for ids in (prompt, prompt, prompt[1:])]
    assert origins[0] == origins[1]
    assert origins[0] | {"prompt": ""} == origins[2] | {"prompt": ""}
    assert origins[0] != origins[2]
