"""CORE: what a model reads, what counts as right, and what cannot be scored."""

import json
import math
import random

import pytest
import torch
from helpers.core_bundles import NextLetter, core_of_letters, letters, mixed_tasks, write_bundle
from helpers.ranks import in_world, run_ranks
from helpers.tools import tiny_config

from hotlap.common.errors import DataError
from hotlap.model.tokenizer import train_characters
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation import batching, core
from hotlap.train.evaluation.core import batches, evaluate_core, prompts
from hotlap.train.evaluation.core_bundle import read_bundle
from hotlap.train.evaluation.intervals import counted


def scores_of(model, tokenizer, folder, max_per_task=0) -> dict:
    with joined() as world:
        return evaluate_core(model, tokenizer, read_bundle(folder, max_per_task), world)


# A model and tasks whose scores can be counted by hand


class Sure:
    """After a space: x with probability e^-1, y with e^-1.5; after y: z with e^-0.1; after all else: x."""

    def __init__(self, tokenizer):
        self.config, self.embedding = tiny_config(context=1000), torch.nn.Embedding(1, 1)
        x, y, z, space = (tokenizer.encode(c)[0] for c in "xyz ")
        V = tokenizer.vocab_size
        p = torch.full((V, V), 1e-9)
        p[:, x] = 1
        p[space] = (1 - math.exp(-1) - math.exp(-1.5)) / (V - 2)
        p[space, x], p[space, y] = math.exp(-1), math.exp(-1.5)
        p[y] = (1 - math.exp(-0.1)) / (V - 1)
        p[y, z] = math.exp(-0.1)
        self.logs = p.log()

    def hidden(self, ids):
        return self.logs[ids]

    def logits(self, hidden):
        return hidden


def test_three_tasks_counted_by_hand(tmp_path):
    tokenizer = train_characters("uvwxyz .")
    choices = [
        {"query": "u", "choices": ["x", "y"], "gold": 0},  # 1 nat is less than 1.5
        {"query": "u", "choices": ["x", "yz"], "gold": 1},  # (1.5 + 0.1) / 2 is less than 1: means, not sums
        {"query": "u", "choices": ["yz", "yx"], "gold": 1},  # they differ in the last letter alone: z, wrong
        {"query": "u", "choices": ["x", "y", "z"], "gold": 2},  # wrong
    ]
    schema = [  # what both have at the end is " x" after u, and "x" after the other
        {"context_options": ["u ", "u"], "continuation": "x", "gold": 0},
        {"context_options": ["uy", "uv"], "continuation": "x", "gold": 1},
    ]
    modelling = [
        {"context": "v ", "continuation": "x"},  # a space is not what v predicts
        {"context": "y", "continuation": "x"},
    ]
    exact = [{"context": "u", "continuation": "xx"}, {"context": "y", "continuation": "zx"}]
    write_bundle(
        tmp_path,
        {
            "choice": ("multiple_choice", 0, None, 25, choices),
            "schema": ("schema", 0, "", 50, schema),
            "modelling": ("language_modeling", 0, None, 0, modelling),
            "exact": ("language_modeling", 0, "", 0, exact),
        },
    )
    found = scores_of(Sure(tokenizer), tokenizer, tmp_path)
    shares = {label: task["accuracy"] for label, task in found["tasks"].items()}
    assert shares == {"choice": 0.5, "schema": 0.5, "modelling": 0.0, "exact": 1.0}
    centred = [task["centred"] for task in found["tasks"].values()]
    assert centred == pytest.approx([(0.5 - 0.25) / 0.75, 0.0, 0.0, 1.0])
    assert found["core"] == pytest.approx((1 / 3 + 1) / 4)


# nanochat's definition, once more: an example at a time, in its order, without batches


