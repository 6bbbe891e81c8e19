"""Checkpoints and folders of other runs are refused field by field, never cast, and never overwritten."""

import dataclasses
import json
import subprocess
import sys

import pytest
from helpers.checkpoints import TOKENIZER, built, digests, load_newest, save_steps

from hotlap.common.errors import DataError
from hotlap.common.options import to_json
from hotlap.model.config import GPTConfig
from hotlap.model.tokenizer import train_characters
from hotlap.model.weights import run_checkpoints
from hotlap.train.distributed.world import joined
from hotlap.train.pretrain import PretrainConfig
from hotlap.train.run.folder import open_run, run_lock
from hotlap.train.run.resume import load_checkpoint, resume_from, verify_checkpoint


@pytest.mark.parametrize(
    ("fields", "differing"),
    [
        ({"layers": 2}, ["model.layers: saved 1, current 2"]),
        ({"vocab_size": 64}, ["model.vocab_size: saved 67, current 64"]),
        (
            {"width": 64, "heads": 2, "smear": False},
            ["model.heads: saved 1, current 2", "model.smear: saved True, current False",
             "model.width: saved 32, current 64"],
        ),
    ],
)  # fmt: skip
def test_a_model_of_another_shape_is_refused_with_every_field_that_differs(tmp_path, fields, differing):
    with joined() as world:
        save_steps(world, tmp_path, (3,))
        model, states = built(**fields)
        before = digests(model, states)
        for choice in ("auto", str(tmp_path)):
            with pytest.raises(DataError) as caught:
                resume_from(tmp_path, choice, model, states, world)
            assert str(caught.value).endswith(f"does not fit this run: {'; '.join(differing)}")
        assert digests(model, states) == before and len(run_checkpoints(tmp_path)) == 1


def test_another_dtype_is_refused_tensor_by_tensor_and_never_cast(tmp_path):
    with joined() as world:
        save_steps(world, tmp_path, (3,))
        folder = run_checkpoints(tmp_path)[0]
        manifest = verify_checkpoint(folder, world)
        model, states = built()
        model.head.bfloat16()
        states.tensors["head.weight/exp_avg"] = states.tensors["head.weight/exp_avg"].double()
        del states.tensors["embedding.weight/step"]
        states.tensors["embedding.weight/steps"] = states.tensors["head.weight/step"][None].expand(2)
        before = digests(model.float(), states)
        model.head.bfloat16()
        with pytest.raises(DataError) as caught:
            load_checkpoint(folder, manifest, model, states, world)
        for line in (
            "head.weight: saved [67, 32] float32, current [67, 32] bfloat16",
            "head.weight/exp_avg: saved [67, 32] float32, current [67, 32] float64",
            "embedding.weight/step: saved [1] float32, current nothing",
            "embedding.weight/steps: saved nothing, current [2] float32",
        ):
            assert line in str(caught.value)
        assert digests(model.float(), states) == before


def test_another_tokenizer_is_refused(tmp_path):
    with joined() as world:
        save_steps(world, tmp_path, (3,))
        TOKENIZER.save(tmp_path / "tokenizer.json")
        assert load_newest(world, tmp_path)[0] == 3
        train_characters("abd").save(tmp_path / "tokenizer.json")
        with pytest.raises(DataError, match=f"tokenizer: saved sha256 {TOKENIZER.sha256[:12]}.*, current"):
            load_newest(world, tmp_path)


def test_resuming_from_an_earlier_checkpoint_renames_the_later_ones(tmp_path):
    with joined() as world:
        held = save_steps(world, tmp_path, (3, 6))
        folder = tmp_path / "checkpoints"
        assert load_newest(world, tmp_path, choice=str(folder / "step-000003")) == (3, held[3])
        assert [p.name for p in run_checkpoints(tmp_path)] == ["step-000003"]
        assert len(list(folder.glob("aside-step-000006-*"))) == 1
        other = save_steps(world, tmp_path, (6,), seed=50)
        assert load_newest(world, tmp_path) == (6, other[6])


def test_a_run_can_resume_from_another_run_s_checkpoint(tmp_path):
    with joined() as world:
        held = save_steps(world, tmp_path / "first", (3, 6))
        second = tmp_path / "second"
        second.mkdir()
        for choice in (str(tmp_path / "first"), str(tmp_path / "first" / "checkpoints" / "step-000006")):
            assert load_newest(world, second, choice=choice) == (6, held[6])
        assert len(run_checkpoints(tmp_path / "first")) == 2
        with pytest.raises(FileNotFoundError, match="no model at"):
            load_newest(world, second, choice=str(tmp_path / "none"))
        assert load_newest(world, second)[0] == 0  # it has no checkpoint yet


def test_a_run_with_checkpoints_does_not_start_over(tmp_path):
    with joined() as world:
        save_steps(world, tmp_path, (3,))
        with pytest.raises(FileExistsError, match="already holds checkpoints; resume with --resume auto"):
            load_newest(world, tmp_path, choice="no")
        (tmp_path / "new").mkdir()
        assert load_newest(world, tmp_path / "new", choice="no")[0] == 0


def test_a_run_from_before_a_field_existed_resumes_with_the_default_of_the_field(tmp_path):
    config = PretrainConfig(out=tmp_path, resume="auto")
    saved = json.loads(to_json(config))
    del saved["profile"], saved["validation_tokens"], saved["model"]["qk_gain"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "metrics.jsonl").touch()
    open_run(tmp_path, config, resume=True)
    other = dataclasses.replace(config, model=GPTConfig(qk_gain=1.0))
    with pytest.raises(ValueError, match=r"model\.qk_gain: saved 1\.2, current 1\.0"):
        open_run(tmp_path, other, resume=True)


def test_a_second_process_in_a_run_is_refused_naming_the_first(tmp_path):
    code = (
        "import sys, pathlib; from hotlap.train.run.folder import run_lock\n"
        "with run_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], **pipes) as first:
        try:
            assert first.stdout.readline() == "held\n"
            with (
                pytest.raises(ValueError, match=f"in use by process {first.pid} on "),
                run_lock(tmp_path / "run"),
            ):
                pass
        finally:
            first.stdin.close()
    with run_lock(tmp_path / "run"):  # free again
        pass
