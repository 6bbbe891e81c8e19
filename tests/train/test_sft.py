"""Fine-tuning as a whole: what the roles of a conversation teach, and runs of mixtures."""

import json
from pathlib import Path

import pytest
import torch
from helpers.small_runs import conversation, small_run
from helpers.talks import named, with_a_sum
from helpers.tools import tiny_config

from hotlap.common.options import to_json
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.conversation import parse_answer, render_prompt, spoken
from hotlap.model.engine import Engine
from hotlap.model.messages import call_text
from hotlap.model.sampling import Sampling
from hotlap.model.weights import load_model
from hotlap.train.config import LoopConfig, SFTConfig
from hotlap.train.data.conversation_rows import conversation_rows
from hotlap.train.data.mixtures import parts_of
from hotlap.train.pretrain import pretrain
from hotlap.train.run.metrics import read_metrics
from hotlap.train.sft import fine_tune

LOUD = [{"role": "system", "content": "Be loud."}, *conversation("2 and 3?", "FIVE")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model of a byte-level BPE that has hardly learnt anything."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_config(vocab_size=300, context=64, layers=2, width=64, heads=2, kv_heads=2)
    pretrain(small_run(folder, tokenizer="bpe", model=model, loop=LoopConfig(2, 2, 2)))
    return folder / "run"


def config(base: Path, out: Path, *data: str, steps: int = 2, **fields) -> SFTConfig:
    return SFTConfig(
        out=out, base=base, data=data, batch_rows=4, dtype="float32", compile="off",
        loop=LoopConfig(steps, steps, steps), **fields,
    )  # fmt: skip


def write_talks(path: Path, talks: list[list[dict]]) -> str:
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return str(path)


def test_a_model_learns_to_follow_the_system_message_and_to_call_its_tool(base, tmp_path):
    """The question is the same: only the system message says which answer it is. The short one validates."""
    data = write_talks(tmp_path / "talks.jsonl", [with_a_sum(), LOUD] * 6 + [conversation("a", "b")])
    last = fine_tune(config(base, tmp_path / "sft", data, steps=150))
    assert last["loss"] < 0.02
    model, tokenizer = load_model(tmp_path / "sft", torch.device("cpu"))
    engine = Engine(model.eval(), tokenizer)
    prompts = [render_prompt(talk[:2], tokenizer) for talk in (with_a_sum(), LOUD)]
    brief, loud = engine.complete(prompts, Sampling(temperature=0, max_tokens=20))
    call, result, said = parse_answer(brief, tokenizer)
    assert (call_text(call), result["content"], said["content"]) == ("2+3", "5", "five")
    assert spoken(loud, tokenizer) == "FIVE"


def test_every_row_of_every_mixture_has_a_target(tiny_tokenizer):
    """So that no step, micro-batch or rank is without one: its loss would be 0 / 0."""
    talks = [with_a_sum(), LOUD, *[conversation(f"{i} " * (i % 40), "a") for i in range(1, 200)]]
    for weight in (0.2, 1, 3):
        parts = parts_of([f"talks:{weight}"])
        for rows in conversation_rows(named(talks), tiny_tokenizer, 64, 0, parts).values():
            batch = rows.batch(0, 2 * rows.epoch_rows())
            assert (batch.targets != IGNORE).any(dim=1).all() and batch.weight > 0


def test_a_run_of_an_older_configuration_whose_data_is_a_string_goes_on(base, tmp_path):
    data = write_talks(tmp_path / "talks.jsonl", [conversation(f"{i}", "a") for i in range(20)])
    first = config(base, tmp_path / "sft", data, steps=2)
    fine_tune(first)
    saved = json.loads((tmp_path / "sft/config.json").read_text())
    assert saved["data"] == [data]
    (tmp_path / "sft/config.json").write_text(json.dumps(saved | {"data": data}))
    fine_tune(config(base, tmp_path / "sft", data, steps=4, resume="auto"))
    assert [line["step"] for line in read_metrics(tmp_path / "sft/metrics.jsonl")] == [0, 1, 2, 3]
    assert json.loads(to_json(first))["data"] == [data]


def test_a_run_with_another_mixture_is_no_continuation(base, tmp_path):
    data = write_talks(tmp_path / "talks.jsonl", [conversation(f"{i}", "a") for i in range(20)])
    fine_tune(config(base, tmp_path / "sft", data))
    other = config(base, tmp_path / "sft", f"{data}:2", steps=4, resume="auto")
    with pytest.raises(ValueError, match="was started with another configuration: data: saved"):
        fine_tune(other)
    with pytest.raises(ValueError, match="was started on other data than"):
        fine_tune(config(base, tmp_path / "new", f"{data}:2", steps=4, resume=str(tmp_path / "sft")))
