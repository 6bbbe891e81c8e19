"""Models of Transformers that become ours: what was exported to the last bit, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.adapters import write_base
from helpers.commands import BAD_DATA, CANNOT_CREATE, NO_INPUT, USAGE, assert_error
from helpers.exported import CAPPED, PLAIN_ODD, assert_refused, edit, exported, imported
from helpers.tools import tiny_config
from safetensors.torch import load_file, save_file

from hotlap.cli import main
from hotlap.model.import_hf import cropped
from hotlap.model.stock import EMBEDDING, HEAD, normalised
from hotlap.model.weights import load_model

WEIGHTS, KEPT, CPU = "model.safetensors", "hotlap/embedding.safetensors", torch.device("cpu")
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def made(tmp_path_factory, random_model, tiny_tokenizer) -> Path:
    """Exports of a model for each class."""
    folder = tmp_path_factory.mktemp("made")
    for kind, fields in (("apertus", PLAIN_ODD), ("nanochat", CAPPED)):
        shape = tiny_config(**fields | {"document_masks": False})
        exported(write_base(folder / f"{kind}-base", random_model(shape), tiny_tokenizer), kind)
    return folder


@pytest.fixture
def apertus(made, tmp_path) -> Path:
    shutil.copytree(made / "apertus", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def nanochat(made, tmp_path) -> Path:
    shutil.copytree(made / "nanochat", tmp_path / "hf")
    return tmp_path / "hf"


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors in a file by names with __ for dots; None removes one."""
    found = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path)


@pytest.mark.parametrize("kind", ["apertus", "nanochat"])
def test_an_export_comes_back_bit_for_bit(made, kind):
    base, back = made / f"{kind}-base", imported(made / kind, f"{kind}-back")
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        assert (base / name).read_bytes() == (back / name).read_bytes(), name


def test_without_the_rows_that_an_export_keeps_an_embedding_means_the_same(apertus):
    shutil.rmtree(apertus / "hotlap")
    assert_means(imported(apertus), load_file(apertus / WEIGHTS)[EMBEDDING])


def test_rows_that_are_of_other_weights_are_not_used(apertus, capsys):
    rows = load_file(apertus / WEIGHTS)[EMBEDDING].flip(0)
    change(apertus / WEIGHTS, **{EMBEDDING: rows})
    assert_means(imported(apertus), rows)
    assert "is of other weights, and is not used" in capsys.readouterr().err


def assert_means(folder: Path, rows: torch.Tensor) -> None:
    """What our models read of the embedding in a folder is these rows."""
    found = load_file(folder / WEIGHTS)["embedding.weight"]
    torch.testing.assert_close(normalised(found), rows, rtol=2e-6, atol=1e-7)


def test_rows_with_less_than_our_rms_are_those_after_our_norm(apertus):
    shutil.rmtree(apertus / "hotlap")
    rows = load_file(apertus / WEIGHTS)[EMBEDDING] * torch.linspace(0, 1, 317)[:, None]
    change(apertus / WEIGHTS, **{EMBEDDING: rows})
    assert_means(imported(apertus), rows)


@pytest.mark.parametrize("share", [2, 1.001])
def test_longer_rows_are_refused(apertus, capsys, share):
    change(apertus / WEIGHTS, **{EMBEDDING: share * load_file(apertus / WEIGHTS)[EMBEDDING]})
    assert_refused(capsys, apertus, f"{EMBEDDING} has a row whose RMS is {share}; our models divide rows")


def test_a_tied_head_becomes_one_of_its_own(nanochat):
    change(nanochat / WEIGHTS, **{HEAD: None})
    edit(nanochat / "config.json", tie_word_embeddings=True)
    found = load_file(imported(nanochat) / WEIGHTS)
    assert torch.equal(found["head.weight"], found["embedding.weight"])


