"""`hotlap sample`: continuations of a text, side by side, each from its own seed."""

import io
import sys
from types import SimpleNamespace

import pytest
from helpers.talker import save_models

from hotlap.cli import main
from hotlap.kernels.dispatch import default_device
from hotlap.model.config import Sampling
from hotlap.model.engine import Engine
from hotlap.model.weights import load_model
from hotlap.serve.terminal.samples import BETWEEN, continuations


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, tiny_tokenizer)
    return folder / "runs"


@pytest.fixture(scope="module")
def engine(models):
    model, tokenizer = load_model(models / "base", default_device())
    return Engine(model.for_inference(), tokenizer, slots=3)


def texts(engine, samples: int, seed: int | None, prompt=(1, 2, 3)) -> list[str]:
    sampling = Sampling(temperature=1.0, max_tokens=12)
    return ["".join(pieces) for pieces in continuations(engine, list(prompt), sampling, samples, seed)]


def test_samples_differ_are_repeatable_and_each_has_the_next_seed(engine):
    found = texts(engine, 7, seed=5)  # more than there are slots
    assert len(set(found)) == 7 and found == texts(engine, 7, seed=5) and not engine.busy
    assert found == [texts(engine, 1, seed=seed)[0] for seed in range(5, 12)]
    assert texts(engine, 1, None) != texts(engine, 1, None)


def test_a_sample_comes_as_it_is_generated(engine):
    (pieces,) = continuations(engine, [1], Sampling(temperature=1.0, max_tokens=12), 1, seed=0)
    assert engine.busy and len([piece for piece in pieces if piece]) > 3 and not engine.busy


def test_without_a_prompt_samples_are_documents_from_their_beginning(models, monkeypatch):
    asked = []
    add = Engine.add
    monkeypatch.setattr(
        Engine, "add", lambda self, ids, *a, **n: asked.append(ids) or add(self, ids, *a, **n)
    )
    assert main(["sample", str(models / "base"), "--max-tokens", "4", "--samples", "2"]) == 0
    tokenizer = load_model(models / "base", default_device())[1]
    assert asked == [[tokenizer.bos]] * 2


@pytest.mark.parametrize("source", ["flag", "file", "pipe"])
def test_the_output_has_the_prompt_and_its_continuations_and_nothing_that_a_terminal_obeys(
    models, capsys, tmp_path, monkeypatch, source
):
    text = "The square \x1b[31m of\n"
    (tmp_path / "prompt.txt").write_text(text)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    given = {
        "flag": ["-p", text],
        "file": ["--prompt-file", str(tmp_path / "prompt.txt")],
        "pipe": ["--prompt-file", "-"],
    }[source]
    command = ["sample", str(models / "talker"), "--samples", "3", "--max-tokens", "6", "--seed", "1"]
    assert main([*command, *given]) == 0
    output = capsys.readouterr().out
    samples = output.removesuffix("\n").split(f"\n{BETWEEN}\n")
    assert len(samples) == 3 and all(sample.startswith("The square [31m of\n") for sample in samples)
    assert len(set(samples)) == 3 and "\x1b" not in output


def test_a_long_text_is_continued_from_its_end_and_the_user_is_told(models, capsys):
    assert main(["sample", str(models / "base"), "-p", "hey " * 500, "--max-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert "the model continues the last 96 of them" in said.err and said.out.startswith("hey hey ")
