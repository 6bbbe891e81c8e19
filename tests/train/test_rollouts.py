"""Sampled answers: what they keep of tools and rewards, and the rows that training sees of them."""

import contextlib
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tools import ScriptedModel, script, tiny_config, train_tiny_tokenizer

from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.sandbox import find_sandbox
from hotlap.model.tools import named_tools
from hotlap.train.answer_rows import AnswerSet, advantages, teaches
from hotlap.train.data.prompts import Prompt
from hotlap.train.distributed.world import joined
from hotlap.train.policy_losses import FACTS
from hotlap.train.rewards.guarded import Failure
from hotlap.train.rl_config import RLConfig
from hotlap.train.rollouts import Answer, Draw, Sampler, questions_of


@pytest.fixture(scope="module")
def t():
    return train_tiny_tokenizer()


def prompt(text: str = "What is 2 + 3?") -> Prompt:
    return Prompt([{"role": "user", "content": text}], {"answer": "5"}, "a", "a:1")


def answer_of(t, said: list[int], tools=("calculator",), reward=lambda text: 1.0, max_tokens=40, context=64):
    """The answer of a model that says these ids, and the length of its prompt."""
    offered = {"a": named_tools(tools) if tools else {}}
    (question,), _ = questions_of([prompt()], offered, t, context)
    config = tiny_config(context=context)
    model = ScriptedModel(config, [script(len(question.ids), said)], t.special["<|assistant_end|>"])
    with joined() as world:

        def score(pairs):
            return [reward(text) for _, text in pairs]

        sampler = Sampler(t, score, max_tokens, world)
        (answer,) = sampler(model, [question], [Draw(0, 1)])
    return answer, len(question.ids)


def call(t, expression: str) -> list[int]:
    return [t.special["<|tool_start|>"], *t.encode(expression), t.special["<|tool_end|>"]]


def result(t, text: str) -> list[int]:
    return [t.special["<|result_start|>"], *t.encode(text), t.special["<|result_end|>"]]


def test_tools_run_and_what_they_say_carries_no_loss(t):
    said, heard, then = call(t, "2 + 3"), result(t, "5"), t.encode(" It is 5.")
    gap = [0] * len(heard)  # what the model would say there does not matter: the result is forced
    answer, start = answer_of(t, said + gap + then)
    end = [t.special["<|assistant_end|>"]]
    assert answer.ids[start:] == said + heard + then + end
    assert answer.sampled == [True] * len(said) + [False] * len(heard) + [True] * (len(then) + 1)
    assert answer.text == "It is 5." and answer.calls == 1 and not answer.cut_off
    rows = AnswerSet([[answer, dataclasses.replace(answer, reward=0.0)]], 0.0, 0.0).rows(
        [0], 64, t.bos, RLConfig()
    )
    targets = rows.targets[0].tolist()
    assert [x for x in targets if x != IGNORE] == said + then + end
    assert all(targets[i] in (IGNORE, answer.ids[i + 1]) for i in range(len(answer.ids) - 1))
    assert rows.inputs[0, : len(answer.ids) - 1].tolist() == answer.ids[:-1]


@pytest.mark.parametrize(
    "code", ["while 1: pass", "import os\nwhile 1: os.fork()", "while 1: print(1)", "input()\n1/0"]
)
def test_hostile_code_costs_its_answer_some_time_and_nothing_else(code, t, monkeypatch):
    """The episode goes on with an error, within the limit of a call, and no process is left."""
    if find_sandbox() is None:
        pytest.skip("no sandbox works on this machine")
    monkeypatch.setattr("hotlap.model.tools.SECONDS", 1.0)
    before, said = children(), call(t, f"python: {code}")
    answer, start = answer_of(t, said, tools=("python",), max_tokens=150, context=256)
    heard = answer.ids[start + len(said) :]
    assert t.decode(heard).strip().splitlines()[-1].startswith("error: ")
    assert answer.calls == 1 and answer.sampled[: len(said)] == [True] * len(said)
    assert not any(answer.sampled[len(said) : answer.sampled.index(True, len(said))])
    assert not children() - before


def children() -> set[str]:
    """Processes that this one has started and that still run."""
    found: set[str] = set()
    for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found |= {*path.read_text().split()}
    return found


def test_without_tools_nothing_runs(t):
    answer, start = answer_of(t, call(t, "2 + 3") + t.encode("5"), tools=())
    assert all(answer.sampled) and answer.calls == 0
    assert answer.ids[start:] == call(t, "2 + 3") + t.encode("5") + [t.special["<|assistant_end|>"]]