def expected_means(model, tokenizer, data, i, kind, shots, delimiter, context):
    """Mean losses of an example's options, or whether each token was the likeliest."""

    def whole(e, option):
        if kind == "multiple_choice":
            return e["query"] + delimiter + e["choices"][option]
        if kind == "schema":
            return e["context_options"][option] + delimiter + e["continuation"]
        return e["context"].strip() + delimiter + e["continuation"]

    item = data[i]
    picked = random.Random(1234 + i).sample([j for j in range(len(data)) if j != i], shots) if shots else []
    start = "".join(whole(data[j], data[j].get("gold")) + "\n\n" for j in picked)
    options = item.get("choices") or item.get("context_options") or [None]
    texts = [start + whole(item, option) for option in range(len(options))]
    ids = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
    if kind == "multiple_choice":
        same = 0
        while same < min(map(len, ids)) and len({sequence[same] for sequence in ids}) == 1:
            same += 1
        begins = [same] * len(ids)
    elif kind == "schema":
        same = 0
        while same < min(map(len, ids)) and len({sequence[-1 - same] for sequence in ids}) == 1:
            same += 1
        begins = [len(sequence) - same for sequence in ids]
    else:
        before = (start + item["context"].strip() + delimiter).strip()
        begins = [1 + len(tokenizer.encode(before))]
        assert ids[0][: begins[0]] == [tokenizer.bos, *tokenizer.encode(before)]
    values = []
    for sequence, begin in zip(ids, begins, strict=True):
        begin -= max(0, len(sequence) - context)
        sequence = sequence[-context:]
        logs = model(torch.tensor([sequence]))[0, :, : tokenizer.vocab_size].double().log_softmax(-1)
        losses = [-logs[t - 1, sequence[t]].item() for t in range(begin, len(sequence))]
        likeliest = [logs[t - 1].argmax().item() == sequence[t] for t in range(begin, len(sequence))]
        values.append(all(likeliest) if kind == "language_modeling" else sum(losses) / len(losses))
    return values


def expected_accuracy(model, tokenizer, folder, tasks, label, context, max_per_task=0) -> float:
    kind, shots, delimiter, _, _ = tasks[label]
    data = [json.loads(s) for s in (folder / f"eval_data/some_folder/{label}.jsonl").read_text().splitlines()]
    random.Random(1337).shuffle(data)
    data = data[: max_per_task or None]
    right = 0
    with torch.no_grad():
        for i in range(len(data)):
            space = " " if delimiter is None else delimiter
            values = expected_means(model, tokenizer, data, i, kind, shots, space, context)
            right += (
                values[0] if kind == "language_modeling" else values.index(min(values)) == data[i]["gold"]
            )
    return right / len(data)


@pytest.mark.parametrize(
    ("kind", "max_per_task"),
    [("gpt", 6), ("letters", 0), ("letters", 7), ("letters of a short context", 0)],
)
def test_scores_are_those_of_one_example_at_a_time(tmp_path, random_model, kind, max_per_task):
    tasks, tokenizer = mixed_tasks(), letters()
    write_bundle(tmp_path, tasks)
    if kind == "gpt":
        model, context = random_model(tiny_config(vocab_size=64, context=64, softcap=0.0)), 64
    else:
        context = 32 if "short" in kind else 1000
        model = NextLetter(tokenizer, context)
    found = scores_of(model, tokenizer, tmp_path, max_per_task)
    lengths = []
    for label in tasks:
        expected = expected_accuracy(model, tokenizer, tmp_path, tasks, label, context, max_per_task)
        assert found["tasks"][label]["accuracy"] == pytest.approx(expected), label
        assert found["tasks"][label]["n"] == (max_per_task or 12)
        lengths += [len(tokenizer.encode(e.get("query", ""))) for e in tasks[label][4]]
    if kind == "letters":
        assert 0 < found["tasks"]["going_on"]["accuracy"] < 1  # so that the comparison says something
    assert max(lengths) > 32


def test_batches_of_any_size_score_alike(tmp_path, random_model, monkeypatch):
    """Rows are of different lengths, and what pads the shorter ones changes nothing."""
    tokenizer = letters()
    write_bundle(tmp_path, mixed_tasks())
    model = random_model(tiny_config(vocab_size=64, context=96))
    (task, *_) = read_bundle(tmp_path)

    def losses() -> dict[int, list[float]]:
        found = {}
        for batch in batches(task, tokenizer, 96):
            sizes.append(len(batch))
            means = iter(core.read_on(model, [row for _, read in batch for row in read], tokenizer)[0])
            found |= {index: [next(means).mean().item() for _ in read] for index, read in batch}
        return found

    sizes: list[int] = []
    together, scores = losses(), scores_of(model, tokenizer, tmp_path)
    assert sizes == [12]
    monkeypatch.setattr(batching, "BATCH_TOKENS", 1)
    monkeypatch.setattr(core, "WINDOW", 5)
    monkeypatch.setattr(core, "SCORED_AT_ONCE", 3)
    alone = losses()
    assert sizes == [12] + 12 * [1]
    for index in range(12):
        assert together[index] == pytest.approx(alone[index], rel=1e-4)
    assert scores_of(model, tokenizer, tmp_path) == scores


