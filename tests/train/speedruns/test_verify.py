"""A record that holds is said to, and what was done to one, its runs or its text is refused in one line."""

import json
import shutil

import pytest
from helpers.commands import BAD_DATA, NO_INPUT, USAGE, assert_error
from helpers.records import CEILING, COMMAND, CORPUS, make_record, rewritten, small_race

from hotlap.cli import main
from hotlap.common.files import file_sha256
from hotlap.model.manifest import manifest_text, read_manifest
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import run_checkpoints
from hotlap.train.data.shards import write_shards
from hotlap.train.data.sources import TEXTS
from hotlap.train.speedruns.corpora import corpus_text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a record of three runs."""
    out = tmp_path_factory.mktemp("race") / "runs"
    make_record(out, "--runs", "3")
    return out


@pytest.fixture
def race(made, tmp_path):
    """A copy of it, which may be spoiled, where the corpus is still the same."""
    shutil.copytree(made, tmp_path / "runs")
    with small_race():
        yield tmp_path / "runs"


def verify(path, *flags: str) -> int:
    return main(["verify", str(path), *map(str, flags)])


def refused(capsys, path, *words: str, code: int = BAD_DATA) -> None:
    capsys.readouterr()
    assert_error(capsys, verify(path), code, *words)


def test_every_claim_of_an_honest_record_holds(race, capsys):
    assert verify(race / "record.json") == 0
    printed = capsys.readouterr().out
    assert "not checked" not in printed and "differs" not in printed and "no row" not in printed
    assert printed.count("scored again") == 3 and "mean of 3 runs" in printed
    record = json.loads((race / "record.json").read_text())
    assert [run["seed"] for run in record["runs"]] == [0, 1, 2] and record["interval"][0] < record["mean"]


def test_what_is_not_here_is_said_to_be_unchecked(race, tmp_path, capsys):
    alone = shutil.copy(race / "record.json", tmp_path / "alone.json")
    assert verify(alone) == 0
    assert "not checked: the checkpoints of 3 of 3 runs are not here" in capsys.readouterr().out
    shutil.copytree(race / "run-1", tmp_path / "moved")
    assert verify(alone, "--checkpoint", tmp_path / "moved") == 0
    printed = capsys.readouterr().out
    assert "of the run with seed 1" in printed and "the checkpoints of 2 of 3 runs" in printed


def test_another_machine_s_text_is_not_scored(race, capsys, monkeypatch):
    monkeypatch.setitem(TEXTS, "pydocs", lambda: [text + "More." for text in CORPUS])
    assert verify(race / "record.json") == 0
    printed = capsys.readouterr().out
    assert "not checked: this machine's pydocs is another text" in printed and "scored again" not in printed


def test_another_machine_s_training_text_is_said_to_be_unchecked(race, capsys, monkeypatch):
    train, held_out = (list(corpus_text("pydocs", split)) for split in ("train", "validation"))
    texts = {"train": train[1:], "validation": held_out}
    monkeypatch.setattr("hotlap.train.speedruns.verify.corpus_text", lambda corpus, split: texts[split])
    assert verify(race / "record.json") == 0
    assert "not checked: its training text: this machine's pydocs is another" in capsys.readouterr().out


def test_other_code_is_said_to_be_another(race, capsys):
    rewritten(race / "record.json", lambda record: record["code"].update(sha256="0" * 64, commit="abc"))
    assert verify(race / "record.json") == 0
    assert "differs: the code: it was abc" in capsys.readouterr().out


def set_run(name: str, value, seed: int = 0):
    return lambda record: record["runs"][seed].update({name: value})


EDITS = {
    "bits": (set_run("bpb", 0.5), "metrics.jsonl ends with validation_bpb"),
    "mean": (lambda record: record.update(mean=0.5), "mean is 0.5, and that of its runs is"),
    "sigma": (lambda record: record.update(sigma=0.0), "sigma is 0.0"),
    "interval": (lambda record: record.update(interval=[1.0]), "interval is [1.0]"),
    "fewer runs": (lambda record: record["runs"].pop(0), "its seeds are not 0, 1, 2"),
    "no runs": (lambda record: record.update(runs=[]), "0 runs; a record has 1 to 30"),
    "a run twice": (
        lambda record: record["runs"][1].update(weights_sha256=record["runs"][0]["weights_sha256"]),
        "the same weights",
    ),
    "seconds": (set_run("seconds", 400.0), "trained for 400.0 s, not at most 5 minutes"),
    "no seconds": (set_run("seconds", 0), "trained for 0.0 s"),
    "fewer seconds": (set_run("seconds", 1e-6), "its clock does not fit its"),
    "other seconds": (set_run("seconds", 99.0), "state.json says seconds"),
    "tokens": (set_run("tokens", 123), "has 123 tokens, not"),
    "steps": (lambda r: r["runs"][0].update(steps=2, tokens=2 * 32 * 32), "state.json says step"),
    "another tokenizer": (set_run("tokenizer_sha256", "0" * 64), "has another tokenizer"),
    "other weights": (set_run("weights_sha256", "0" * 64), "is another checkpoint"),
    "two devices": (set_run("device", "RTX 4090", 2), "its runs are of"),
    "a slower device": (set_run("after", CEILING | {"matmul": 7e11}, 2), "fell to 70% of what they were"),
    "no ceiling": (set_run("after", None), "runs 0 after no copy"),
    "a corpus": (lambda record: record.update(corpus="pydoc"), "unknown corpus 'pydoc'; known: climbmix"),
    "a training text": (lambda record: record["data"].update(train_sha256="0"), "another text"),
    "a protocol": (lambda record: record.update(protocol=2), "protocol 2, and this version of hotlap checks"),
    "no number": (lambda record: record.update(mean="1"), "mean is '1'"),
    "not finite": (lambda record: record.update(mean=float("nan")), "mean is nan"),
    "negative": (set_run("bpb", -1.0), "bpb is -1.0"),
    "a field less": (lambda record: record.pop("data"), "no data"),
    "other ceilings": (set_run("before", CEILING | {"copy": 2e10}), "ceilings.json says another before"),
    "other ranks": (set_run("ranks", 8), "machine.json says another ranks"),
    "too large": (set_run("tokens", 10**400), "runs 0 tokens is 1000"),
    "many layers": (lambda r: r["config"]["model"].update(layers=10**9), "1,000,000,000 layers"),
    "another model": (lambda record: record["config"]["model"].update(towers=2), "unknown model field"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_careful_edit_is_found(name, race, capsys):
    change, words = EDITS[name]
    statistics = name in ("bits", "a run twice")
    refused(capsys, rewritten(race / "record.json", change, statistics), words)


def test_a_careless_edit_is_found_at_once(race, capsys):
    text = (race / "record.json").read_text()
    (race / "record.json").write_text(text.replace('"mean": ', '"mean": 1'))
    refused(capsys, race / "record.json", "edited after it was written")


def edit_line(path, number: int, **values) -> None:
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    path.write_text("\n".join(lines) + "\n")


def test_bits_that_metrics_confirm_are_still_scored(race, capsys):
    edit_line(race / "run-0/metrics.jsonl", -1, validation_bpb=0.5)
    record = rewritten(race / "record.json", set_run("bpb", 0.5), runs_too=True)
    refused(capsys, record, "run-0/checkpoints", "and the record says 0.5000")


def test_a_clock_that_ran_slower_than_its_steps_is_found(race, capsys):
    """Half the seconds in record, checkpoint and the last line of metrics: other lines do not follow."""
    run = json.loads((race / "record.json").read_text())["runs"][0]
    checkpoint = run_checkpoints(race / "run-0")[-1]
    half = run["seconds"] / 2
    edit_state(checkpoint, seconds=half)
    edit_line(race / "run-0/metrics.jsonl", -1, seconds=half)
    refused(capsys, rewritten(race / "record.json", set_run("seconds", half)), "does not follow from the one")


def edit_state(checkpoint, **values) -> None:
    """Change a checkpoint's state, and its manifest so that it fits."""
    state = checkpoint / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | values))
    manifest = read_manifest(checkpoint)
    manifest["files"]["state.json"] = {"bytes": state.stat().st_size, "sha256": file_sha256(state)}
    (checkpoint / "manifest.json").write_text(manifest_text(manifest))


