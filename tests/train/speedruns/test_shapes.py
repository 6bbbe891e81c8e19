"""The table of shapes: its files, and what is chosen from its rows."""

import dataclasses
import itertools
import json
import math
from statistics import mean

import pytest
from helpers.small_runs import write_text

from hotlap.common.errors import DataError
from hotlap.train.speedruns.shapes import (
    PACKAGED,
    TOKEN_BYTES,
    Row,
    TrainingShape,
    add_row,
    best_shape,
    corpus_bytes,
    flops_per_token,
    own_table,
    read_table,
    token_bytes,
)

LARGE = 1e15  # bytes, more than any run reads


def row(flops: float = 1e14, corpus: float = LARGE, **shape) -> Row:
    return Row(
        TrainingShape(**{"depth": 3, "context": 256, "step_tokens": 4096, "vocab_size": 1024} | shape),
        flops, corpus, corpus / TOKEN_BYTES, 1.3, 3, 60.0, "text.txt", "a laptop", "today", "abc", (),
    )  # fmt: skip


def test_the_package_s_table_says_where_its_rows_are_from():
    rows = read_table(PACKAGED)
    assert len(rows) >= 2
    for found in rows:
        assert found.device and found.date and found.data and found.seconds > 0
        tried = {tuple(one["shape"].values()): one["bpb"] for one in found.tried}
        assert mean(tried[dataclasses.astuple(found.shape)]) == pytest.approx(found.bpb)
        assert len(tried) > 1 and all(len(scores) == found.seeds for scores in tried.values())


def test_more_work_gets_a_larger_model_and_a_row_s_own_shape_where_there_is_one():
    shapes = [best_shape(10.0 ** (e / 4), LARGE)[0] for e in range(40, 80)]
    for smaller, larger in itertools.pairwise(shapes):
        assert smaller.depth <= larger.depth and smaller.step_tokens <= larger.step_tokens
    assert len({shape.depth for shape in shapes}) > 3, "depths between the rows are interpolated"
    for found in read_table(PACKAGED):
        assert best_shape(found.flops, found.corpus_bytes)[0] == found.shape


def test_between_two_rows_depth_and_batch_are_halfway_in_log_flops_and_rounded_down():
    low, high = row(1e13, depth=2, step_tokens=1 << 12), row(1e17, depth=7, step_tokens=1 << 17)
    found, words = best_shape(1e15, LARGE, [], [low, high])
    assert (found.depth, found.step_tokens) == (4, 1 << 14) and "interpolated" in words
    assert best_shape(1e9, LARGE, [], [low])[0] == best_shape(1e19, LARGE, [], [low])[0] == low.shape


def test_a_user_s_row_counts_first_and_is_named():
    own = row(8e13, depth=5)
    found, words = best_shape(1e14, LARGE, [own], [row(1e14)])
    assert found == own.shape and words.startswith("your row with 1.3000 bits per byte on text.txt, a laptop")
    assert best_shape(1e16, LARGE, [own], [row(1e16)])[0] == row().shape


def test_a_row_of_a_small_text_is_for_runs_that_read_it_as_often():
    flops = 1e14
    read = token_bytes(1024) * flops / flops_per_token(row().shape)  # bytes of the run
    small, large = row(flops, read / 8, depth=6), row(flops, LARGE)
    assert best_shape(flops, read / 7, [], [large, small])[0] == small.shape
    assert best_shape(flops, read * 3, [], [small, large])[0] == large.shape
    assert best_shape(flops, read * 1e6, [], [small, large])[0] == large.shape, "a part is as good as all"


def test_the_corpus_is_counted_in_bytes_and_shards_by_their_headers(work):
    from hotlap.cli import main

    (work / "e.txt").write_text("\u00e9" * 300, encoding="utf-8")
    train = corpus_bytes("e.txt")
    assert train % 2 == 0 and 300 < train <= 600
    assert main(["tokenizer", "--source", "text.txt", "--vocab-size", "280"]) == 0
    assert main(["data", "--source", "text.txt", "--out", "shards"]) == 0
    assert corpus_bytes("shards") % TOKEN_BYTES == 0 and corpus_bytes("shards") > 1000
    assert corpus_bytes("climbmix") > 1e12
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        corpus_bytes("none.txt")


def test_a_row_is_read_back_and_replaces_an_earlier_one_of_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = own_table()
    assert read_table(path) == [] and path.is_relative_to(tmp_path)
    first, better, other = row(), row(depth=4), dataclasses.replace(row(), seconds=300.0)
    for one in (first, other, better):
        add_row(path, one)
    assert read_table(path) == [other, better]


def damaged(change) -> str:
    content = {"version": 1, "rows": [json.loads(json.dumps(dataclasses.asdict(row())))]}
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "holds no table of shapes"),
        ('{"preset": "tiny"}', "holds no table of shapes"),
        ('{"version": 1, "rows": 3}', "holds no table of shapes"),
        ('{"version": 9, "rows": []}', "is a table of version 9, not 1; move it away"),
        ('{"version": 1, "rows": [3]}', "row 1: it must have exactly the fields"),
        (damaged(lambda c: c["rows"][0].pop("device")), "row 1: it must have exactly the fields"),
        (damaged(lambda c: c["rows"][0].update(flops="many")), "row 1: flops='many' must be"),
        (damaged(lambda c: c["rows"][0].update(bpb=math.nan)), "row 1: bpb=nan must be"),
        (damaged(lambda c: c["rows"][0]["shape"].update(depth=0)), "row 1: depth=0 must be"),
        (damaged(lambda c: c["rows"][0]["shape"].update(depth=1 << 50)), "row 1: depth="),
        (damaged(lambda c: c["rows"][0]["shape"].update(context=True)), "row 1: context=True must be"),
        (damaged(lambda c: c["rows"][0]["shape"].update(step_tokens=1)), "step_tokens=1 must be at least"),
        (damaged(lambda c: c["rows"][0]["shape"].update(width=1)), "row 1: .*width"),
        (damaged(lambda c: c["rows"][0].update(shape=7)), "row 1: "),
        (damaged(lambda c: c["rows"][0].update(tried=7)), "row 1: "),
    ],
)
def test_a_damaged_older_or_foreign_file_is_one_line(tmp_path, text, said):
    path = tmp_path / "shapes.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said) as error:
        read_table(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match=said):
        add_row(path, row())
    assert path.read_text(encoding="utf-8") == text, "nothing is lost"


def test_minutes_says_the_row_it_takes_and_a_damaged_table_before_it_measures(work, monkeypatch, capsys):
    from hotlap.cli import main
    from hotlap.train.speedruns import minutes

    monkeypatch.setenv("XDG_STATE_HOME", str(work / "state"))
    monkeypatch.setattr(minutes, "trial_flops", lambda world, dtype: 1e12)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    write_text(work / "text.txt")
    own = row(6e13, corpus_bytes("text.txt"), depth=3, context=128, step_tokens=1024)
    add_row(own_table(), own)
    command = ["speedrun", "minutes", "--minutes", "1", "--data", "text.txt", "--out", "run"]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 layers, width 256, context 128" in printed
    row_in_words = "your row with 1.3000 bits per byte on text.txt, a laptop, today"
    assert f"1,024 tokens a step, vocabulary 1,024: {row_in_words}" in printed
    own_table().write_text("{}", encoding="utf-8")
    monkeypatch.setattr(minutes, "trial_flops", lambda world, dtype: pytest.fail("measured"))
    assert main(command) == 65
    assert "holds no table of shapes" in capsys.readouterr().err and not (work / "run").exists()
