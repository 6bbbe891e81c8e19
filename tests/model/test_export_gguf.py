"""GGUF files: llama.cpp computes, splits text and chats as our engine does."""

import dataclasses
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.adapters import PLAIN, write_adapted, write_base
from helpers.commands import CANNOT_CREATE, USAGE, assert_error
from helpers.exported import PROMPTS
from helpers.llama_cpp import LlamaCpp
from helpers.tools import tiny_config
from torch import Tensor

from hotlap.cli import main
from hotlap.model.conversation import render_prompt, spoken
from hotlap.model.engine import Engine
from hotlap.model.gpt import GPT
from hotlap.model.sampling import Sampling
from hotlap.model.tokenizer import (
    GPT2_PATTERN,
    SPECIAL_TOKENS,
    Tokenizer,
    from_ranks,
    train_bpe,
    train_characters,
)
from hotlap.model.weights import load_model

gguf = pytest.importorskip("gguf", reason="needs the extra export: pip install 'hotlap[export]'")
CPU = torch.device("cpu")
SHAPE = tiny_config(**PLAIN | {"qk_gain": 1.3})  # 320 rows, for 300 ids of the tokenizer
IDS = torch.randint(289, (40,), generator=torch.Generator().manual_seed(1)).tolist()
PIECES = [
    "a", "Z", "é", "ß", "日本", "한국", "न", "\u0301", "مر", "ⅷ", "²", "٣", "0", "12", "345", "6789",
    ".", "!?", "_", "'", "'s", "'LL", "'Re", "\u2019", "-", "—", "🙂", "👩\u200d💻", "\ufeff",
    "\u200b", "\u00ad", " ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85",
    "\x0b", "\x1c", "\x00", "\u180e", "\U0010ffff", "def f(x):\n    return x\n",
    "<|bos|>", "<|assistant_end|>",
]  # fmt: skip


def texts() -> list[str]:
    """What tokenizers disagree about: 250 texts of letters, numbers, marks and spaces of all kinds."""
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=1 + i % 12)) for i in range(250)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_model, tiny_tokenizer) -> Path:
    """A plain model with two query heads of one key head, every weight of it random. The likeliest tokens
    are ASCII, or the end of an answer."""
    model = random_model(SHAPE)
    readable = [i for i in range(289) if tiny_tokenizer.token_bytes(i).isascii()]
    readable.append(tiny_tokenizer.special["<|assistant_end|>"])
    with torch.no_grad():
        model.embedding.weight.mul_(torch.linspace(0.5, 2, 320)[:, None])
        model.head.weight[[i for i in range(320) if i not in readable]] *= 0.1
    return write_base(tmp_path_factory.mktemp("gguf") / "model", model, tiny_tokenizer)


@pytest.fixture(scope="module")
def llama(folder) -> LlamaCpp:
    return LlamaCpp(exported(folder), SHAPE.context)


def exported(model: Path, *flags: str) -> Path:
    """What `hotlap export gguf` writes beside a model."""
    out = model.parent / f"{model.name}{''.join(flags)}.gguf"
    assert main(["export", "gguf", str(model), "--out", str(out), *flags]) == 0
    return out


@torch.no_grad()
def our_logprobs(model: Path) -> Tensor:
    """Of the ids of the tokenizer, as those of further rows are never sampled."""
    gpt, tokenizer = load_model(model, CPU, torch.float32)
    return gpt(torch.tensor([IDS]))[0, :, : tokenizer.vocab_size].log_softmax(-1)


def test_log_probabilities_are_ours(folder, llama):
    ours = our_logprobs(folder)
    assert ours.std() > 0.5
    torch.testing.assert_close(llama.logprobs(IDS, ours.shape[1]), ours, rtol=1e-6, atol=1e-5)


def test_the_likeliest_tokens_are_ours(folder, llama):
    model, tokenizer = load_model(folder, CPU, torch.float32)
    ids = [tokenizer.bos, *tokenizer.encode("cat")]
    expected = Engine(model, tokenizer).complete([ids], Sampling(temperature=0.0, max_tokens=32))[0]
    assert len(expected) == 32
    assert [token["id"] for token in llama.continued(ids, 32)] == expected


