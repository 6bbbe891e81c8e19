"""nanoGPT and hotlap train on the same characters, in turns, and a checkout is left as it is."""

import json
import pickle

import numpy as np
import pytest
from helpers.commands import BAD_DATA, NO_INPUT, SMALL, USAGE, assert_error
from helpers.small_runs import write_text

from hotlap.bench import race, results
from hotlap.cli import main
from hotlap.train.data.sources import split_documents

# What nanoGPT's train.py reads and prints.
TRAIN = """
import pickle, sys
import numpy as np
import model
assert "--device=cpu" in sys.argv and sys.argv[1] == "config/train_shakespeare_char.py"
data = "data/shakespeare_char/"
ids = np.concatenate([np.fromfile(data + name, dtype=np.uint16) for name in ("train.bin", "val.bin")])
assert ids.max() < pickle.load(open(data + "meta.pkl", "rb"))["vocab_size"]
for step, loss in ((0, 4.2), (2000, 1.5)):
    print(f"step {step}: train loss {loss - 1:.4f}, val loss {loss:.4f}")
    print(f"iter {step}: loss {loss - 1:.4f}, time 34.70ms, mfu 0.05%")
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout of nanoGPT, as far as a race needs it."""
    path = tmp_path / "nanoGPT"
    for name in race.NANOGPT_FILES:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(TRAIN if name == "train.py" else "")
    return path


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt", lines=500)


def files_in(path):
    return {file: file.read_bytes() if file.is_file() else None for file in path.rglob("*")}


def race_here(path, text, out, *flags: str) -> int:
    arguments = ["bench", "peers", "--nanogpt", str(path), "--race", str(text), "--out", str(out), *flags]
    return main(arguments)


def test_a_race_says_who_took_how_long_and_to_which_loss_in_each_turn(
    checkout, text, tmp_path, monkeypatch, capsys
):
    small = (*race.HOTLAP, *SMALL, "--loop.steps", "2", "--loop.evaluate-every", "2")
    monkeypatch.setattr(race, "HOTLAP", small)
    out = tmp_path / "out"
    before = files_in(checkout)
    assert race_here(checkout, text, out) == 0
    assert files_in(checkout) == before
    content = results.load(out / "shakespeare-char.json")
    assert [(row["case"][-6:], row["provider"]) for row in content["rows"]] == [
        ("turn 1", "hotlap"), ("turn 1", "nanoGPT"), ("turn 2", "nanoGPT"), ("turn 2", "hotlap"),
    ]  # fmt: skip
    seconds = {(row["case"], row["provider"]): row["seconds"] for row in content["rows"]}
    for row in content["rows"]:
        assert row["processor_seconds"] > 0 and 0 < row["validation_loss"] < 6
        ratio = seconds[row["case"], "nanoGPT"] / row["seconds"]
        assert row["times_as_fast_as_peer"] == pytest.approx(ratio)
        assert row["provider"] == "hotlap" or row["validation_loss"] == 1.5
    assert content["text"]["characters"] == len(text.read_text())
    assert "--max_iters=2000" in content["commands"][0] and "shakespeare-char" in content["commands"][1]
    assert (out / "shakespeare-char.csv").exists()
    said = capsys.readouterr().err
    for part in ("turn 1 of 2, nanoGPT: step 2000: train loss", "turn 2 of 2, hotlap: run-2: step 2/2"):
        assert part in said


def test_both_train_and_validate_on_the_same_characters(checkout, text, tmp_path):
    text.write_text("Grüße, Welt!\r\n" * 1000, encoding="utf-8", newline="")
    copy = race.copy_of(checkout, tmp_path / "copy", race.text_of(str(text)))
    data = copy / "data" / "shakespeare_char"
    meta = pickle.loads((data / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == len(meta["itos"]) and meta["stoi"] == {c: i for i, c in meta["itos"].items()}
    decoded = [
        "".join(meta["itos"][i] for i in np.fromfile(data / name, dtype=np.uint16))
        for name in ("train.bin", "val.bin")
    ]
    assert [[part] for part in decoded] == list(split_documents(str(text)))


def test_the_plays_are_cut_to_the_length_of_nanogpts_own_text(monkeypatch):
    monkeypatch.setattr(race, "documents", lambda data: ["To be.\n"] * 200_000)
    assert len(race.text_of("shakespeare")) == 1_115_394 < len(race.text_of("text.txt"))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise ModuleNotFoundError('tiktoken')", "failed (1): "),
        ("print('no tiktoken')", "printed no validation loss: no "),
    ],
)
def test_a_peer_that_fails_is_named_with_its_last_words(checkout, tmp_path, script, said):
    (checkout / "train.py").write_text(script)
    copy = race.copy_of(checkout, tmp_path / "copy", "text" * 100)
    with pytest.raises(ValueError, match=r"turn 1 of 2, nanoGPT .*tiktoken") as error:
        race.run("turn 1 of 2, nanoGPT", race.NANOGPT, copy)
    assert said in str(error.value)


def test_what_a_race_needs_is_said(checkout, text, tmp_path, capsys):
    code = race_here(checkout, text, tmp_path, "--rows", "2")
    assert_error(capsys, code, USAGE, "--race needs --nanogpt PATH")
    text.write_text("short")
    assert_error(capsys, race_here(checkout, text, tmp_path), BAD_DATA, "5 characters", "give a longer text")
    (checkout / "configurator.py").unlink()
    assert_error(
        capsys, race_here(checkout, text, tmp_path), NO_INPUT, "configurator.py", "is that a checkout"
    )


def test_a_run_beside_busy_processes_is_warned_of(checkout, text, tmp_path, monkeypatch):
    shares = iter((0.5, 0.01, None, 0.9))

    def run(*_: object) -> dict:
        return {
            "seconds": 1.0, "processor_seconds": 1.0, "share_of_others": next(shares), "validation_loss": 2.0,
        }  # fmt: skip

    monkeypatch.setattr(race, "run", run)
    race.race(checkout, str(text), tmp_path)
    first, second = json.loads((tmp_path / "shakespeare-char.json").read_text())["warnings"]
    assert first.endswith("turn 1, hotlap: other processes used 50% of the CPUs")
    assert second.endswith("turn 2, hotlap: other processes used 90% of the CPUs")


def test_processor_seconds_are_those_of_the_run_alone(checkout, tmp_path, monkeypatch):
    spin = "import time\nwhile time.process_time() < 0.5: pass\nprint('val loss 1.0')"
    quiet = "import time\ntime.sleep(0.5)\nprint('val loss 1.0')"
    used = [race.run("turn", ("-c", code), None)["processor_seconds"] for code in (spin, quiet)]
    assert used[0] >= 0.5 > used[1]
