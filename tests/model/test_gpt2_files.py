"""GPT-2 of Transformers, in and out: equal to Transformers itself, or refused by name."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.commands import BAD_DATA, USAGE, assert_error
from helpers.exported import edit, exported, imported
from helpers.gpt2 import END, write_gpt2
from helpers.tools import LINES
from safetensors.torch import load_file, save_file

from hotlap.cli import main
from hotlap.model import import_tokenizer
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling
from hotlap.model.tokenizer import SPECIAL_TOKENS, Tokenizer
from hotlap.model.weights import load_model, stage

transformers = pytest.importorskip("transformers")
CPU, WEIGHTS, LAYER = torch.device("cpu"), "model.safetensors", "transformer.h.1"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> Path:
    """A GPT-2 as Transformers has it, and in `back` beside it ours."""
    folder = write_gpt2(tmp_path_factory.mktemp("gpt2") / "hf", tiny_tokenizer)
    imported(folder)
    return folder


@pytest.fixture
def hf(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "hf")
    return tmp_path / "hf"


def ours(folder: Path):
    return load_model(folder, CPU, torch.float32)


def theirs(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_same_model(a: Path, b: Path) -> None:
    first, second = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (a / "config.json").read_text() == (b / "config.json").read_text()
    assert (a / "tokenizer.json").read_text() == (b / "tokenizer.json").read_text()


def test_logits_and_greedy_answers_are_those_of_transformers(made):
    (model, tokenizer), reference = ours(made.parent / "back"), theirs(made)
    ids = torch.randint(tokenizer.text_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids).logits
        torch.testing.assert_close(model(ids)[..., : expected.shape[-1]], expected, rtol=0, atol=1e-5)
    prompts = [ids[0, :9].tolist(), ids[1, :30].tolist()]
    answers = Engine(model, tokenizer).complete(prompts, Sampling(temperature=0, max_tokens=32))
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=32, eos_token_id=None
        )
        assert answer == whole[0, len(prompt) :].tolist()


def test_the_tokenizer_is_that_of_its_files_with_our_special_tokens_above(made, tmp_path):
    tokenizer = Tokenizer.load(made.parent / "back" / "tokenizer.json")
    reference = transformers.GPT2Tokenizer.from_pretrained(made)
    assert all(tokenizer.encode(line) == reference.encode(line) for line in LINES)
    assert [tokenizer.special[name] for name in SPECIAL_TOKENS] == [
        reference.convert_tokens_to_ids(END) + i for i in range(len(SPECIAL_TOKENS))
    ]
    shutil.copytree(made, tmp_path / "hf")
    reference.save_pretrained(tmp_path / "hf")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "hf" / name).unlink(missing_ok=True)
    assert_same_model(imported(tmp_path / "hf"), made.parent / "back")


def test_new_ids_are_at_most_as_likely_as_the_average_one(made):
    """Rows of zeros would not be: all logits of OpenAI's models are far below 0."""
    model, tokenizer = ours(made.parent / "back")
    assert model.config.vocab_size % 64 == 0 and stage(made.parent / "back") == "pretrain"
    with torch.no_grad():
        known = model(torch.arange(64)[None]).softmax(-1)
    assert (known[..., tokenizer.text_size + 1 :] <= 1 / (tokenizer.text_size + 1)).all()


def test_old_files_have_other_names_masks_and_the_head(hf, made):
    old = {name.removeprefix("transformer."): t for name, t in load_file(hf / WEIGHTS).items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(old | {"lm_head.weight": old["wte.weight"].clone()}, hf / WEIGHTS)
    edit(hf / "config.json", n_ctx=64, task_specific_params={"text-generation": {"do_sample": True}})
    assert_same_model(imported(hf), made.parent / "back")


def test_an_export_comes_back_to_the_last_bit_and_computes_the_same_there(made, tmp_path):
    shutil.copytree(made.parent / "back", tmp_path / "model")
    out = exported(tmp_path / "model")
    assert_same_model(imported(out, "again"), tmp_path / "model")
    ids = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(out)(ids).logits, ours(tmp_path / "model")[0](ids), rtol=0, atol=1e-5
        )


def test_a_shorter_context_keeps_the_first_positions(hf, made, capsys):
    out = hf.parent / "short"
    assert main(["import", "hf", str(hf), "--out", str(out), "--context", "16"]) == 0
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(ours(out)[0](ids), ours(made.parent / "back")[0](ids))
    assert ours(out)[0].config.context == 16
    for context, text in (("65", "must be at most the model's 64"), ("0", "--context 0 must be at least 1")):
        code = main(["import", "hf", str(hf), "--out", str(hf.parent / "no"), "--context", context])
        assert_error(capsys, code, USAGE, text)


def test_without_a_tokenizer_it_gets_openai_s(hf, made, monkeypatch):
    given = Tokenizer.load(made.parent / "back" / "tokenizer.json")
    monkeypatch.setattr(import_tokenizer, "gpt2", lambda: given)
    (hf / "vocab.json").unlink()
    assert_same_model(imported(hf), made.parent / "back")


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"n_inner": 64}, "n_inner=64"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"n_head": 3}, "heads=3"),
        ({"n_layer": "2"}, "n_layer='2'"),
        ({"n_layer": 3}, "transformer.h.2.attn.c_attn.bias: missing"),
        ({"n_positions": 32}, "transformer.wpe.weight: of shape [64, 64], not [32, 64]"),
        ({"n_layer": 10**6}, "is of a model of"),
        ({"n_embd": 10**30, "n_head": 10**28}, ""),
    ],
)
def test_what_our_gpt_2_has_not_is_refused_by_name(hf, capsys, fields, text):
    edit(hf / "config.json", **fields)
    assert_refused(capsys, hf, text)


def assert_refused(capsys, folder: Path, *parts: str) -> None:
    code = main(["import", "hf", str(folder), "--out", str(folder.parent / "out")])
    assert_error(capsys, code, BAD_DATA, str(folder), *parts)
    assert not (folder.parent / "out").exists()


def test_damaged_files_are_refused_by_name(hf, capsys):
    good = load_file(hf / WEIGHTS)
    save_file(good | {"lm_head.weight": good["transformer.wte.weight"] + 1}, hf / WEIGHTS)
    assert_refused(capsys, hf, "lm_head.weight differs from transformer.wte.weight")
    save_file(
        good | {f"{LAYER}.attn.c_attn.weight": good[f"{LAYER}.attn.c_attn.weight"].T.contiguous()},
        hf / WEIGHTS,
    )
    assert_refused(capsys, hf, "h.1.attn.c_attn.weight: of shape [192, 64], not [64, 192]")
    (hf / WEIGHTS).rename(hf / "pytorch_model.bin")
    assert_refused(capsys, hf, "pytorch_model.bin is pickled")


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("merges.txt", None, "there is no merges.txt"),
        ("merges.txt", b"#version: 0.2\n", "its merges are not in the order of its ids"),
        ("merges.txt", b"\xff\xfe", "merges.txt beside it is not UTF-8 text"),
        ("vocab.json", b"[]", "no JSON object"),
        ("vocab.json", b'{"a": 0}', "vocab.json: it has no <|endoftext|>"),
    ],
)
def test_a_vocabulary_that_cannot_be_ours_is_refused(hf, capsys, name, content, text):
    (hf / name).unlink()
    if content is not None:
        (hf / name).write_bytes(content)
    assert_refused(capsys, hf, text)
