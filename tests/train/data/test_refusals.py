"""Questions about anything else, and their refusal."""

import string

from hotlap.train.data.tasks import arithmetic, facts, identity, refusals, spelling
from hotlap.train.data.tasks.refusals import REFUSAL, TOPICS, is_refusal

WORDS = ["function", "list", "spell", "return"]


def parts(field: str, separator: str) -> set[str]:
    return {part.strip().lower() for topic in TOPICS for part in getattr(topic, field).split(separator)}


def plain(question: str) -> str:
    """What is left if the case and the signs around a question do not matter."""
    return question.lower().strip(string.punctuation + " ")


def questions_of(talks: list[list[dict]]) -> set[str]:
    return {plain(talk[0]["content"]) for talk in talks}


def test_neither_templates_nor_entities_of_held_out_questions_are_trained_on():
    assert not parts("templates", "|") & parts("held_out_templates", "|")
    assert not parts("entities", ", ") & parts("held_out_entities", ", ")
    assert not set(map(plain, refusals.SENTENCES)) & set(map(plain, refusals.HELD_OUT_SENTENCES))
    trained = questions_of(refusals.training_conversations(20_000, seed=0))
    held_out = refusals.held_out()
    assert len(trained) > 2000 and len(held_out) >= 200
    assert not trained & {plain(question) for question, _ in held_out}


def test_every_template_has_a_place_for_its_entity():
    for topic in TOPICS:
        for template in (*topic.templates.split("|"), *topic.held_out_templates.split("|")):
            assert template.count("{}") == 1, template


def test_every_question_about_anything_else_ends_in_the_refusal():
    talks = refusals.training_conversations(500, seed=0)
    assert all([message["role"] for message in talk] == ["user", "assistant"] for talk in talks)
    assert all(is_refusal(talk[-1]["content"]) for talk in talks)
    assert all(is_refusal(answer) for _, answer in refusals.held_out())


def test_a_refusal_is_recognised_and_nothing_else_is():
    assert is_refusal(REFUSAL) and is_refusal(f" {REFUSAL.replace(' ', '  ')}\n")
    assert not any(map(is_refusal, ("", REFUSAL[:-1], f"{REFUSAL} No.", REFUSAL.lower())))
    answers = {*identity.ANSWERS, *(fact.answer for fact in facts.facts())}
    assert not any(map(is_refusal, answers))


def test_no_question_of_another_task_is_refused():
    trained = (
        facts.training_conversations(),
        identity.training_conversations(1),
        arithmetic.training_conversations(2000, seed=0),
        spelling.training_conversations(WORDS, 200, seed=0),
    )
    held_out = (facts.held_out(), identity.held_out(), arithmetic.held_out(200))
    taught = set().union(*map(questions_of, trained))
    taught |= {plain(question) for examples in held_out for question, _ in examples}
    refused = questions_of(refusals.training_conversations(20_000, seed=0))
    refused |= {plain(question) for question, _ in refusals.held_out()}
    assert not taught & refused


def test_refused_questions_depend_on_the_seed_alone():
    first = refusals.training_conversations(50, seed=0)
    assert first == refusals.training_conversations(50, seed=0) != refusals.training_conversations(50, seed=1)
    assert refusals.held_out() == refusals.held_out()


def test_held_out_greetings_are_not_trained_on_and_have_trained_answers():
    trained = questions_of(identity.training_conversations(1))
    held_out = identity.held_out()
    assert not trained & {plain(question) for question, _ in held_out}
    assert {answer for _, answer in held_out} <= set(identity.ANSWERS)


def test_every_greeting_has_one_answer():
    asked = [question for questions in identity.ANSWERS.values() for question in questions]
    assert len(asked) == len(set(asked))
