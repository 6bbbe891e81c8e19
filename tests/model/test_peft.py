"""PEFT's files: what is written means the same by PEFT's rule, and what is read is all supported."""

import json
from pathlib import Path

import pytest
import torch
from helpers.adapters import ALPHA, PLAIN, RANK, write_adapted, write_base
from helpers.commands import USAGE, assert_error
from helpers.tools import tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from hotlap.cli import main
from hotlap.common.errors import DataError
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT
from hotlap.model.peft import PEFT_CONFIG, PEFT_WEIGHTS
from hotlap.model.weights import find_models, load_model

CPU, IDS = torch.device("cpu"), torch.arange(60)[None]
SHAPE = tiny_config(**PLAIN)
PREFIX = "base_model.model."


@pytest.fixture
def base(tmp_path, random_model, tiny_tokenizer) -> Path:
    return write_base(tmp_path / "base", random_model(SHAPE), tiny_tokenizer)


@pytest.fixture
def run(base, tiny_tokenizer) -> Path:
    write_adapted(base.parent / "run", base, SHAPE, tiny_tokenizer)
    return base.parent / "run"


@pytest.fixture
def folder(run) -> Path:
    assert main(["export", "adapter", str(run), "--out", str(run.parent / "peft")]) == 0
    return run.parent / "peft"


def halves_exchanged(weight: Tensor, heads: int) -> Tensor:
    return torch.cat([half for head in weight.chunk(heads) for half in head.chunk(2)[::-1]])


def stock(model: GPT) -> dict[str, Tensor]:
    """The layers' weights as Transformers' Apertus has and names them."""
    c, weights = model.config, model.state_dict()
    found = {}
    for i in range(c.layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        sizes = [c.width, *[c.kv_heads * c.head_dim] * 2]
        q, k, v = weights[f"{ours}.attention.qkv.weight"].split(sizes)
        found[f"{theirs}.self_attn.q_proj"] = halves_exchanged(q, c.heads)
        found[f"{theirs}.self_attn.k_proj"] = halves_exchanged(k, c.kv_heads)
        found[f"{theirs}.self_attn.v_proj"] = v
        found[f"{theirs}.self_attn.o_proj"] = weights[f"{ours}.attention.proj.weight"]
        found[f"{theirs}.mlp.up_proj"] = weights[f"{ours}.mlp.fc.weight"]
        found[f"{theirs}.mlp.down_proj"] = weights[f"{ours}.mlp.proj.weight"]
    return found


def weights_of(path: Path) -> dict[str, Tensor]:
    return stock(load_model(path, CPU, torch.float32)[0])


def change(folder: Path, **fields) -> None:
    old = json.loads((folder / PEFT_CONFIG).read_text())
    (folder / PEFT_CONFIG).write_text(json.dumps(old | fields))


def test_what_is_written_means_the_same_by_pefts_rule(base, run, folder):
    fields, tensors = json.loads((folder / PEFT_CONFIG).read_text()), load_file(folder / PEFT_WEIGHTS)
    before, after = weights_of(base), weights_of(run)
    assert set(tensors) == {f"{PREFIX}{name}.lora_{x}.weight" for name in before for x in "AB"}
    assert (fields["r"], fields["lora_alpha"]) == (RANK, ALPHA)
    for name, weight in before.items():
        A, B = (tensors[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
        assert name.rsplit(".", 1)[1] in fields["target_modules"]
        assert torch.allclose(weight + ALPHA / RANK * B @ A, after[name], atol=1e-5), name


def test_a_folder_of_pefts_is_the_same_model_as_the_run_bit_for_bit(run, folder):
    one, other = (load_model(path, CPU, torch.float32) for path in (run, folder))
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True))
    assert one[1].sha256 == other[1].sha256
    assert sorted(path.name for path in folder.iterdir()) == [PEFT_CONFIG, PEFT_WEIGHTS]
    assert folder in find_models(folder.parent)


def test_an_export_names_the_base_where_it_is_now(base, run):
    (base.parent / "moved").mkdir()
    base.rename(base.parent / "moved" / "base")
    run.rename(base.parent / "moved" / "run")
    out = base.parent / "out"
    assert main(["export", "adapter", str(base.parent / "moved" / "run"), "--out", str(out)]) == 0
    load_model(out, CPU)


def test_rslora_and_half_precision_and_some_target_modules_are_honoured(base, folder):
    tensors = load_file(folder / PEFT_WEIGHTS)
    tensors = {
        name: t.bfloat16() for name, t in tensors.items() if "v_proj" in name or "layers.1.mlp.up" in name
    }
    save_file(tensors, folder / PEFT_WEIGHTS)
    change(folder, use_rslora=True, target_modules=["v_proj", "model.layers.1.mlp.up_proj"], peft_version="1")
    before, after = weights_of(base), weights_of(folder)
    for name, weight in before.items():
        if f"{PREFIX}{name}.lora_A.weight" not in tensors:
            assert torch.equal(after[name], weight), name
            continue
        A, B = (tensors[f"{PREFIX}{name}.lora_{x}.weight"].float() for x in "AB")
        assert torch.allclose(weight + ALPHA / RANK**0.5 * B @ A, after[name], atol=1e-5), name


def test_fields_of_peft_that_are_off_are_accepted(folder):
    change(
        folder, use_dora=False, modules_to_save=None, rank_pattern={}, loftq_config={},
        init_lora_weights=True, layers_to_transform=None, megatron_core="megatron.core", lora_dropout=0.1,
    )  # fmt: skip
    load_model(folder, CPU)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("layers_to_transform", [0]),
        ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}), ("init_lora_weights", "pissa"),
        ("fan_in_fan_out", True), ("lora_bias", True), ("peft_type", "LOHA"), ("r", 0), ("lora_alpha", "x"),
        ("target_modules", ["gate_proj"]), ("target_modules", ".*proj"), ("base_model_name_or_path", None),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(folder, name, value):
    change(folder, **{name: value})
    with pytest.raises(DataError, match=rf"adapter_config\.json: {name}"):
        load_model(folder, CPU)


