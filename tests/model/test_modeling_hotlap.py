"""Our own class for Transformers computes what our models compute, also where hotlap is not installed."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers.adapters import write_base
from helpers.tools import assert_as_good, tiny_config

from hotlap.cli import main
from hotlap.common.errors import DataError
from hotlap.model.engine import Engine
from hotlap.model.export_code import CODE, code_config, code_weights, config_of
from hotlap.model.sampling import Sampling
from hotlap.model.weights import load_model

pytest.importorskip("transformers", reason="Transformers needs Python 3.11")
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hotlap.model.modeling_hotlap import HotlapConfig, HotlapForCausalLM

PLAIN = {
    **dict.fromkeys(("value_embeddings", "residual_scalars", "smear", "backout"), False),
    "softcap": 0.0,
    "window_pattern": "L",
    "qk_gain": 1.0,
}
CONFIGS = {
    "all extras": {"bigram_rows": 5000},
    "an odd number of layers": {"layers": 3},
    "no extra": PLAIN,
    "bigrams": PLAIN | {"bigram_rows": 5000},
    "value embeddings": PLAIN | {"value_embeddings": True},
    "residual scalars": PLAIN | {"residual_scalars": True},
    "smear": PLAIN | {"smear": True},
    "backout": PLAIN | {"backout": True},
    "a softcap": PLAIN | {"softcap": 15.0},
    "a gain": PLAIN | {"qk_gain": 1.2},
    "windows": PLAIN | {"window_pattern": "SSL"},
    "grouped heads": {"kv_heads": 1},
}


def ids_of(B, T):
    return torch.randint(300, (B, T), generator=torch.Generator().manual_seed(1))


def difference(actual, exact):
    assert exact.abs().max() > 1
    return float((actual - exact).abs().max())


def same_model(model):
    """A model of ours as one of Transformers."""
    copy = HotlapForCausalLM(HotlapConfig(**code_config(model.config)))
    copy.load_state_dict(code_weights(model.state_dict()))
    return copy.eval()


@pytest.fixture(scope="module")
def pair(random_model):
    """A model of ours with every extra and windows of 128 of 512 tokens, of grouped heads, and its copy."""
    model = random_model(tiny_config(vocab_size=300, layers=4, context=512, kv_heads=1, bigram_rows=5000))
    with torch.no_grad():
        for name in ("smear_scale", "x0_scale", "residual_scale", "backout_scale"):
            getattr(model, name).add_(0.5)  # so that a wrong token before shows
        model.head.weight[289:] = 0  # special tokens, which would end an answer
    return model.requires_grad_(False), same_model(model).requires_grad_(False)


def generated(copy, ids, **options):
    out = copy.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0, **options)
    return out[:, ids.shape[1] :]


def padded_left(rows):
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 7), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return ids, mask


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_ours_with_each_extra(random_model, fields):
    model = random_model(tiny_config(**({"layers": 4, "context": 512} | fields)))
    copy, ids = same_model(model), ids_of(1, 200)
    assert len(ids[0]) > model.config.short_window
    with torch.no_grad():
        exact = model(ids)
        for implementation in ("sdpa", "eager"):
            copy.set_attn_implementation(implementation)
            assert difference(copy(ids).logits, exact) <= 1e-5, implementation


def test_greedy_answers_are_those_of_our_engine(pair, tiny_tokenizer):
    model, copy = pair
    ids = ids_of(1, 150)
    engine = Engine(model, tiny_tokenizer)
    (answer,) = engine.complete([ids[0].tolist()], Sampling(temperature=0.0, max_tokens=32))
    assert len(answer) == 32 and generated(copy, ids).tolist() == [answer]


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 40},
        {"prompt_lookup_num_tokens": 3},  # which crops the cache
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_cache_gives_the_same_answer(pair, options):
    _, copy = pair
    ids = ids_of(1, 110).repeat(1, 2)[:, :150]  # the answer begins within what was said already
    assert torch.equal(generated(copy, ids, **options), generated(copy, ids))


def test_beams_are_the_same_with_a_cache(pair):
    _, copy = pair
    ids = ids_of(2, 120)
    assert torch.equal(generated(copy, ids, num_beams=3), generated(copy, ids, num_beams=3, use_cache=False))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_on_by_its_new_and_its_old_name(pair, name):
    model, copy = pair
    ids, cache = ids_of(2, 140), DynamicCache(config=copy.config)
    logits = [copy(part, **{name: cache}).logits for part in (ids[:, :130], ids[:, 130:])]
    assert difference(torch.cat(logits, 1), model(ids)) <= 1e-5


def test_rows_padded_on_the_left_are_as_they_are_alone(pair):
    model, copy = pair
    rows = [ids_of(1, 150)[0], ids_of(1, 90)[0], ids_of(1, 3)[0]]
    ids, mask = padded_left(rows)
    logits, answers = copy(ids, attention_mask=mask).logits, generated(copy, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        assert difference(logits[i, -len(row) :], model(row[None])[0]) <= 1e-5
        assert torch.equal(answers[i], generated(copy, row[None])[0])


def test_packed_rows_are_as_they_are_alone(pair):
    """By position_ids that start again, as Transformers' collators give them."""
    model, copy = pair
    rows = [ids_of(1, 150), ids_of(1, 60)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    logits = copy(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    assert difference(logits, torch.cat([model(row) for row in rows], 1)) <= 1e-5


def test_loss_and_gradients_are_ours_also_with_checkpointing(random_model):
    model = random_model(tiny_config(layers=3, context=512))
    copy, ids = same_model(model), ids_of(2, 140)
    labels = ids.clone()
    labels[:, :20] = -100
    ours = model(ids[:, :-1], labels[:, 1:].clamp(min=-1), reduction="mean")
    ours.backward()
    exact = code_weights({name: p.grad for name, p in model.named_parameters()})
    for checkpointing in (False, True):
        if checkpointing:
            copy.train().activation_checkpointing_enable()
        copy.zero_grad()
        loss = copy(ids, labels=labels, use_cache=False).loss
        loss.backward()
        assert abs(loss - ours) < 1e-5
        for name, parameter in copy.named_parameters():
            torch.testing.assert_close(parameter.grad, exact[name], atol=1e-5, rtol=1e-3, msg=name)


def test_bfloat16_is_as_near_as_ours(random_model):
    config, ids = tiny_config(layers=4, context=512), ids_of(2, 200)
    exact = random_model(config)(ids).detach()
    plain = random_model(config, compute_dtype=torch.bfloat16).for_inference()
    copy = same_model(random_model(config)).to(torch.bfloat16)
    with torch.no_grad():
        assert_as_good(copy(ids).logits, plain(ids), exact.double())


def test_only_the_logits_that_are_kept_are_computed(pair):
    _, copy = pair
    ids = ids_of(2, 20)
    whole = copy(ids).logits
    assert whole.dtype == torch.float32
    torch.testing.assert_close(copy(ids, logits_to_keep=3).logits, whole[:, -3:])


def test_ids_are_needed(pair):
    with pytest.raises(ValueError, match="input_ids, not inputs_embeds"):
        pair[1](inputs_embeds=torch.zeros(1, 3, 64))


@pytest.fixture
def engines_attention():
    """Attention of an engine such as vLLM, and what it is asked: (layer, window, scale, its own argument)."""
    asked = []

    def attend(module, query, key, value, attention_mask, scaling, sliding_window=None, notes=None, **_):
        asked.append((module.layer_idx, sliding_window, scaling, notes))
        return torch.zeros_like(query).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("vllm", attend)
    yield asked
    del ALL_ATTENTION_FUNCTIONS._global_mapping["vllm"]


@pytest.mark.parametrize("fields", [{"smear": True}, {"bigram_rows": 99}], ids=str)
def test_engines_see_each_layer_once_and_the_token_before_is_refused(random_model, engines_attention, fields):
    for extra in ({}, fields):
        model = random_model(tiny_config(**({"layers": 3, "context": 512, "smear": False} | extra)))
        copy, ids = same_model(model), ids_of(1, 9)
        copy.config._attn_implementation = "vllm"
        ask = partial(copy.model, ids, position_ids=torch.arange(9)[None], use_cache=False, notes="mine")
        if extra:
            with pytest.raises(ValueError, match=r"smear and bigrams need the token before each.*vLLM"):
                ask()
        else:
            ask()
            seen = [(i, window, 32**-0.5, "mine") for i, window in enumerate((128, 128, None))]
            assert engines_attention == seen
    masks = dict.fromkeys(("full_attention", "sliding_attention"))  # as generate_batch gives them
    with pytest.raises(ValueError, match="smear and bigrams need the token before each"):
        same_model(model)(ids, masks, torch.arange(9)[None], cache=object())


def command(*words):
    assert main([*map(str, words)]) == 0


def run_elsewhere(code, folder):
    """Run Python where hotlap is not to be found."""
    places = dict.fromkeys(("HOME", "HF_HOME"), str(folder)) | {"HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-I", "-c", code]
    done = subprocess.run(words, cwd=folder, env=os.environ | places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_export_needs_no_hotlap_and_comes_back_bit_for_bit(pair, tiny_tokenizer, tmp_path, capsys):
    model, _ = pair
    write_base(tmp_path / "base", model, tiny_tokenizer)
    command("export", "hf", tmp_path / "base", "--out", tmp_path / "export")
    said = capsys.readouterr().err
    assert "value_embeddings=True" in said and "trust_remote_code=True" in said
    assert "trust_remote_code=True" in (tmp_path / "export" / "README.md").read_text()
    code = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("export", trust_remote_code=True)
model.save_pretrained("saved")
AutoTokenizer.from_pretrained("export").save_pretrained("saved")
ids = torch.arange(150)[None]
torch.save(model(ids).logits.detach(), "logits.pt")
base = AutoModel.from_pretrained("saved", trust_remote_code=True)
assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
assert not [name for name in sys.modules if name.split(".")[0] == "hotlap"]
"""
    run_elsewhere(code, tmp_path)
    assert difference(torch.load(tmp_path / "logits.pt"), model(torch.arange(150)[None])) <= 1e-5
    assert (tmp_path / "saved" / CODE.name).read_text() == CODE.read_text()
    for name in ("export", "saved"):
        command("import", "hf", tmp_path / name, "--out", tmp_path / f"{name}-back")
        back, _ = load_model(tmp_path / f"{name}-back", torch.device("cpu"), torch.float32)
        assert back.config == model.config
        for name, tensor in model.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_theta": 10000.0}, "rope_theta=10000.0 is not supported; it must be 100000.0"),
        ({"sliding_window": 64}, "sliding_window=64 is not supported; it must be 128"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types=.* is not supported"),
        ({"num_hidden_layers": 10**12}, "layer_types=.* must have num_hidden_layers=10+ kinds"),
        ({"hidden_size": 63}, "our models cannot have its shape: width=63"),
        ({"smear": "yes"}, "our models cannot have its shape: smear='yes'"),
        ({"final_logit_softcapping": -1.0}, "softcap=-1.0"),
        ({"hotlap": {"window_pattern": "X"}}, "window_pattern='X'"),
        ({"hotlap": []}, "layer_types=.* is not supported"),
    ],
    ids=str,
)
def test_a_changed_export_is_not_taken_for_ours(fields, said):
    config = tiny_config(context=512)
    given = code_config(config) | {"hotlap": {"window_pattern": "SSSL", "document_masks": True}}
    assert config_of(given) == config
    with pytest.raises(DataError, match=said):
        config_of(given | fields)
    with pytest.raises(DataError, match="hidden_size is missing"):
        config_of({name: value for name, value in given.items() if name != "hidden_size"})
