"""The built-in conversations, and what is held out of them."""

from hotlap.model.conversation import render
from hotlap.train.data.tasks import arithmetic, facts, identity, spelling
from hotlap.train.data.tasks.built_in import TASKS, built_in

WORDS = [a + b + c for a in "abcdefghij" for b in "klmnop" for c in "qrstuv"]


def test_held_out_questions_about_facts_are_in_no_trained_phrasing():
    assert len(facts.facts()) >= 300
    trained = {talk[0]["content"] for talk in facts.training_conversations()}
    held_out = facts.held_out()
    assert not trained & {question for question, _ in held_out}
    assert not set(facts.PHRASINGS) & set(facts.HELD_OUT_PHRASINGS)
    assert {answer for _, answer in held_out} == {
        talk[1]["content"] for talk in facts.training_conversations()
    }
    assert len({fact.name for fact in facts.facts()}) == len(facts.facts()) == len(held_out)
    assert any(fact.name == "len" and "number of items" in fact.answer for fact in facts.facts())


def test_held_out_sums_are_of_pairs_that_are_never_trained_on():
    def pair(expression):
        a, _, b = expression.split()
        return int(a), int(b)

    talks = arithmetic.training_conversations(3000, seed=0)
    trained = {pair(talk[3]["content"].split(" = ")[0]) for talk in talks}
    held_out = arithmetic.held_out(200)
    assert not trained & {pair(answer.split(" = ")[0]) for _, answer in held_out}
    questions = {talk[0]["content"] for talk in talks}
    assert len(held_out) == 200 and not questions & {question for question, _ in held_out}
    for talk in talks[:50]:
        assert eval(talk[1]["tool_calls"][0]["function"]["arguments"]["expression"]) == int(
            talk[2]["content"]
        )


def test_held_out_words_are_never_trained_on():
    trained = {talk[1]["content"] for talk in spelling.training_conversations(WORDS, 3000, seed=0)}
    held_out = spelling.held_out(WORDS, 100)
    assert held_out and not trained & {answer for _, answer in held_out}
    assert all(question.split()[3] == answer.replace(" ", "") for question, answer in held_out)
    assert spelling.HELD_OUT_PHRASING not in spelling.PHRASINGS


def test_built_in_conversations_are_valid_the_same_twice_and_of_one_to_three_turns(
    tiny_tokenizer, monkeypatch
):
    monkeypatch.setattr("hotlap.train.data.tasks.built_in.vocabulary", lambda: WORDS)
    mixture = built_in([*TASKS], seed=0)
    assert mixture == built_in([*TASKS], seed=0) != built_in([*TASKS], seed=1)
    turns = [sum(m["role"] == "user" for m in talk) for talk in mixture]
    assert set(turns) == {1, 2, 3}
    asked = {m["content"] for talk in mixture for m in talk if m["role"] == "user"}
    assert {q for questions in identity.ANSWERS.values() for q in questions} <= asked
    for talk in mixture[:300]:
        ids, said = render(talk, tiny_tokenizer)
        assert len(ids) == len(said) and any(said)
