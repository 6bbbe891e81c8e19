"""Questions about names that the model is not taught."""

from hotlap.train.data.tasks import facts, unknown_names
from hotlap.train.data.tasks.refusals import REFUSAL
from hotlap.train.data.tasks.unknown_names import held_out_questions, is_held_out, names


def test_no_name_has_a_fact_or_is_there_twice():
    assert len(names()) > 400 and len({*names()}) == len(names())
    assert not {*names()} & {fact.name for fact in facts.facts()}


def test_neither_names_nor_phrasings_of_held_out_questions_are_trained_on():
    held_out = [name for name in names() if is_held_out(name)]
    assert 0.1 < len(held_out) / len(names()) < 0.3
    trained = unknown_names.training_questions(3, seed=0)
    assert len(trained) == 3 * (len(names()) - len(held_out)) == len({*trained})
    possible = {
        phrasing.format(name) for phrasing in facts.PHRASINGS for name in names() if not is_held_out(name)
    }
    assert {*trained} <= possible and trained != unknown_names.training_questions(3, seed=1)
    asked = held_out_questions()
    assert len({*asked}) == 2 * len(held_out)
    assert {*asked} <= {phrasing.format(name) for phrasing in facts.HELD_OUT_PHRASINGS for name in held_out}


def test_mixed_questions_ask_in_phrasings_of_their_own_about_taught_and_other_names():
    trained = dict(unknown_names.mixed_questions(0, held_out=False))
    held_out = dict(unknown_names.mixed_questions(0, held_out=True))
    taught = {talk[0]["content"] for talk in facts.training_conversations()}
    assert not trained.keys() & held_out.keys() and not trained.keys() & taught
    refused = [name for name in unknown_names.names() if not unknown_names.is_held_out(name)]
    assert [*trained.values()].count(REFUSAL) == 2 * len(refused)
    assert len(trained) == 2 * (len(refused) + len(facts.facts()))
    assert held_out == dict(facts.held_out()) | dict.fromkeys(unknown_names.held_out_questions(), REFUSAL)