@pytest.mark.parametrize(
    ("dtype", "noise", "bytes_each"), [("f16", 3e-3, 2), ("bf16", 2e-2, 2), ("q8_0", 6e-2, 34 / 32)]
)
def test_smaller_types_are_near(folder, dtype, noise, bytes_each):
    ours, path = our_logprobs(folder), exported(folder, "--dtype", dtype)
    difference = (LlamaCpp(path, SHAPE.context).logprobs(IDS, ours.shape[1]) - ours).square().mean().sqrt()
    assert difference < noise * ours.std()
    matrices = SHAPE.layers * 11 * SHAPE.width**2 + 2 * 300 * SHAPE.width
    assert matrices * bytes_each < path.stat().st_size < matrices * bytes_each + 20_000


def test_adapters_are_merged(folder, tmp_path, tiny_tokenizer):
    write_adapted(tmp_path / "run", folder, SHAPE, tiny_tokenizer)
    ours = our_logprobs(tmp_path / "run")
    assert (ours - our_logprobs(folder)).abs().max() > 0.1
    theirs = LlamaCpp(exported(tmp_path / "run"), SHAPE.context).logprobs(IDS, ours.shape[1])
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("pattern", ["ours", "gpt2"])
def test_texts_have_our_ids(tmp_path, pattern):
    tokenizer = train_bpe(texts() * 5, 2000)
    if pattern == "gpt2":
        ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.text_size)}
        tokenizer = from_ranks(ranks, GPT2_PATTERN)
    llama = LlamaCpp(exported(write_any(tmp_path / "model", tokenizer)), 32)
    given = [*texts(), *SPECIAL_TOKENS, "", " " * 40, "\n" * 9, "1" * 50, "a" * 500]
    assert {text: llama.tokens(text) for text in given} == {text: tokenizer.encode(text) for text in given}


def write_any(folder: Path, tokenizer: Tokenizer, **fields: object) -> Path:
    """A model with a tokenizer."""
    shape = PLAIN | {"vocab_size": tokenizer.vocab_size, "layers": 1, "width": 64, "context": 32} | fields
    return write_base(folder, GPT(tiny_config(**shape)).init_weights(), tokenizer)


def test_conversations_have_our_ids(llama, tiny_tokenizer):
    for messages in PROMPTS:
        if any("tool_calls" in message for message in messages):
            continue  # llama.cpp refuses them, as it does not know how calls are written
        prompt = llama.post("/apply-template", messages=messages)["prompt"]
        assert llama.tokens(prompt, special=True) == render_prompt(messages, tiny_tokenizer)


def test_answers_are_ours_and_end_where_ours_do(folder, llama):
    model, tokenizer = load_model(folder, CPU, torch.float32)
    engine, ends = Engine(model, tokenizer), set()
    for text in ("Hello", "What is 2 + 3?", "jumps", "def"):
        messages = [{"role": "user", "content": text}]
        ids = render_prompt(messages, tokenizer)
        request = engine.add(ids, Sampling(temperature=0.0, max_tokens=24))
        while request.finish_reason is None:
            engine.step()
        reply = llama.chat(messages, 24)
        (choice,) = reply["choices"]
        assert choice["message"]["content"].strip() == spoken(request.answer, tokenizer)
        assert choice["finish_reason"] == request.finish_reason
        assert reply["usage"]["prompt_tokens"] == len(ids)
        ends.add(request.finish_reason)
    assert ends == {"stop", "length"}


