"""lm-eval asks the server, and finds what the model itself computes."""

import math
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("lm_eval")

import torch
from helpers.offline import offline
from helpers.running_server import running_server, served
from helpers.tools import tiny_config

from hotlap.model.conversation import render_prompt
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling

pytestmark = pytest.mark.xdist_group("clients")  # which take seconds to import

TASKS = Path(__file__).parent / "lm_eval"
CONTEXT = 256


@pytest.fixture(scope="module", autouse=True)
def nothing_leaves_this_machine():
    with offline():
        yield


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(tiny_config(context=CONTEXT))


@pytest.fixture(scope="module")
def server(model, tiny_tokenizer):
    with running_server(Engine(model, tiny_tokenizer, 4), served(tiny_tokenizer, context=CONTEXT)) as running:
        yield running


@pytest.fixture
def evaluate(server, tmp_path, monkeypatch):
    """A function that evaluates a task: its metrics, and what was found for each question."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.chdir(TASKS)  # data_files are relative to it
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # runs pip, which takes a second

    def run(task: str, route: str = "completions", **options) -> tuple[dict, list[dict]]:
        arguments = {"model": "tiny", "base_url": f"http://127.0.0.1:{server.port}/v1/{route}"}
        found = simple_evaluate(
            "local-chat-completions" if route == "chat/completions" else "local-completions",
            arguments | {"max_length": CONTEXT, "max_retries": 1} | options,
            [task],
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=TASKS, include_defaults=False),
            apply_chat_template=route == "chat/completions",
        )
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        return found["results"][task], samples

    return run


@torch.no_grad()
def log_likelihood(model, ids: list[int], given: int) -> tuple[float, bool]:
    """Of the ids after the first `given`, and whether each is the likeliest."""
    logprobs = model(torch.tensor([ids]))[0, given - 1 : -1].log_softmax(-1)
    targets = torch.tensor(ids[given:])
    total = logprobs.gather(1, targets[:, None]).sum()
    return float(total), bool((logprobs.argmax(-1) == targets).all())


@pytest.mark.parametrize("options", [{}, {"batch_size": 5, "num_concurrent": 3}])
def test_choices_are_as_likely_as_the_model_says(evaluate, model, tiny_tokenizer, options):
    results, samples = evaluate("facts", **options)
    right = right_by_length = 0
    for sample in samples:
        doc = sample["doc"]
        context = f"Question: {doc['question']}\nAnswer:"
        given, expected = len(tiny_tokenizer.encode(context)), []
        for choice, found in zip(doc["choices"], sample["filtered_resps"], strict=True):
            score, is_greedy = log_likelihood(model, tiny_tokenizer.encode(f"{context} {choice}"), given)
            assert found[0] == pytest.approx(score, abs=1e-4) and found[1] == is_greedy
            expected.append(score)
        by_length = [score / len(choice) for score, choice in zip(expected, doc["choices"], strict=True)]
        right += expected.index(max(expected)) == doc["answer"]
        right_by_length += by_length.index(max(by_length)) == doc["answer"]
    assert len(samples) == 24
    assert results["acc,none"] == right / 24 and results["acc_norm,none"] == right_by_length / 24


def test_text_has_as_many_bits_as_the_model_says(evaluate, model, tiny_tokenizer):
    results, samples = evaluate("facts_text")
    nats, count = 0.0, 0
    for sample in samples:
        text = sample["doc"]["choices"][sample["doc"]["answer"]]
        score, _ = log_likelihood(model, [tiny_tokenizer.bos, *tiny_tokenizer.encode(text)], 1)
        nats, count = nats - score, count + len(text.encode())
    assert results["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / count, rel=1e-6)


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_generated_answers_are_the_engines(evaluate, model, tiny_tokenizer, route):
    results, samples = evaluate("spelling", route)
    engine = Engine(model, tiny_tokenizer, 8)
    sampling = Sampling(temperature=0, max_tokens=24, stop=("\n",))
    for sample in samples:
        question = sample["doc"]["question"]
        if route == "completions":
            request = engine.add(tiny_tokenizer.encode(question), sampling, tools={})
        else:
            messages = [{"role": "user", "content": question}]
            request = engine.add(render_prompt(messages, tiny_tokenizer), sampling)
        while request.finish_reason is None:
            engine.step()
        assert sample["resps"] == [[request.text]]
    right = sum(sample["resps"][0][0] == sample["doc"]["answer"] for sample in samples)
    assert len(samples) == 8 and results["exact_match,none"] == right / 8
