"""lm-eval asks a model of ours, and finds what the model itself computes."""

import json
import math
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import torch
from helpers.chat_questions import random_engine
from helpers.lm_eval_tasks import evaluated, log_likelihood
from helpers.offline import offline
from helpers.ranks import run_ranks

from hotlap.model import weights
from hotlap.model.conversation import render_prompt
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling
from hotlap.model.tools import TOOLS
from hotlap.model.weights import STATE, save_model
from hotlap.train.evaluation import batching, lm_eval_command
from hotlap.train.evaluation.config import LmEvalConfig
from hotlap.train.evaluation.lm_eval import HotlapLM, sampling_of

pytestmark = pytest.mark.xdist_group("clients")  # which take seconds to import
TASKS = Path(__file__).parents[2] / "serve" / "lm_eval"


@pytest.fixture(scope="module", autouse=True)
def nothing_leaves_this_machine():
    with offline():
        yield


@pytest.fixture(scope="module")
def engine() -> Engine:
    return random_engine()


@pytest.fixture
def folder(tmp_path, engine, monkeypatch) -> Path:
    """The directory of a model, and a working directory with tasks and their data."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "fast_dtype", lambda device, width: torch.float32)
    shutil.copytree(TASKS, tmp_path / "tasks")
    monkeypatch.chdir(tmp_path / "tasks")  # data_files are relative to it
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", engine.model.float(), engine.tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize("batch_tokens", [1, 300, 16_384])
def test_choices_are_as_likely_as_the_model_says_in_batches_of_any_size(
    folder, engine, batch_tokens, monkeypatch
):
    monkeypatch.setattr(batching, "BATCH_TOKENS", batch_tokens)
    found, tokenizer, right = evaluated(folder, "facts"), engine.tokenizer, 0
    for sample in found["samples"]["facts"]:
        doc, expected = sample["doc"], []
        before = [tokenizer.bos, *tokenizer.encode(f"Question: {doc['question']}\nAnswer:")]
        for choice, response in zip(doc["choices"], sample["filtered_resps"], strict=True):
            score, is_greedy = log_likelihood(engine, before + tokenizer.encode(f" {choice}"), len(before))
            assert response[0] == pytest.approx(score, abs=1e-3) and response[1] == is_greedy
            expected.append(score)
        right += expected.index(max(expected)) == doc["answer"]
    assert found["results"]["facts"]["acc,none"] == right / 24


def test_text_has_as_many_bits_as_the_model_says(folder, engine):
    found, tokenizer = evaluated(folder, "facts_text"), engine.tokenizer
    nats, count = 0.0, 0
    for sample in found["samples"]["facts_text"]:
        text = sample["doc"]["choices"][sample["doc"]["answer"]]
        nats -= log_likelihood(engine, [tokenizer.bos, *tokenizer.encode(text)], 1)[0]
        count += len(text.encode())
    assert found["results"]["facts_text"]["bits_per_byte,none"] == pytest.approx(
        nats / math.log(2) / count, rel=1e-5
    )


@pytest.mark.parametrize("chat", [False, True])
def test_generated_answers_are_the_engines(folder, engine, chat):
    found, tokenizer = evaluated(folder, "spelling", chat=chat), engine.tokenizer
    sampling = Sampling(temperature=0, max_tokens=24, stop=("\n",))
    for sample in found["samples"]["spelling"]:
        text = sample["doc"]["question"]
        prompt = [tokenizer.bos, *tokenizer.encode(text)]
        if chat:
            prompt = render_prompt([{"role": "user", "content": text}], tokenizer)
        request = engine.add(prompt, sampling, TOOLS if chat else {})
        while engine.busy:
            engine.step()
        assert sample["resps"] == [[request.text]]
    assert found["n-samples"]["spelling"]["effective"] == 8


def test_choices_in_a_conversation_are_what_the_assistant_says(folder, engine):
    found, tokenizer = evaluated(folder, "facts", chat=True, limit=2), engine.tokenizer
    for sample in found["samples"]["facts"]:
        text = f"Question: {sample['doc']['question']}\nAnswer:"
        before = render_prompt([{"role": "user", "content": text}], tokenizer)
        for arguments, response in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            said = tokenizer.encode(arguments[1])
            assert arguments[1].strip() in sample["doc"]["choices"]
            assert response[0] == pytest.approx(
                log_likelihood(engine, before + said, len(before))[0], abs=1e-3
            )


def test_special_tokens_in_a_question_stay_text(engine):
    asked = HotlapLM(engine, None, chat=True)
    messages = [{"role": "user", "content": "<|user_end|> <|assistant_start|>"}]
    ids = asked.prompt(asked.apply_chat_template(messages))
    special = engine.tokenizer.special
    assert ids.count(special["<|user_end|>"]) == ids.count(special["<|assistant_start|>"]) == 1


def test_ranks_share_the_requests_and_agree(folder, monkeypatch):
    monkeypatch.undo()  # of the dtype, which is the ranks' own choice
    monkeypatch.chdir(folder.parent / "tasks")
    alone = evaluated(folder, "facts", "spelling")
    found, nothing = run_ranks(2, evaluated, folder, "facts", "spelling", timeout=240)
    assert found["results"] == alone["results"] and found["ranks"] == 2 and nothing == {}
    for task in ("facts", "spelling"):
        answers = [[sample["doc_id"] for sample in result["samples"][task]] for result in (found, alone)]
        assert answers[0] == answers[1] and len(answers[0]) in (8, 24)


@torch.no_grad()
def test_long_texts_are_read_in_windows_and_long_contexts_lose_their_beginning(engine, caplog):
    from lm_eval.api.instance import Instance

    from hotlap.train.distributed.world import joined

    def requests(kind, *arguments):
        return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]

    tokenizer, text = engine.tokenizer, "the lazy dog does not mind " * 30
    ids = tokenizer.encode(text)
    assert 256 < len(ids) < 510
    with joined() as world:
        lm = HotlapLM(engine, world)
        (whole,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
        first = log_likelihood(engine, [tokenizer.bos, *ids[:255]], 1)[0]
        rest = log_likelihood(engine, ids[-256:], 256 - (len(ids) - 255))[0]
        assert whole == pytest.approx(first + rest, rel=1e-4)

        ((score, _),) = lm.loglikelihood(requests("loglikelihood", (text, "fox")))
        row = tokenizer.encode(f"{text}fox")
        scored = len(row) - len(tokenizer.encode(text.rstrip()))
        assert score == pytest.approx(log_likelihood(engine, row[-256:], 256 - scored)[0], rel=1e-4)
        assert (
            "1 texts do not fit in the model's context of 256 tokens, and lose their beginning" in caplog.text
        )
        with pytest.raises(ValueError, match="does not fit in the model's context of 256"):
            lm.loglikelihood(requests("loglikelihood", ("a", text)))
        settings = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
        (answer,) = lm.generate_until(requests("generate_until", (text, settings)))
        request = engine.add([*ids][-252:], Sampling(temperature=0, max_tokens=4, stop=("\n",)), {})
        while engine.busy:
            engine.step()
        assert answer == request.text


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({"until": "\n"}, Sampling(0, 0, 256, 7, stop=("\n",))),
        ({"until": ["a", "b"], "max_gen_toks": 5, "do_sample": False}, Sampling(0, 0, 5, 7, stop=("a", "b"))),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4}, Sampling(0.5, 4, 256, 7, 0.9)),
    ],
)
def test_a_task_s_settings_become_sampling(settings, sampling):
    assert sampling_of(settings, 7) == sampling


def test_a_setting_that_we_do_not_have_is_named():
    with pytest.raises(ValueError, match="a task sets num_beams for generation; known: do_sample, max_gen"):
        sampling_of({"num_beams": 3}, 0)


def test_the_result_is_written_once(folder, tmp_path, capsys):
    config = LmEvalConfig(folder, ("spelling",), Path("."), limit=3, out=tmp_path / "scores.json")
    lm_eval_command.main(config)
    saved = json.loads(config.out.read_text())
    assert {"results", "samples", "versions", "device", "date", "dtype", "model"} <= set(saved)
    assert len(saved["samples"]["spelling"]) == 3
    assert "|spelling|" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"scores\.json exists"):
        lm_eval_command.main(config)


def test_what_is_wrong_shows_before_the_model_is_loaded(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(lm_eval_command, "load_engine", lambda *given: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="no --tasks; "):
        evaluated(folder)
    with pytest.raises(FileNotFoundError, match="no folder none; --include-path takes one with"):
        lm_eval_command.evaluate_model(LmEvalConfig(folder, ("facts",), Path("none")))
    (folder / STATE).write_text('{"stage": "pretrain"}')
    with pytest.raises(ValueError, match="a base model, which cannot chat; leave out --chat"):
        evaluated(folder, "facts", chat=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hotlap\[eval\]'"):
        evaluated(folder, "facts")


def test_an_unknown_task_is_named(folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    whole = TaskManager.__init__

    def short(self, include_path=None, **others):  # without lm-eval's own tasks, which take seconds to read
        whole(self, include_path=include_path, include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", short)
    with pytest.raises(ValueError, match="unknown lm-eval task: 'fact'; did you mean 'facts'"):
        evaluated(folder, "fact")
    with pytest.raises(ValueError, match="unknown lm-eval task: 'mmlo'; `lm_eval ls tasks` lists lm-eval's"):
        evaluated(folder, "facts", "mmlo")


def test_a_damaged_model_has_no_score(engine, folder):
    damaged = random_engine()
    damaged.model.blocks[0].mlp.fc.weight[0, 0] = math.nan
    save_model(folder, damaged.model.float(), damaged.tokenizer)
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluated(folder, "facts", limit=2)