def test_a_base_that_is_no_model_here_is_named(folder):
    change(folder, base_model_name_or_path="somebody/model")
    with pytest.raises(FileNotFoundError, match="adapters for the base somebody/model"):
        load_model(folder, CPU)


def test_tensors_that_are_missing_or_of_another_rank_are_named(folder):
    change(folder, r=RANK - 1)
    with pytest.raises(DataError, match=r"does not fit the model: .*lora_A\.weight: saved \[4, "):
        load_model(folder, CPU)


def test_pickled_adapters_are_refused(folder):
    (folder / PEFT_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(DataError, match=r"adapter_model\.bin is pickled, which may run code"):
        load_model(folder, CPU)


def test_a_base_that_has_changed_is_refused(base, folder, random_model):
    save_file(random_model(SHAPE, seed=9).state_dict(), base / "model.safetensors")
    with pytest.raises(DataError, match="for other weights than"):
        load_model(folder, CPU)


def test_a_model_without_adapters_has_none_to_export(base, capsys):
    code = main(["export", "adapter", str(base), "--out", str(base.parent / "out")])
    assert_error(capsys, code, USAGE, "has no adapters", "--lora-rank")
    assert not (base.parent / "out").exists()


def test_what_only_hotlap_can_use_says_so(tmp_path, random_model, tiny_tokenizer, capsys):
    shape: GPTConfig = tiny_config()
    base = write_base(tmp_path / "base", random_model(shape), tiny_tokenizer)
    write_adapted(tmp_path / "run", base, shape, tiny_tokenizer)
    assert main(["export", "adapter", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert (
        "the base has value_embeddings, residual_scalars, smear, backout, softcap: only hotlap"
        in capsys.readouterr().err
    )


def test_peft_itself_computes_the_same(run, folder):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    c, weights = SHAPE, stock(load_model(run.parent / "base", CPU, torch.float32)[0])
    config = transformers.ApertusConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=4 * c.width,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.ApertusForCausalLM(config)
    model.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()}, strict=False)
    merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    for name, weight in weights_of(run).items():
        assert torch.allclose(merged[f"{name}.weight"], weight, atol=1e-5), name
