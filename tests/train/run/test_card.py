"""Model cards."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.small_runs import small_run, write_conversations

from hotlap.model.config import AdapterExportConfig, counts_of
from hotlap.model.export import export_adapter
from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.model.lora import adapter_count
from hotlap.model.weights import load_config, model_folder
from hotlap.train.config import LoopConfig, SFTConfig
from hotlap.train.data.conversations import SOURCES
from hotlap.train.data.licences import UNKNOWN, description_of
from hotlap.train.data.preferences import DOWNLOADED, SAMPLED
from hotlap.train.data.prompts import SOURCES as ASKED
from hotlap.train.data.sources import DATASETS, TEXTS
from hotlap.train.evaluation.kept_scores import KEPT
from hotlap.train.pretrain import pretrain
from hotlap.train.run.card import CARD, Made, data_of, not_for, write_card
from hotlap.train.run.folder import base_of
from hotlap.train.run.report import write_report
from hotlap.train.sft import fine_tune


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a base model and one that is fine-tuned from it."""
    folder = tmp_path_factory.mktemp("card")
    base = small_run(folder, loop=LoopConfig(2))
    pretrain(base)
    data = write_conversations(folder / "talks.jsonl")
    fine_tune(SFTConfig(folder / "sft", batch_rows=4, base=base.out, data=(str(data),), loop=LoopConfig(1)))
    return folder


@pytest.fixture
def runs(tmp_path, trained) -> Path:
    """A copy of it; the base that the fine-tuned model names stays where it was."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def row(card: str, name: str) -> list[str]:
    """The cells of a table's row, by the first of them."""
    (found,) = re.findall(rf"^\| {re.escape(name)} \|.*\|$", card, re.MULTILINE)
    return [cell.strip() for cell in found.strip("|").split("|")][1:]


def test_a_run_ends_with_a_card_and_the_report_names_it(trained):
    for name in ("run", "sft"):
        text = (trained / name / CARD).read_text()
        assert f"({CARD})" in (trained / name / "report.md").read_text()
        (trained / name / CARD).unlink()
        write_report(trained / name)
        assert (trained / name / CARD).read_text() == text


def test_its_numbers_are_those_of_the_checkpoints(trained):
    card = (trained / "sft" / CARD).read_text()
    assert "A chat model, which answers messages." in card
    for stage, run in (("pretrain", "run"), ("sft", "sft")):
        folder = model_folder(trained / run)
        state, shape = json.loads((folder / "state.json").read_text()), load_config(folder)
        machine = json.loads((trained / run / "machine.json").read_text())
        data = trained / ("text.txt" if stage == "pretrain" else "talks.jsonl")
        flops = nanochat_flops(meta_model(shape)) * state["tokens"]
        numbers, sources = re.findall(rf"^\| {stage} \|(.*)\|$", card, re.MULTILINE)
        assert [cell.strip() for cell in numbers.split("|")] == [
            f"`{trained / run}`", f"{state['tokens']:,}", f"{flops:.3g}", f"{state['seconds']:,.0f} s",
            machine["device"],
        ]  # fmt: skip
        assert [cell.strip() for cell in sources.split("|")] == [
            f"`{data}`",
            "the user's own data",
            "unknown",
        ]
    counts = counts_of(shape)
    assert row(card, "parameters") == [
        f"{counts['total']:,}, of which {counts['matmul']:,} in matrix products"
    ]
    assert row(card, "made from") == [f"`{trained / 'run'}`"]
    assert "1 layers, width 32" in card and "context 32" in card and f"hotlap chat {trained / 'sft'}" in card


def test_a_base_model_is_not_said_to_converse(trained):
    card = (trained / "run" / CARD).read_text()
    assert "A base model, which continues text." in card and "It was not taught to answer" in card
    assert row(card, "made from") == ["random weights"] and "hotlap chat" not in card


def test_scores_are_those_that_the_evaluation_left(runs):
    facts = {"accuracy": 0.25, "interval": [0.1, 0.5], "n": 1200, "in_training": 3, "date": "today"}
    scores = {"facts": facts | {"device": "a <b> | c"}, "bpb": {"bpb": 1.5}, "core": {"core": 0.125}}
    (runs / "sft" / KEPT).write_text(json.dumps({"scores": scores}))
    card = write_card(runs / "sft").read_text()
    assert row(card, "facts") == ["0.2500", "0.1000 to 0.5000", "1,200", "3", "today", "a (b) / c"]
    assert row(card, "bpb") == ["1.5000", "n/a", "n/a", "not checked", "n/a", "n/a"]
    assert row(card, "core")[0] == "0.1250"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"scores": 3}', '{"scores": {"facts": 1}}'])
def test_scores_that_cannot_be_read_are_not_there(runs, text):
    (runs / "sft" / KEPT).write_text(text)
    card = write_card(runs / "sft").read_text()
    assert "| facts |" not in card and "## How to use it" in card


