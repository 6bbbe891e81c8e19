"""Questions of the package reasoning-gym, and what it may not do with answers."""

import builtins

import pytest

from hotlap.train.data.prompts import check_prompt_data, prompts_of, rewards_of
from hotlap.train.data.tasks import reasoning_gym
from hotlap.train.rewards.guarded import Guarded, Sample

package = pytest.importorskip("reasoning_gym", reason="needs the extra rl: pip install 'hotlap[rl]'")
BACKWARD = "reasoning-gym:spell_backward"


def test_questions_are_the_same_for_a_seed_and_held_out_ones_for_any():
    first, again, other = (prompts_of((BACKWARD,), "train", seed) for seed in (0, 0, 1))
    held_out = prompts_of((BACKWARD,), "validation", 1)
    assert first == again != other
    assert held_out == prompts_of((BACKWARD,), "validation", 0)
    texts = [{prompt.messages[0]["content"] for prompt in prompts} for prompts in (first, other, held_out)]
    assert not texts[2] & (texts[0] | texts[1])
    assert len(texts[0]) == len(first) and 50 < len(held_out) < 150


def test_its_answers_get_the_whole_reward_and_others_less():
    data = (BACKWARD, "reasoning-gym:prime_factorization")
    rewards = rewards_of(data, None)
    prompts = [prompts_of((name,), "validation", 0)[0] for name in data]
    with Guarded(list(rewards.values())) as guarded:
        right = [Sample(rewards[p.source], p.record["answer"], p.record) for p in prompts]
        wrong = [sample._replace(answer="no idea") for sample in right]
        assert guarded.score(right) == [1.0, 1.0]
        assert all(0 <= score < 0.5 for score in guarded.score(wrong))


@pytest.mark.parametrize(
    "name, message",
    [
        ("reasoning-gym:spell_backwards", "unknown task of reasoning-gym.*did you mean 'spell_backward'"),
        ("reasoning-gym:", "lacks a task, such as"),
        ("reasoning-gym:composite", "composite makes no question"),
        ("reasoning-gym:puzzle24", "running what the model writes"),
        ("reasoning-gym", "did you mean reasoning-gym:"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused(name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_prompt_data((name,), None)


def test_no_task_that_is_accepted_runs_an_answer(monkeypatch, tmp_path):
    """An answer that is a call would leave a file."""
    file = tmp_path / "written"
    call = f"__import__('pathlib').Path('{file}').touch()"
    ran = set()
    for task in sorted(package.factory.DATASETS):
        if task == "composite":  # which is made of others
            continue
        entry = package.create_dataset(task, size=1, seed=0)[0]
        score_answer = package.get_score_answer_fn(task)
        for answer in (call, f"[{call}]", f"x+{call}", call.replace("'", '"')):
            try:
                score_answer(answer, entry)
            except Exception:  # which costs the sample
                continue
        if file.exists():
            ran.add(task)
            file.unlink()
    assert ran == {task for task in package.factory.DATASETS if reasoning_gym.runs_answers(task)} != set()


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name == "reasoning_gym":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'hotlap\[rl\]'"):
        check_prompt_data((BACKWARD,), None)