def test_a_swapped_checkpoint_is_found(race, capsys):
    swapped = run_checkpoints(race / "run-0")[-1]
    shutil.rmtree(swapped)
    shutil.copytree(run_checkpoints(race / "run-1")[-1], swapped)
    refused(capsys, race / "record.json", "run-1/checkpoints", "is another checkpoint")


def test_training_on_the_validation_text_is_found(race, capsys):
    tokenizer = Tokenizer.load(race / "run-0/data/tokenizer.json")
    texts = [text.decode() for split in ("train", "validation") for text in corpus_text("pydocs", split)]
    write_shards(race / "run-0/data", "train", texts, tokenizer)
    refused(capsys, race / "record.json", "run-0 was trained on its validation text: 100%")


def test_training_on_another_text_is_found(race, capsys):
    tokenizer = Tokenizer.load(race / "run-2/data/tokenizer.json")
    write_shards(race / "run-2/data", "train", ["Something else altogether.\n"], tokenizer)
    refused(capsys, race / "record.json", "run-2 was trained on another text than the record says")


def test_a_tokenizer_that_loses_text_is_found(race, capsys):
    """One whose pattern skips digits would not be asked for them, and bits per byte would not count them."""
    for path in (race / "run-0").rglob("tokenizer.json"):
        path.write_text(path.read_text().replace("\\\\p{N}{1,3}|", ""))
    checkpoint = run_checkpoints(race / "run-0")[-1]
    manifest = read_manifest(checkpoint)
    path = checkpoint / "tokenizer.json"
    manifest["files"]["tokenizer.json"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (checkpoint / "manifest.json").write_text(manifest_text(manifest))
    sha256 = Tokenizer.load(path).sha256
    record = rewritten(race / "record.json", set_run("tokenizer_sha256", sha256))
    refused(capsys, record, "the tokenizer of", "loses a part of the validation text")


def test_files_that_are_no_records_are_refused(race, tmp_path, capsys):
    refused(capsys, tmp_path / "none.json", "no record at", "hotlap speedrun minutes", code=NO_INPUT)
    refused(capsys, race, "is a folder; give the record.json in it", code=NO_INPUT)
    (race / "record.json").write_text((race / "record.json").read_text()[:-9])
    refused(capsys, race / "record.json", "is not JSON")
    (race / "record.json").write_text("[]")
    refused(capsys, race / "record.json", "holds no JSON object")


def test_a_second_start_changes_nothing_that_was_measured(race, capsys):
    before = json.loads((race / "record.json").read_text())["runs"]
    with small_race(ceilings=lambda world: CEILING | {"matmul": 1.0}):
        assert main([*COMMAND, "--out", str(race), "--runs", "3"]) == 0
    assert json.loads((race / "record.json").read_text())["runs"] == before


def test_one_run_is_a_record_but_no_row(tmp_path, capsys):
    path = make_record(tmp_path / "run")
    assert "no row of the table: a row has at least 3 runs" in capsys.readouterr().out
    with small_race():
        assert verify(path) == 0
        assert "a row has at least 3 runs, and this is 1" in capsys.readouterr().out
        code = main([*COMMAND, "--out", str(tmp_path / "run"), "--runs", "2"])
    assert_error(capsys, code, USAGE, "is a single run; choose another --out for --runs 2")


def test_a_text_of_one_s_own_has_no_record(work, capsys):
    with small_race():
        assert main([*COMMAND, "--out", "run", "--data", "text.txt"]) == 0
    assert "text.txt is no corpus of the race" in capsys.readouterr().out
    assert not (work / "run/record.json").exists()
