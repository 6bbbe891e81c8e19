"""A damaged checkpoint is refused by name, and loading one never executes code."""

import contextlib
import io
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import built, digests, load_newest, save_steps, saved
from helpers.ranks import Failed, in_world, run_ranks

from hotlap.common.errors import DataError
from hotlap.common.files import file_sha256
from hotlap.model.manifest import manifest_text, read_manifest
from hotlap.model.weights import load_model, run_checkpoints
from hotlap.train.distributed.world import joined
from hotlap.train.run.resume import load_checkpoint, read_state, verify_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of 2 ranks, and the hashes of its checkpoints."""
    run = tmp_path_factory.mktemp("original") / "run"
    return run, saved(run, 3, 6, size=2)


@pytest.fixture
def run(original, tmp_path):
    """A copy of the run to damage."""
    shutil.copytree(original[0], tmp_path / "run")
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-000006"


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def flip(path: Path, byte: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


FILES = [
    "config.json",
    "manifest.json",
    "optimizer/random-00001.json",
    "optimizer/random-00002.json",
    "optimizer/shard-00001-model-00001-of-00001.safetensors",
    "optimizer/shard-00002-model-00001-of-00001.safetensors",
    "shard-00001-model-00001-of-00001.safetensors",
    "shard-00002-model-00001-of-00001.safetensors",
    "state.json",
    "tokenizer.json",
]


def test_a_checkpoint_has_these_files_and_no_others(run):
    assert files_of(newest(run)) == FILES


def test_one_flipped_bit_in_any_file_is_refused_by_name(run):
    generator = random.Random(0)
    refused = 0
    with joined() as world:
        for i in range(50):
            path = newest(run) / FILES[i % len(FILES)]
            whole = path.read_bytes()
            flip(path, generator.randrange(len(whole)), generator.randrange(8))
            with pytest.raises(DataError, match=path.name):
                load_newest(world, run, choice=str(newest(run)))
            refused += 1
            path.write_bytes(whole)
    assert refused == 50


@pytest.mark.parametrize("name", FILES)
def test_auto_falls_back_to_the_previous_checkpoint_and_logs_why(original, run, name, caplog):
    path = newest(run) / name
    flip(path, path.stat().st_size // 2)
    raw = path.read_bytes()
    with joined() as world:
        assert load_newest(world, run) == (3, original[1][3])
        assert name in caplog.text and "trying the previous checkpoint" in caplog.text
        assert [p.name for p in run_checkpoints(run)] == ["step-000003"]
        save_steps(world, run, (6,))  # it is written again
        verify_checkpoint(newest(run), world)
    aside = next((run / "checkpoints").glob("aside-step-000006-*"))
    assert (aside / name).read_bytes() == raw and f"renamed to {aside.name}" in caplog.text


@pytest.mark.parametrize("damaged", [1, 2])
def test_ranks_agree_that_a_file_is_damaged_whoever_has_read_it(original, run, damaged):
    flip(newest(run) / f"optimizer/shard-0000{damaged}-model-00001-of-00001.safetensors", -1)
    assert run_ranks(2, in_world, load_newest, run, (2,)) == [(3, original[1][3])] * 2
    with pytest.raises(Failed) as failure:
        run_ranks(2, in_world, load_newest, run, (2,), str(next((run / "checkpoints").glob("aside-*"))))
    assert all(f"shard-0000{damaged}" in text for text in failure.value.texts.values())


@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short_or_missing_is_refused_by_name(run, name, damage):
    path = newest(run) / name
    raw = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"")
    with joined() as world, pytest.raises(DataError, match=path.name):
        verify_checkpoint(newest(run), world)


@pytest.mark.parametrize(
    "text", ["", "garbage", "[]", "null", '{"files": {}}', '{"format": 2, "files": 3}', '{"format": 99}']
)
def test_an_invalid_manifest_is_refused(run, text):
    (newest(run) / "manifest.json").write_text(text)
    with joined() as world, pytest.raises(DataError, match=r"step-000006/manifest\.json"):
        verify_checkpoint(newest(run), world)


def test_files_of_another_checkpoint_are_refused_by_name(run):
    other = run / "checkpoints" / "step-000003"
    shutil.copy(other / "manifest.json", newest(run) / "manifest.json")
    with joined() as world:
        with pytest.raises(DataError, match=r"step-000006/.*has changed since it was saved"):
            verify_checkpoint(newest(run), world)
        for name in ("shard-00003-model-00001-of-00001.safetensors", "optimizer/more.safetensors"):
            shutil.copy(other / FILES[6], other / name)
            with pytest.raises(DataError, match=f"{name} does not belong to the checkpoint"):
                verify_checkpoint(other, world)
            (other / name).unlink()
        verify_checkpoint(other, world)


def test_a_named_checkpoint_that_is_damaged_is_refused_and_no_other_taken(run):
    (newest(run) / "state.json").write_text("{}")
    with joined() as world:
        for named in (newest(run), run):
            with pytest.raises(DataError, match=r"step-000006/state\.json"):
                load_newest(world, run, choice=str(named))
    assert len(run_checkpoints(run)) == 2


def test_a_run_with_only_damaged_checkpoints_is_not_started_over(run):
    for folder in run_checkpoints(run):
        (folder / FILES[6]).write_bytes(b"")
    with joined() as world, pytest.raises(DataError, match=r"all checkpoints in .* are damaged"):
        load_newest(world, run)
    assert len(run_checkpoints(run)) == 2


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def signed(folder: Path) -> dict:
    """Write a manifest that fits the files as they are, as an attacker can."""
    fields = read_manifest(folder)
    names = [n for n in files_of(folder) if n != "manifest.json"]
    fields["files"] = {
        n: {"bytes": (folder / n).stat().st_size, "sha256": file_sha256(folder / n)} for n in names
    }
    (folder / "manifest.json").write_text(manifest_text(fields))
    return fields


@pytest.mark.parametrize("name", [*FILES, ".metadata", "optimizer/.metadata"])
@pytest.mark.parametrize("dump", [torch.save, pickle.dump], ids=["torch", "pickle"])
def test_a_pickle_with_a_matching_manifest_is_not_executed(run, tmp_path, name, dump):
    sprung = tmp_path / "sprung"
    with open(newest(run) / name, "wb") as file:
        dump({"head.weight": Trap(sprung)}, file)
    with joined() as world:
        if name == "manifest.json":
            with pytest.raises(DataError, match=r"manifest\.json"):
                verify_checkpoint(newest(run), world)
        else:
            manifest = signed(newest(run))
            assert verify_checkpoint(newest(run), world) == manifest
            manifest = manifest | {"world_size": 1}  # so that the random state is read too
            run_everything(newest(run), manifest, world)
    assert not sprung.exists()
    if dump is pickle.dump:
        pickle.loads((newest(run) / name).read_bytes())
    else:
        torch.load(io.BytesIO((newest(run) / name).read_bytes()), weights_only=False)
    assert sprung.exists()  # it would have


def run_everything(folder: Path, manifest: dict, world) -> None:
    """Everything that reads a checkpoint; errors are ignored."""
    for reader in (
        lambda: load_checkpoint(folder, manifest, *built(), world),
        lambda: load_model(folder, CPU, torch.float32),
    ):
        with contextlib.suppress(ValueError):
            reader()


@pytest.mark.parametrize("name", ["state.json", "optimizer/random-00001.json"])
@pytest.mark.parametrize("text", ["", "[]", "null", '{"python": 3}', '{"step": "3"}', "[" * 100_000])
def test_state_that_fits_the_manifest_and_makes_no_sense_is_refused_by_name(run, name, text):
    (newest(run) / name).write_text(text)
    manifest = signed(newest(run)) | {"world_size": 1}
    with joined() as world, pytest.raises(DataError, match=Path(name).name):
        read_state(newest(run))
        load_checkpoint(newest(run), manifest, *built(), world)


def test_a_checkpoint_loads_without_a_process_group(original):
    run, held = original
    model, _ = load_model(run, CPU, torch.float32)
    found = digests(model, built()[1])
    assert {name: found[name] for name in model.state_dict()} == {
        name: held[6][name] for name in model.state_dict()
    }
    state = json.loads((newest(run) / "state.json").read_text())
    assert (state["step"], state["tokens"]) == (6, 60)