def test_a_call_that_fails_says_so_and_the_answer_goes_on(t):
    heard = result(t, "error: not arithmetic")
    said = call(t, "2 +") + [0] * len(heard) + t.encode("Sorry")
    assert answer_of(t, said)[0].text == "Sorry"


def test_an_answer_that_comes_to_no_end_is_cut_off(t):
    answer, start = answer_of(t, [5] * 40, max_tokens=8)
    assert answer.cut_off and len(answer.ids) - start == 8


def test_a_failed_reward_leaves_an_answer_without_targets(t):
    answer, _ = answer_of(t, [5, 6], reward=lambda text: Failure("KeyError: no"))
    assert answer.reward is None and answer.problem == "KeyError: no"
    good = dataclasses.replace(answer, reward=1.0)
    found = AnswerSet([[answer, good], [good, good]], 0.5, 0.25)
    rows = found.rows([0, 1], 64, 0, RLConfig())
    assert (rows.targets[0] == IGNORE).all() and (rows.targets[1] != IGNORE).sum() == 3
    assert rows.advantage.tolist() == [0, 0]


def sampled(tokens: int, reward: float | None, prompt: int = 2) -> Answer:
    return Answer(0, [7] * (prompt + tokens), [True] * tokens, [-0.5] * tokens, "", 0, False, reward)


def test_advantages_are_rewards_minus_their_mean_without_those_that_failed():
    assert advantages([sampled(1, r) for r in (1.0, 0.0, None, 0.5)]) == [0.5, -0.5, 0.0, 0.0]
    assert advantages([sampled(1, None)] * 2) == [0.0, 0.0]
    assert teaches([sampled(1, 1.0), sampled(1, 0.0)])
    assert not teaches([sampled(1, 1.0), sampled(1, None)]) and not teaches([sampled(1, 1.0)] * 2)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("dapo", [1 / 8, 3 / 8, 4 / 8]),  # of all 8 tokens
        ("cispo", [1 / 8, 3 / 8, 4 / 8]),
        ("dr_grpo", [1 / 40, 3 / 40, 4 / 40]),  # of 4 answers of 10 tokens
        ("gspo", [1 / 4, 1 / 4, 1 / 4]),  # of 4 answers
    ],
)
def test_shares_make_the_mean_over_answers_what_the_aggregation_says(loss, expected):
    """Answers of 1, 3 and 4 tokens, and one whose reward failed: each as a share of the step's loss."""
    found = AnswerSet([[sampled(1, 1.0), sampled(3, 0.0)], [sampled(4, 0.5), sampled(9, None)]], 0.0, 0.0)
    rows = found.rows([0, 1, 2, 3], 16, 0, RLConfig(loss=loss, max_tokens=10))
    weights = (rows.targets != IGNORE).sum(1) * rows.share / rows.weight
    assert weights.tolist() == pytest.approx([*expected, 0])


def test_logged_means_leave_out_failed_rewards():
    found = AnswerSet([[sampled(1, 1.0), sampled(3, 0.0)], [sampled(4, 0.5), sampled(9, None)]], 0.5, 0.25)
    facts = found.rows([0, 1, 2, 3], 16, 0, RLConfig()).facts.mean(0)
    logged = dict(zip(FACTS, facts.tolist(), strict=True))
    assert logged["reward"] == pytest.approx(0.5)
    assert (logged["failed_rewards"], logged["equal_groups"]) == (0.25, 0.5)


def test_a_set_of_answers_survives_json():
    found = AnswerSet([[sampled(2, 1.0), sampled(3, None)]], 0.5, 0.25)
    assert AnswerSet.from_json(found.to_json()) == found


def test_places_are_the_tokens_before_the_sampled_ones():
    answer = Answer(0, [9, 9, 1, 2, 3], [True, False, True], [0.0] * 3, "", 0, False, 1.0)
    assert np.array_equal(answer.places, [1, 3])
    rows = AnswerSet([[answer, answer]], 0.0, 0.0).rows([0], 8, 0, RLConfig())
    assert torch.equal(rows.targets[0, :4], torch.tensor([IGNORE, 1, IGNORE, 3]))


def test_questions_that_leave_no_room_are_left_out_and_unspellable_ones_named(t):
    kept, left_out = questions_of([prompt(), prompt("dog " * 80)], {"a": {}}, t, 64)
    assert len(kept) == 1 and left_out == 1