@pytest.mark.parametrize("gone", ["config.json", "machine.json", "metrics.jsonl", "checkpoints", "all"])
def test_a_run_without_some_files_has_a_card_that_says_so(runs, gone, caplog):
    run = runs / "sft"
    for path in [run / gone] if gone != "all" else list(run.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    card = write_card(run).read_text()
    assert ("n/a" in card) and "## What it is not for" in card
    if gone in ("checkpoints", "all"):
        assert row(card, "parameters") == row(card, "made from") == ["n/a"] and f"{run}" in caplog.text


def test_a_base_that_is_gone_is_named_without_numbers(runs, trained, tmp_path):
    (trained / "run").rename(tmp_path / "elsewhere")
    card = write_card(runs / "sft").read_text()
    (tmp_path / "elsewhere").rename(trained / "run")
    assert re.search(rf"^\| n/a \| `{trained / 'run'}` \| n/a \| n/a \| n/a \| n/a \|$", card, re.MULTILINE)
    assert row(card, "made from") == [f"`{trained / 'run'}`"]


def test_names_of_users_are_text_and_one_line(runs):
    run = (runs / "sft").rename(runs / "a`b|c<script>\x1b[31m\nd")
    card = write_card(run).read_text()
    assert "\x1b" not in card and card.startswith("# Model card: `a'b/c(script)[31m d`\n")
    assert not re.search("^(?!    ).*<script>", card, re.MULTILINE)  # but in a block of code


def test_data_with_names_have_their_licences_whatever_their_weight(tmp_path):
    base = small_run(tmp_path, loop=LoopConfig(1), data="pydocs", tokenizer="bpe")
    base = replace(base, model=replace(base.model, vocab_size=300, context=128))
    pretrain(base)
    fine_tune(
        SFTConfig(tmp_path / "sft", batch_rows=4, base=base.out, data=("tasks:0.5",), loop=LoopConfig(1))
    )
    card = (tmp_path / "sft" / CARD).read_text()
    assert "| pretrain | `pydocs` | the documentation inside Python | PSF licence, version 2 |" in card
    assert "| sft | `tasks:0.5` | built-in facts" in card


def test_every_name_that_a_stage_knows_has_a_description():
    named = {"pretrain": (*TEXTS, *DATASETS), "sft": SOURCES, "dpo": (DOWNLOADED, SAMPLED)}
    named["rl"] = (*ASKED, "reasoning-gym:spell_backward")
    for stage, names in named.items():
        assert [name for name in names if description_of(name, stage) is UNKNOWN] == []


def test_data_of_one_name_are_what_they_are_in_their_stage():
    stages = [Made(Path("a"), {"stage": "sft"}, {"data": ["tasks", "bigbench:0.02", "tasks.jsonl:2"]})]
    stages.append(Made(Path("b"), {"stage": "dpo"}, {"data": ["tasks"], "base": "a"}))
    facts, bigbench, own, pairs = data_of(stages)[4:-1]
    assert "built-in facts" in facts and "Natural Instructions" in bigbench and "unknown" in own
    assert "English prose" in data_of([Made(Path("a"), {"stage": "pretrain"}, {"data": "bigbench"})])[4]
    assert "the base's own answers" in pairs and "must not be scored on it" in "".join(not_for(stages))


@pytest.mark.parametrize("weight", ["", ":2", ":0.5", ":.5", ":2e-1", ":1E2", ": 3"])
def test_a_benchmark_in_the_data_is_named_however_its_weight_is_written(weight):
    stages = [Made(Path("a"), {"stage": "sft"}, {"data": [f"bigbench{weight}"]})]
    assert "Natural Instructions" in data_of(stages)[4] and "must not be scored on it" in "".join(
        not_for(stages)
    )


def test_a_run_with_adapters_says_so_and_counts_no_gradients_of_frozen_weights(trained, tmp_path):
    data = (str(trained / "talks.jsonl"),)
    config = SFTConfig(tmp_path / "lora", batch_rows=4, base=trained / "sft", data=data, loop=LoopConfig(1))
    fine_tune(replace(config, lora_rank=4))
    card = (tmp_path / "lora" / CARD).read_text()
    shape = load_config(model_folder(tmp_path / "lora"))
    counts, attention = counts_of(shape), 12 * shape.width * sum(shape.windows)
    per_token = 4 * counts["matmul"] + 6 * adapter_count(shape, 4) + attention
    assert row(card, "sft (LoRA, rank 4)")[:3] == [f"`{tmp_path / 'lora'}`", "128", f"{per_token * 128:.3g}"]
    assert row(card, "adapters")[0].startswith(f"{adapter_count(shape, 4):,} parameters (LoRA of rank 4)")
    assert f"they need `{model_folder(trained / 'sft')}`" in card
    assert row(card, "made from") == [f"`{trained / 'run'}`, then `{trained / 'sft'}`"]
    export_adapter(AdapterExportConfig(tmp_path / "lora", tmp_path / "peft"))
    fine_tune(replace(config, out=tmp_path / "full", base=tmp_path / "peft"))
    card = (tmp_path / "full" / CARD).read_text()
    assert row(card, "n/a (LoRA, rank 4)")[:2] == [f"`{tmp_path / 'peft'}`", "n/a"]
    assert row(card, "made from")[0].startswith(f"`{trained / 'run'}`, then `{trained / 'sft'}/checkpoints/")


def test_a_base_is_found_from_another_folder_than_the_run_was_trained_in(trained, tmp_path, monkeypatch):
    run, config = tmp_path / "runs" / "sft", {"base": "runs/base", "out": "runs/sft"}
    (run / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(trained)
    assert base_of(run, config) == tmp_path / "runs" / "base"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir()
    assert base_of(Path("runs/sft"), config) == Path("runs/base")
    best = "runs/base/checkpoints/best"  # is no folder
    assert base_of(run, config | {"base": best}) == Path(best)
    elsewhere = {"base": "runs/other", "out": "new/sft"}
    assert base_of(run, elsewhere) == Path("runs/other")
    assert base_of(run, config | {"base": "/gone"}) == Path("/gone")
