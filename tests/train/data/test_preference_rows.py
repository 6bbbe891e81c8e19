"""Preference pairs as rows of tokens."""

import numpy as np
import pytest
import torch
from helpers.small_runs import conversation

from hotlap.common.errors import DataError
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.messages import TOOL
from hotlap.model.tokenizer import train_characters
from hotlap.train.data.preference_rows import PairRows, pair_digests, pair_rows, rendered_side
from hotlap.train.data.preferences import Pair
from hotlap.train.data.rows import step_batches

T = 64


def a_pair(i: int, split: str | None = "train") -> Pair:
    """Answers of other lengths for each i."""
    question, chosen = conversation(f"question {i}", "a" * (1 + i % 7))
    return Pair(
        f"pair {i}", [question], [chosen], [{"role": "assistant", "content": f"no {'b' * (i % 5)}"}], split
    )


def rows_of(pairs, tokenizer, split="train", seed=0) -> PairRows:
    return pair_rows(pairs, tokenizer, T, seed)[1][split]


def test_each_side_has_the_same_pairs_at_the_same_places_and_only_answers_as_targets(tiny_tokenizer):
    pairs = [a_pair(i) for i in range(30)]
    rows = rows_of(pairs, tiny_tokenizer)
    batch = rows.batch(0, rows.epoch_rows())
    assert batch.weight == 30 and sorted(batch.numbers[batch.numbers >= 0].tolist()) == list(range(30))
    for b, p in (batch.numbers >= 0).nonzero().tolist():
        pair = pairs[batch.numbers[b, p]]
        begins = [int((batch.pair[b, side] == p).nonzero()[0]) for side in (0, 1)]
        assert begins[0] == begins[1]
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            ids, loss_mask = rendered_side(pair.prompt, answer, tiny_tokenizer)
            here = batch.pair[b, side] == p
            assert batch.inputs[b, side, here].tolist() == ids[:-1]
            wanted = [i if carries else IGNORE for i, carries in zip(ids[1:], loss_mask[1:], strict=True)]
            assert batch.targets[b, side, here].tolist() == wanted
            assert batch.document_start[b, side, here].tolist() == [begins[0]] * (len(ids) - 1)
    padding = batch.pair < 0
    assert (batch.targets[padding] == IGNORE).all() and (batch.inputs[padding] == 0).all()
    assert (batch.document_start.diff(dim=-1) >= 0).all()


def test_history_prompt_and_results_of_the_tool_carry_no_loss(tiny_tokenizer):
    call = {"type": "function", "function": {"name": TOOL, "arguments": {"expression": "2+3"}}}
    answer = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "five"},
    ]
    ids, loss_mask = rendered_side(
        [*conversation("Hello", "Hi."), {"role": "user", "content": "2+3?"}], answer, tiny_tokenizer
    )
    learned = [i for i, carries in zip(ids, loss_mask, strict=True) if carries]
    marks = [tiny_tokenizer.special[f"<|{name}|>"] for name in ("tool_start", "tool_end", "assistant_end")]
    assert learned == [
        marks[0],
        *tiny_tokenizer.encode("2+3"),
        marks[1],
        *tiny_tokenizer.encode("five"),
        marks[2],
    ]


def test_every_epoch_has_every_pair_once_in_its_own_order(tiny_tokenizer):
    rows = rows_of([a_pair(i) for i in range(60)], tiny_tokenizer)
    n = rows.epoch_rows()
    epochs = [[tuple(rows.row(e * n + i).tolist()) for i in range(n)] for e in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert sorted(number for row in epochs[0] for number in row) == list(range(60))


def test_ranks_and_micro_batches_share_the_rows_of_a_step(tiny_tokenizer):
    rows = rows_of([a_pair(i) for i in range(60)], tiny_tokenizer)

    def numbers(rank=0, world=1, micro=4):
        batches = next(step_batches(rows, batch_rows=4, micro_rows=micro, rank=rank, world=world))
        return torch.cat([batch.numbers for batch in batches]).tolist()

    assert sorted(numbers(0, 2, 1) + numbers(1, 2, 1)) == sorted(numbers()) == sorted(numbers(micro=2))


def test_pairs_that_cannot_be_learned_from_are_counted_and_nothing_is_cut(tiny_tokenizer, caplog):
    caplog.set_level("INFO")
    fits = a_pair(0)
    twice = fits._replace(place="twice", rejected=fits.chosen)
    long = fits._replace(place="long", rejected=[{"role": "assistant", "content": "x" * 1000}])
    tokens, _ = pair_rows([fits, twice, long, long], tiny_tokenizer, T, 0)
    assert tokens.places == ["pair 0"]
    assert "1 of 4 pairs have the same answer twice (twice)" in caplog.text
    assert f"2 of 4 pairs are longer than the model's context of {T} tokens (long)" in caplog.text
    with pytest.raises(
        DataError, match=r"no pair can be learned from: 1 of 2 .* same answer twice.*change them"
    ):
        pair_rows([twice, long], tiny_tokenizer, T, 0)


def test_a_character_that_the_tokenizer_lacks_leaves_the_pair_out(caplog):
    caplog.set_level("INFO")
    tokenizer = train_characters("question 0 answer ab no")
    tokens, _ = pair_rows([a_pair(0), a_pair(7)], tokenizer, T, 0)
    assert tokens.places == ["pair 0"] and "characters that the model's tokenizer lacks" in caplog.text


def test_pairs_of_one_prompt_share_a_split_and_a_data_set_may_have_its_own(tiny_tokenizer):
    pairs = [a_pair(i, None) for i in range(100)]
    again = [pair._replace(rejected=[{"role": "assistant", "content": "other"}]) for pair in pairs]
    _tokens, rows = pair_rows(pairs + again, tiny_tokenizer, T, 0)
    train, validation = (set(rows[split].numbers) for split in ("train", "validation"))
    assert train | validation == set(range(200)) and not train & validation and 2 <= len(validation) <= 20
    assert {n % 100 for n in validation} == {n for n in validation if n < 100}
    own = [a_pair(i, "validation" if i % 2 else "train") for i in range(10)]
    assert rows_of(own, tiny_tokenizer, "validation").numbers.tolist() == [1, 3, 5, 7, 9]


def test_the_reference_returns_to_the_targets_it_was_computed_for(tiny_tokenizer):
    rows = rows_of([a_pair(i) for i in range(30)], tiny_tokenizer)
    for first in range(0, rows.epoch_rows(), 2):
        batch = rows.batch(first, 2)
        rows.keep_reference(first, batch.targets.where(batch.targets != IGNORE, 0).numpy().astype(np.float32))
    for first in (0, rows.epoch_rows()):  # the second epoch has the rows in another order
        batch = rows.batch(first, rows.epoch_rows())
        assert torch.equal(batch.reference, batch.targets.where(batch.targets != IGNORE, 0).float())


def test_digests_tell_pairs_apart_by_both_answers(tiny_tokenizer):
    pair = a_pair(1)
    swapped = pair._replace(chosen=pair.rejected, rejected=pair.chosen)
    tokens, _rows = pair_rows([pair, swapped, pair, a_pair(2)], tiny_tokenizer, T, 0)
    found = pair_digests(tokens, np.arange(4))
    assert found[0] == found[2] and len({*found}) == 3