def test_bfloat16_becomes_float32(made, tmp_path):
    half = exported(made / "apertus-base", "half", "--dtype", "bfloat16")
    rounded, found = load_file(half / WEIGHTS), load_model(imported(half), CPU, torch.float32)[0]
    assert torch.equal(found.head.weight, rounded[HEAD].float())
    assert found.config.qk_gain == 1.296875  # 1.3 in bfloat16


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llama"}, "model_type='llama' cannot be imported; known: apertus, nanochat"),
        ({"model_type": None}, "model_type=None cannot be imported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "silu"}, "hidden_act='silu' is not supported; it must be xielu"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 is not supported"),
        ({"rms_norm_eps": None}, "rms_norm_eps=1e-05 is not supported"),  # Apertus' default
        ({"intermediate_size": 128}, "intermediate_size=128 is not supported; it must be 256"),
        ({"head_dim": 64}, "head_dim=64 is not supported"),
        ({"sliding_window": 32}, "sliding_window=32 is not supported"),
        ({"layer_types": ["sliding_attention"]}, "layer_types=['sliding_attention'] is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5}}, "rope_type='llama3' is not"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta=10000.0 is not"),
        ({"rope_parameters": None}, "rope_type='llama3' is not"),  # Apertus' default
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_theta": None},
            "rope_theta=None is not supported",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type='linear' is not"),  # beside rope_parameters
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type='linear' is not"),
        ({"rope_parameters": [1]}, "rope_parameters=[1] must be an object"),
        ({"num_attention_heads": 3}, "width=64 is not a multiple of heads=3"),
        ({"num_key_value_heads": "2"}, "kv_heads='2' must be of type int"),
        ({"hidden_size": 64.0}, "hidden_size=64.0 must be a whole number"),
        ({"num_hidden_layers": 10**7}, "parameters, but the tensors there are of less"),
        ({"num_hidden_layers": 1}, "model.layers.1.attention_layernorm.weight: unknown"),
        ({"vocab_size": 316}, "lm_head.weight: of shape [317, 64], not [316, 64]"),
    ],
)
def test_a_configuration_that_is_none_of_ours_is_refused_by_name(apertus, capsys, fields, said):
    edit(apertus / "config.json", **fields)
    assert_refused(capsys, apertus, said)


def test_a_context_that_fits_no_memory_is_refused(apertus, capsys):
    edit(apertus / "config.json", max_position_embeddings=10**12)
    code = main(["import", "hf", str(apertus), "--out", str(apertus.parent / "out")])
    assert_error(capsys, code, USAGE, f"the model in {apertus} needs at least 256,000.0 GB")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mlp.act_fn.alpha_p", 0.542, "our models have no xIELU that is not ReLU²"),
        ("mlp.act_fn.alpha_n", 0.1, "our models have no xIELU that is not ReLU²"),
        ("mlp.act_fn.beta", 0.5, "is 0.5 instead of 0"),
        ("attention_layernorm.weight", 1.001, "a norm with other weights than 1"),
        ("self_attn.k_norm.weight", 1.1, "q_norm and k_norm have weights that differ"),
    ],
)
def test_a_tensor_that_we_have_no_place_for_is_refused_by_name(apertus, capsys, name, value, said):
    name = f"{LAYER}.{name}"
    before = load_file(apertus / WEIGHTS)[name]
    change(apertus / WEIGHTS, **{name: torch.full_like(before, value)})
    assert_refused(capsys, apertus, said)


def test_the_softcap_is_theirs(nanochat):
    edit(nanochat / "config.json", final_logit_softcapping=20.0)
    assert load_model(imported(nanochat), CPU, torch.float32)[0].config.softcap == 20


def test_a_shorter_context_that_would_change_the_windows_is_refused():
    shape = tiny_config(context=1024, window_pattern="SL")
    with pytest.raises(ValueError, match="context=512 would shorten the model's attention windows"):
        cropped({}, shape, 512)
    assert cropped({}, shape, 128)[1].windows == (128,) * shape.layers


def test_tensors_that_differ_are_listed(nanochat, capsys):
    change(nanochat / WEIGHTS, **{HEAD: None, "extra": torch.ones(1)})
    assert_refused(capsys, nanochat, "extra: unknown; lm_head.weight: missing")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(nanochat, capsys, number):
    head = load_file(nanochat / WEIGHTS)[HEAD]
    head[3, 5] = number
    change(nanochat / WEIGHTS, **{HEAD: head})
    assert_refused(capsys, nanochat, f"not all numbers are finite in {HEAD}")


def test_a_damaged_file_is_named(nanochat, capsys):
    (nanochat / WEIGHTS).write_bytes((nanochat / WEIGHTS).read_bytes()[:-1])
    assert_refused(capsys, nanochat, WEIGHTS)


def test_pickled_weights_are_refused(nanochat, capsys):
    (nanochat / WEIGHTS).rename(nanochat / "pytorch_model.bin")
    assert_refused(capsys, nanochat, "pytorch_model.bin is pickled, which may run code")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "one.safetensors"}}, "names 'one.safetensors', and there is no such file"),
        ({"weight_map": {"a": "../hf/x.safetensors"}}, "names '../hf/x.safetensors'"),
        ({"weight_map": [1]}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(nanochat, capsys, index, said):
    (nanochat / WEIGHTS).rename(nanochat / "x.safetensors")
    (nanochat / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert_refused(capsys, nanochat, said)


def test_a_folder_without_a_model_is_named_and_nothing_is_written_over(apertus, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert_error(capsys, main(["import", "hf", "none", "--out", out]), NO_INPUT, "no config.json in none")
    assert_error(capsys, main(["import", "hf", str(apertus), "--out", str(apertus)]), CANNOT_CREATE, "exists")


def test_hotlap_says_how_to_open_it(apertus, capsys):
    code = main(["chat", str(apertus), "-p", "Hi"])
    assert_error(capsys, code, BAD_DATA, "of a model of Transformers (apertus)", "hotlap import hf")