def test_a_call_of_a_tool_ends_an_answer(tmp_path, random_model, tiny_tokenizer):
    """llama.cpp does not run it, and what the model would say of a result would be made up."""
    model = random_model(SHAPE)
    call = tiny_tokenizer.special["<|tool_end|>"]
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[call] = model.hidden(torch.tensor([IDS]))[0, -1]
    llama = LlamaCpp(exported(write_base(tmp_path / "model", model, tiny_tokenizer)), SHAPE.context)
    reply = llama.server.handle_completions({"prompt": IDS, "n_predict": 9, "temperature": 0})
    assert reply["choices"][0]["finish_reason"] == "stop" and reply["usage"]["completion_tokens"] == 1


def test_a_message_cannot_spell_a_special_token(llama):
    messages = [{"role": "user", "content": "<|user_end|>"}]
    error = llama.post("/apply-template", messages=messages)["error"]
    assert "must not contain the special token <|user_end|>" in error["message"]


def test_a_base_model_has_no_chat_template(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    for stage, chats in (("pretrain", False), ("sft", True)):
        (tmp_path / "base" / "state.json").write_text(json.dumps({"stage": stage}))
        path = exported(tmp_path / "base")
        assert ("tokenizer.chat_template" in gguf.GGUFReader(path).fields) == chats
        path.unlink()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"softcap": 15.0, "smear": True}, "smear=True, softcap=15.0"),
        ({"window_pattern": "SL", "context": 256}, "window_pattern='SL'"),
        ({"value_embeddings": True}, "value_embeddings=True"),
    ],
)
def test_what_llama_cpp_has_not_is_refused_by_name(tmp_path, capsys, tiny_tokenizer, fields, said):
    model = write_any(tmp_path / "model", tiny_tokenizer, **{"layers": 2} | fields)
    assert_refused(capsys, model, USAGE, said, "--preset tiny-portable")


def test_tokenizers_that_llama_cpp_has_not_are_refused(tmp_path, capsys, tiny_tokenizer):
    characters = write_any(tmp_path / "characters", train_characters("abc"))
    assert_refused(capsys, characters, USAGE, "single characters", "--tokenizer bpe")
    ranks = {tiny_tokenizer.token_bytes(i): i for i in range(289)}
    words = write_any(tmp_path / "words", from_ranks(ranks, r"\w+|\W+"))
    assert_refused(capsys, words, USAGE, r"splits text by", "hotlap tokenizer")
    single = write_any(tmp_path / "bytes", train_bpe(["a"], 267))
    assert_refused(capsys, single, USAGE, "needs merges", "larger vocabulary")


def assert_refused(capsys, model: Path, code: int, *said: str, flags: tuple[str, ...] = ()) -> None:
    """The export fails with a line that says this, and leaves nothing."""
    before = sorted(model.parent.iterdir())
    out = ["--out", str(model.parent / "new.gguf")]
    assert_error(capsys, main(["export", "gguf", str(model), *out, *flags]), code, *said)
    assert sorted(model.parent.iterdir()) == before


def test_types_that_cannot_hold_the_weights_are_refused(tmp_path, capsys, tiny_tokenizer):
    odd = write_any(tmp_path / "odd", tiny_tokenizer, width=80, heads=1, kv_heads=1)
    assert_refused(capsys, odd, USAGE, "--dtype q8_0", "width=80", "f16", flags=("--dtype", "q8_0"))
    model = GPT(dataclasses.replace(SHAPE, layers=1)).init_weights()
    torch.nn.init.constant_(model.blocks[0].mlp.fc.weight, 7e4)  # written after others
    large = write_base(tmp_path / "large", model, tiny_tokenizer)
    assert_refused(capsys, large, USAGE, "blk.0.ffn_up.weight", "bf16", flags=("--dtype", "f16"))


def test_a_file_is_not_written_over(folder, capsys, tmp_path):
    (tmp_path / "mine.gguf").write_text("mine")
    code = main(["export", "gguf", str(folder), "--out", str(tmp_path / "mine.gguf")])
    assert_error(capsys, code, CANNOT_CREATE, "mine.gguf exists already", "--out")
    assert (tmp_path / "mine.gguf").read_text() == "mine"


def test_a_missing_package_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_refused(capsys, folder, 1, "the package gguf", "pip install 'hotlap[export]'")
