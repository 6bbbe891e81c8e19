"""Each variant of the recipe differs from it in what its name says, for as long as it trains."""

import dataclasses
import json

import pytest
import torch
from helpers.small_runs import small_run
from helpers.tools import tiny_config

from hotlap.model import gpt
from hotlap.model.gpt import GPT
from hotlap.train.distributed.sharding import materialize, parallelize
from hotlap.train.distributed.world import joined
from hotlap.train.loop import LoopConfig
from hotlap.train.optim import muon_adamw
from hotlap.train.optim.muon_adamw import MuonAdamW
from hotlap.train.presets import tiny
from hotlap.train.studies import sweep
from hotlap.train.studies.ablations import (
    FIELDS,
    ablations,
    adamw_for_matrices,
    random_projections,
    tied_head,
)
from hotlap.train.studies.sweep import BASE, run_variants

PATCHED = [name for name, v in ablations(tiny()).items() if name != BASE and name not in FIELDS]


def test_every_field_is_changed_from_what_the_recipe_has():
    variants = ablations(tiny())
    assert len(PATCHED) >= 8
    for name in FIELDS:
        assert variants[name].config != variants[BASE].config, name
        variants[name].config.validate()


def test_all_variants_train_and_leave_nothing_changed(tmp_path, monkeypatch):
    texts = [
        json.dumps({"text": f"{i} is {i}"}) for i in range(300)
    ]  # several in a row, for masks to tell apart
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    base = small_run(tmp_path, loop=LoopConfig(3), schedule=tiny().schedule)
    base = dataclasses.replace(base, data=str(tmp_path / "texts.jsonl"))
    found = {name: v for name, v in ablations(base).items() if name in PATCHED or name == BASE}
    MuonAdamW(GPT(tiny_config()).init_weights(), tiny().optim)  # of its first instance torch wraps the class
    before = {m: dict(vars(m)) for m in (gpt, GPT, muon_adamw, MuonAdamW)}
    monkeypatch.setattr(sweep, "draw", lambda *given: False)
    rows = run_variants(found, 0, 1, tmp_path / "out")
    assert all(vars(m) == names for m, names in before.items())
    assert not any(row["note"] for row in rows)
    scores = [row["bpb"] for row in rows]
    assert len(set(scores)) == len(scores), "a variant is the base by another name"


@pytest.mark.parametrize("name", ["GELU", "no QK-norm", "no rotary"])
def test_a_patch_changes_what_the_model_computes(name, random_model):
    model = random_model(tiny_config())
    ids = torch.arange(20).view(1, -1)
    before = model(ids)
    with ablations(tiny())[name].changed():
        assert not torch.allclose(model(ids), before, atol=1e-3)
    assert torch.equal(model(ids), before)


def test_without_rotary_a_token_knows_no_distance(random_model):
    config = tiny_config(layers=1, smear=False, window_pattern="L")
    model = random_model(config)
    a, b = torch.tensor([[5, 6, 7, 9]]), torch.tensor([[7, 5, 6, 9]])
    with ablations(tiny())["no rotary"].changed():
        assert torch.allclose(model(a)[0, -1], model(b)[0, -1], atol=1e-5)
    assert not torch.allclose(model(a)[0, -1], model(b)[0, -1], atol=1e-3)


def test_a_tied_head_is_the_embedding():
    # moving a model off the meta device and sharding it is where tied weights part
    with tied_head(), joined() as world:
        with torch.device("meta"):
            model = GPT(tiny_config())
        parallelize(model, world, "none", False)
        materialize(model, world.device, 0)
        optimizer = MuonAdamW(model, tiny().optim)
        model(torch.arange(8).view(1, -1), torch.arange(8).view(1, -1)).backward()
        optimizer.step()
    assert model.head.weight is model.embedding.weight and "head.weight" not in dict(model.named_parameters())


def test_adamw_takes_all():
    with adamw_for_matrices():
        groups = MuonAdamW(GPT(tiny_config()).init_weights(), tiny().optim).param_groups
    assert not any(group["muon"] for group in groups)


def test_projections_start_at_random_and_everything_else_as_before():
    before = GPT(tiny_config()).init_weights().state_dict()
    with random_projections():
        after = GPT(tiny_config()).init_weights().state_dict()
    for name, weight in after.items():
        if name.endswith("proj.weight"):
            assert weight.std() > 0.005
        else:
            assert torch.equal(weight, before[name]), name
