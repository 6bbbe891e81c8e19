"""Tokenizers of Transformers that become ours: the same ids of text, and no special token missing."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers.adapters import write_base
from helpers.exported import CAPPED, assert_refused, edit, exported, imported
from helpers.tools import LINES, tiny_config
from safetensors.torch import load_file
from tokenizers import models

from hotlap.model.stock import HEAD
from hotlap.model.tokenizer import GPT2_PATTERN, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, byte_level
from hotlap.model.weights import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory, random_model, tiny_tokenizer) -> Path:
    """The export of a model with a softcap."""
    base = tmp_path_factory.mktemp("made") / "base"
    return exported(write_base(base, random_model(tiny_config(**CAPPED)), tiny_tokenizer))


@pytest.fixture
def nanochat(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "hf")
    return tmp_path / "hf"


def foreign(tokenizer: Tokenizer, special: tuple[str, ...], pattern: str = SPLIT_PATTERN) -> str:
    """A tokenizer.json with the text tokens of ours, and these special ones."""
    model = json.loads(tokenizer.definition)["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    found = byte_level(models.BPE(model["vocab"], merges), pattern)
    found.add_special_tokens(list(special))
    return found.to_str()


def vocab(fields: dict) -> list[tuple[str, int]]:
    return [*fields["model"]["vocab"].items()]


NANOCHAT = (
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
)  # fmt: skip


def test_nanochats_special_tokens_are_ours_and_those_it_lacks_follow(nanochat, tiny_tokenizer, capsys):
    (nanochat / "tokenizer.json").write_text(foreign(tiny_tokenizer, NANOCHAT))
    model, found = load_model(imported(nanochat), CPU, torch.float32)
    assert found.special["<|tool_start|>"] == 289 + 5 and found.special["<|system_start|>"] == 289 + 9
    assert set(found.special) == set(SPECIAL_TOKENS) and model.config.vocab_size == 317
    assert capsys.readouterr().err == ""  # there were rows to spare


def test_missing_special_tokens_get_rows_that_are_the_mean(nanochat, tiny_tokenizer, capsys):
    text = foreign(tiny_tokenizer, tuple(f"<|extra {i}|>" for i in range(28)))
    (nanochat / "tokenizer.json").write_text(text)
    edit(nanochat / "config.json", bos_token_id=290)
    model, found = load_model(imported(nanochat), CPU, torch.float32)
    assert found.bos == 290 and found.vocab_size == 317 + 10 and model.config.vocab_size == 384
    weights = load_file(nanochat / "model.safetensors")
    assert torch.equal(model.head.weight[:317], weights[HEAD])
    assert (
        torch.allclose(model.head.weight[317:], weights[HEAD].mean(0))
        and model.embedding.weight.isfinite().all()
    )
    said = capsys.readouterr().err
    assert "has no <|system_start|>, <|system_end|>" in said and "the mean of all" in said


@pytest.mark.parametrize("gpt2", [False, True])
def test_text_has_the_ids_of_the_tokenizer_that_was_imported(nanochat, tiny_tokenizer, gpt2):
    text = foreign(tiny_tokenizer, NANOCHAT, GPT2_PATTERN)
    if gpt2:  # whose pattern is a part of the byte level
        text = json.dumps(
            json.loads(text)
            | {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            }
        )
    (nanochat / "tokenizer.json").write_text(text)
    theirs, found = tokenizers.Tokenizer.from_str(text), Tokenizer.load(imported(nanochat) / "tokenizer.json")
    for line in (*LINES, "  a  b\n\n 12345's 日本", "", " \t "):
        assert found.encode(line) == theirs.encode(line).ids and found.decode(found.encode(line)) == line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"normalizer": {"type": "NFC"}}, "normalises text"),
        (lambda t: t | {"model": t["model"] | {"dropout": 0.1}}, "dropout=0.1 is not supported"),
        (lambda t: t | {"model": t["model"] | {"type": "Unigram"}}, "'Unigram'; it must be byte-level BPE"),
        (lambda t: t | {"model": t["model"] | {"merges": t["model"]["merges"][::-1]}}, "not in the order"),
        (lambda t: t | {"pre_tokenizer": {"type": "Whitespace"}}, "does not split text by one regular"),
        (lambda t: t | {"added_tokens": [*t["added_tokens"], {"id": 298, "content": "x"}]}, "'x' is a token"),
        (lambda t: t | {"added_tokens": t["added_tokens"][1:]}, "special ids do not follow its 289 text ids"),
        (
            lambda t: t | {"model": t["model"] | {"vocab": {n.replace("Ġ", "▁"): i for n, i in vocab(t)}}},
            "not in the alphabet",
        ),
        (lambda t: t | {"model": {}}, "is not a tokenizer"),
        (lambda t: {}, "is not a tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_ours_is_refused(nanochat, tiny_tokenizer, capsys, change, said):
    text = json.dumps(change(json.loads(foreign(tiny_tokenizer, NANOCHAT))))
    (nanochat / "tokenizer.json").write_text(text)
    assert_refused(capsys, nanochat, "tokenizer.json", said)


def test_what_the_library_cannot_read_is_refused(nanochat, capsys):
    edit(nanochat / "tokenizer.json", version=3)
    assert_refused(capsys, nanochat, "tokenizer.json: the library tokenizers cannot read the tokenizer")


def test_a_model_without_a_tokenizer_is_refused(nanochat, capsys):
    (nanochat / "tokenizer.json").unlink()
    assert_refused(capsys, nanochat, "there is no tokenizer.json")