def test_ranks_share_the_examples_and_agree_on_the_scores(tmp_path):
    write_bundle(tmp_path, mixed_tasks(count=7))
    with joined() as world:
        alone = core_of_letters(world, tmp_path)
    assert run_ranks(2, in_world, core_of_letters, tmp_path) == [alone, alone]


# What a model reads


def test_prompts_open_with_solved_examples(tmp_path):
    examples = [{"query": f"{i}?", "choices": ["no", "yes"], "gold": i % 2} for i in range(8)]
    write_bundle(tmp_path, {"choice": ("multiple_choice", 3, "\nAnswer: ", 50, examples)})
    (task,) = read_bundle(tmp_path)
    for i, example in enumerate(task.examples):
        others = random.Random(1234 + i).sample([e for e in task.examples if e is not example], 3)
        shown = "".join(f"{e['query']}\nAnswer: {['no', 'yes'][e['gold']]}\n\n" for e in others)
        expected = [f"{shown}{example['query']}\nAnswer: {choice}" for choice in ("no", "yes")]
        assert prompts(task, i) == expected


def test_the_space_before_a_continuation_is_scored_with_it(tmp_path):
    write_bundle(
        tmp_path, {"lm": ("language_modeling", 0, None, 0, [{"context": " a b ", "continuation": "c"}])}
    )
    (task,) = read_bundle(tmp_path)
    assert prompts(task, 0) == ["a b", "a b c"]
    ((_, (row,)),) = next(batches(task, letters(), 100))
    assert letters().decode(row.ids[row.start :]) == " c"


def test_an_option_that_begins_another_wins_only_as_the_first(tmp_path):
    """It leaves no token to score, and nanochat compares its mean, which is NaN."""
    choices = [["a", "ab"], ["ab", "a"], ["ab", "a", "ac"]]
    examples = [{"query": "a", "choices": options, "gold": 0} for options in choices]
    write_bundle(tmp_path, {"choice": ("multiple_choice", 0, None, 25, examples)})
    tokenizer = letters()
    assert scores_of(NextLetter(tokenizer), tokenizer, tmp_path)["tasks"]["choice"]["accuracy"] == 1
    same = [{"query": "a", "choices": ["b", "b"], "gold": 1}]
    write_bundle(tmp_path, {"choice": ("multiple_choice", 0, None, 25, same)})
    assert scores_of(NextLetter(tokenizer), tokenizer, tmp_path)["tasks"]["choice"]["accuracy"] == 0


def test_what_is_scored_has_to_fit_the_context(tmp_path):
    examples = [{"query": "a", "choices": ["bad deed", "cab"], "gold": 0}]
    write_bundle(tmp_path, {"choice": ("multiple_choice", 0, None, 25, examples)})
    tokenizer = letters()
    assert scores_of(NextLetter(tokenizer, 9), tokenizer, tmp_path)["tasks"]["choice"]["n"] == 1
    with pytest.raises(ValueError, match=r"choice scores 8 tokens .* do not fit in the model's context of 8"):
        scores_of(NextLetter(tokenizer, 8), tokenizer, tmp_path)


def test_a_prompt_whose_tokens_do_not_begin_the_whole_is_refused(tmp_path, tiny_tokenizer):
    examples = [{"context": "the do", "continuation": "g"}]  # " dog" is a token
    write_bundle(tmp_path, {"lm": ("language_modeling", 0, "", 0, examples)})
    with pytest.raises(DataError, match="lm, example 0: the prompt's tokens are not a prefix of"):
        scores_of(NextLetter(letters()), tiny_tokenizer, tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_an_error_and_no_score(tmp_path, value):
    write_bundle(tmp_path, mixed_tasks())
    tokenizer = letters()
    model = NextLetter(tokenizer)
    model.logits_after[tokenizer.encode(" ")[0], 3] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        scores_of(model, tokenizer, tmp_path)


# Intervals


def test_intervals_are_wilson_s():
    assert counted(8, 10)["interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert counted(0, 10)["interval"] == pytest.approx([0, 0.2775], abs=1e-4)
    assert counted(10, 10)["interval"] == pytest.approx([0.7225, 1], abs=1e-4)


def test_the_interval_of_core_is_the_tasks_in_quadrature(tmp_path):
    write_bundle(tmp_path, mixed_tasks())
    tokenizer = letters()
    found = scores_of(NextLetter(tokenizer), tokenizer, tmp_path)
    halves = [
        (task["interval"][1] - task["interval"][0]) / 2 / (1 - task["chance"])
        for task in found["tasks"].values()
    ]
    half = sum(h * h for h in halves) ** 0.5 / 5
    assert found["interval"] == pytest.approx([found["core"] - half, found["core"] + half])
