"""A run gives the same result however often it is stopped, on any number of ranks."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.ranks import Failed, run_ranks
from helpers.run_functions import STAGES, fine_tuning, losses, metrics, pretraining, racing, soak, state_of

from hotlap.model.tokenizer import train_characters
from hotlap.model.weights import run_checkpoints
from hotlap.train.data.shards import write_shard

RESUMED = partial(pretraining, resume="auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Contains the runs `one` and `two`: 10 uninterrupted steps on one rank and on two."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(1, pretraining, str(folder), "one")
    run_ranks(2, pretraining, str(folder), "two")
    return folder


def differences(run: Path, reference: Path) -> list[float]:
    pairs = zip(metrics(run), metrics(reference), strict=True)
    return [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs]


@pytest.mark.parametrize("size, reference", [(1, "one"), (2, "two")])
def test_a_run_resumed_after_a_failure_is_bit_identical(folder, size, reference):
    name = f"failed-{size}"
    with pytest.raises(Failed, match="injected at step, step 6"):
        run_ranks(size, pretraining, str(folder), name, env={"FAULT": "step:0:6:raise"})
    run_ranks(size, RESUMED, str(folder), name)
    assert losses(folder / name) == losses(folder / reference)
    assert state_of(folder / name) == state_of(folder / reference)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_run_of_two_ranks_resumes_on_another_number(folder, size):
    name = f"resharded-{size}"
    with pytest.raises(Failed):
        run_ranks(2, pretraining, str(folder), name, env={"FAULT": "step:0:4:raise"})
    run_ranks(size, RESUMED, str(folder), name)
    assert max(differences(folder / name, folder / "two")) < 1e-5


def test_hybrid_sharding_gives_the_same_run(folder):
    nodes = {"LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(Failed):
        run_ranks(4, pretraining, str(folder), "nodes", env=nodes | {"FAULT": "step:3:6:raise"})
    run_ranks(4, RESUMED, str(folder), "nodes", env=nodes)
    assert max(differences(folder / "nodes", folder / "two")) < 1e-5


def test_growing_batches_are_the_same_on_any_number_of_ranks(folder):
    for size in (1, 2):
        run_ranks(size, partial(pretraining, schedule=STAGES), str(folder), f"stages-{size}")
    assert [m["tokens"] for m in metrics(folder / "stages-1")][-1] == 32 * (4 * 4 + 3 * 8 + 3 * 12)
    assert max(differences(folder / "stages-2", folder / "stages-1")) < 1e-5


def test_a_timed_run_ends_at_the_same_step_on_all_ranks(folder):
    timed = partial(pretraining, steps=100_000, loop={"minutes": 1 / 60, "save_every": 100_000})
    run_ranks(2, timed, str(folder), "timed")
    last = metrics(folder / "timed")[-1]
    assert last["seconds"] < 2 and "validation_loss" in last
    assert run_checkpoints(folder / "timed")[-1].name == f"step-{last['step'] + 1:06d}"


def test_all_ranks_return_a_speedrun_s_result_and_rerunning_keeps_it(folder):
    (folder / "shards").mkdir()
    tokens = np.random.default_rng(0).integers(1, 60, 4000)
    for split in ("train", "validation"):
        write_shard(folder / "shards" / f"{split}_000000.bin", tokens, 64)
    train_characters("".join(map(chr, range(64, 120)))).save(folder / "shards" / "tokenizer.json")
    (first, second), again = (run_ranks(2, racing, str(folder), "race") for _ in range(2))
    assert first == second and again == [first, first] and first["losses"] == [first["mean"]]


def test_a_batch_that_does_not_divide_among_ranks_is_refused_before_the_first_step(folder):
    with pytest.raises(
        Failed, match=r"12 rows is not a multiple of 5 ranks .* make batch_rows a multiple of 5"
    ):
        run_ranks(5, pretraining, str(folder), "five")
    assert not (folder / "five").exists()


def test_the_same_seed_repeats_the_run_and_another_does_not(folder):
    run_ranks(2, pretraining, str(folder), "again")
    run_ranks(2, partial(pretraining, seed=1), str(folder), "other")
    assert losses(folder / "again") == losses(folder / "two")
    assert state_of(folder / "again") == state_of(folder / "two")
    assert losses(folder / "other") != losses(folder / "two")


def test_accumulation_and_ranks_do_not_change_losses_of_pretraining_and_fine_tuning(folder):
    longer = partial(pretraining, steps=20)
    run_ranks(1, longer, str(folder), "base")
    run_ranks(1, fine_tuning, str(folder), "tuned", "base")
    for size, micro in ((1, "4"), (2, "all"), (3, "2"), (4, "1")):
        run_ranks(size, partial(longer, micro_batch=micro), str(folder), f"base-{size}")
        run_ranks(size, partial(fine_tuning, micro_batch=micro), str(folder), f"tuned-{size}", "base")
        assert max(differences(folder / f"base-{size}", folder / "base")) < 1e-5
        assert max(differences(folder / f"tuned-{size}", folder / "tuned")) < 1e-5
        validation = [metrics(folder / name)[-1]["validation_loss"] for name in ("base", f"base-{size}")]
        assert validation[1] == pytest.approx(validation[0], rel=1e-5)


SAVING = ("made", "shards", "manifest", "rename", "renamed", "retention")


def test_a_run_killed_repeatedly_ends_bit_identical(folder):
    choose, kills = random.Random(0), 0
    for attempt in range(8):
        found = run_checkpoints(folder / "killed")
        reached = int(found[-1].name.removeprefix("step-")) if found else 0
        point, step = choose.choice(("step", "loss")), choose.randrange(reached, 10)
        if choose.random() < 0.6:
            point, step = f"checkpoint-{choose.choice(SAVING)}", min(10, reached + 4)
        faults = [f"{point}:0:{step}:sigkill"]
        if attempt % 3:  # kill both ranks, else one, which the other has to notice
            faults.append(f"{point}:1:{step}:sigkill")
        try:
            run_ranks(2, RESUMED, str(folder), "killed", env={"FAULT": ",".join(faults)})
            break
        except Failed:
            kills += 1
    else:
        run_ranks(2, RESUMED, str(folder), "killed")
    assert kills > 4
    assert losses(folder / "killed") == losses(folder / "two")
    assert state_of(folder / "killed") == state_of(folder / "two")


def test_memory_and_open_files_do_not_grow(tmp_path):
    seen = run_ranks(1, soak, str(tmp_path), "soak", 300, timeout=120)[0]
    memory, files = zip(*seen[2:], strict=True)  # after the set-up in the first steps
    assert files[-1] <= files[0] + 1  # a checkpoint may be being written
    assert memory[-1] - memory[0] < 20 << 20
