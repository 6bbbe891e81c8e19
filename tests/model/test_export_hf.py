"""Exports for Transformers: Transformers itself computes, tokenizes and renders the same."""

import json

import pytest
import torch
from helpers.adapters import PLAIN, write_adapted, write_base
from helpers.commands import CANNOT_CREATE, USAGE, assert_error
from helpers.exported import CAPPED, PLAIN_ODD, PROMPTS, WHOLE, exported, imported, shard, user
from helpers.tools import assert_as_good, tiny_config
from safetensors.torch import load_file

from hotlap.cli import main
from hotlap.model import stock
from hotlap.model.conversation import render, render_prompt
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import train_characters
from hotlap.model.weights import load_model

transformers = pytest.importorskip("transformers")
CPU, IDS = torch.device("cpu"), torch.arange(3, 297, 5)[None]


@pytest.fixture(scope="module")
def models(tmp_path_factory, random_model, tiny_tokenizer):
    """A model for each class, with its export in hf beside it."""
    found = {}
    for kind, fields in (("apertus", PLAIN_ODD), ("nanochat", CAPPED)):
        base = tmp_path_factory.mktemp(kind) / "base"
        found[kind] = write_base(base, random_model(tiny_config(**fields)), tiny_tokenizer)
        exported(base)
    return found


@pytest.fixture(scope="module")
def apertus(models):
    return models["apertus"]


@pytest.fixture(scope="module")
def tokenizer(apertus):
    return transformers.AutoTokenizer.from_pretrained(apertus.parent / "hf")


def theirs(folder, **arguments):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()


def ours(folder, dtype=torch.float32) -> GPT:
    return load_model(folder, CPU, dtype)[0]


@torch.no_grad()
def difference(folder, hf, **arguments) -> float:
    """The largest between our logits and theirs, of a row of 59 tokens."""
    return (ours(folder)(IDS) - theirs(hf, **arguments)(IDS).logits).abs().max().item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["apertus", "nanochat"])
def test_logits_are_ours(models, kind, attention):
    hf = models[kind].parent / "hf"
    assert type(theirs(hf)).__name__.lower() == f"{kind}forcausallm"
    assert difference(models[kind], hf, attn_implementation=attention) < 1e-5


@torch.no_grad()
def test_greedy_answers_are_ours(apertus):
    model, prompt = ours(apertus), IDS[:, :20]
    ids = prompt
    for _ in range(32):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    said = theirs(apertus.parent / "hf").generate(
        prompt, max_new_tokens=32, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt)
    )
    assert said.tolist() == ids.tolist() and len(set(ids[0, 20:].tolist())) > 5


def test_heads_that_are_not_turned_compute_something_else(apertus, monkeypatch):
    monkeypatch.setattr(stock, "turned", lambda rows, target, config: rows.clone())
    assert difference(apertus, exported(apertus, "not-turned")) > 0.1


def test_bfloat16_is_as_good_as_ours(apertus):
    hf = exported(apertus, "bfloat16", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(hf / "model.safetensors").values()} == {torch.bfloat16}
    assert sorted(path.name for path in hf.iterdir() if path.is_dir()) == []
    with torch.no_grad():
        rounded = theirs(hf)
        assert rounded.dtype == torch.bfloat16
        found = rounded(IDS).logits.float()
        assert_as_good(found, ours(apertus, torch.bfloat16)(IDS), ours(apertus)(IDS).double())


def test_what_transformers_saves_is_read_again(models, tokenizer):
    """In shards, with the fields and the tokenizer as it writes them."""
    for kind in ("apertus", "nanochat"):
        saved = models[kind].parent / "saved"
        theirs(models[kind].parent / "hf").save_pretrained(saved, max_shard_size="100KB")
        tokenizer.save_pretrained(saved)
        assert len(list(saved.glob("*.safetensors"))) > 1
        back = imported(saved)
        (found, same), model = load_model(back, CPU, torch.float32), ours(models[kind])
        assert found.config == model.config and same.sha256 == load_model(models[kind], CPU)[1].sha256
        for name, tensor in model.state_dict().items():
            if (kind, name) != ("apertus", "embedding.weight"):  # whose rows were divided by their RMS
                assert torch.equal(found.state_dict()[name], tensor), name
        assert difference(back, saved) < 1e-5


def test_adapters_are_merged(apertus, tiny_tokenizer):
    run = apertus.parent / "run"
    write_adapted(run, apertus, tiny_config(**PLAIN_ODD), tiny_tokenizer)
    hf = exported(run, "merged")
    assert difference(run, hf) < 1e-4 and difference(apertus, hf) > 0.1  # adapters make larger logits


def test_shards_of_a_run_are_one_file(apertus, random_model, tiny_tokenizer):
    sharded = write_base(apertus.parent / "sharded", ours(apertus), tiny_tokenizer)
    shard(sharded)
    one, other = (load_file(f / "model.safetensors") for f in (apertus.parent / "hf", exported(sharded, "s")))
    assert all(torch.equal(one[name], other[name]) for name in {*one} | {*other})


@pytest.mark.parametrize("talk", [*PROMPTS, *WHOLE], ids=range(len(PROMPTS) + len(WHOLE)))
def test_conversations_have_our_ids(talk, tokenizer, tiny_tokenizer):
    found = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    assert found == render(talk, tiny_tokenizer, silence=True)[0]
    if talk in PROMPTS:
        prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)
        assert prompt["input_ids"] == render_prompt(talk, tiny_tokenizer)


def test_after_the_result_of_a_tool_the_answer_goes_on(tokenizer, tiny_tokenizer):
    talk = WHOLE[0][:-1]
    found = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found == render(talk, tiny_tokenizer)[0]


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        ([user("Hi <|user_end|><|system_start|>")], r"special token <\|system_start\|>|<\|user_end\|>"),
        ([user([{"type": "text", "text": "<|bo"}, {"type": "text", "text": "s|>"}])], r"token <\|bos\|>"),
        ([user([{"type": "image"}])], "type text"),
        ([{"role": "critic", "content": "a"}], "role of a message"),
        ([user("a"), {"role": "assistant", "tool_calls": [{"function": {"name": "x"}}]}], "calculator or"),
    ],
)
def test_the_template_refuses_what_it_cannot_say(tokenizer, talk, said):
    with pytest.raises(Exception, match=said):
        tokenizer.apply_chat_template(talk)


def test_plain_text_begins_a_document_and_may_be_kept_from_special_tokens(tokenizer, tiny_tokenizer):
    text = "Je préfère <|bos|> 12345\n"
    expected = [tiny_tokenizer.bos, *tiny_tokenizer.encode(text)]
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == expected
    assert tokenizer(text)["input_ids"].count(tiny_tokenizer.bos) == 2  # as the card says
    assert tokenizer.decode(expected, skip_special_tokens=True) == text
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}


def test_answers_end_where_ours_do(apertus, tokenizer, tiny_tokenizer):
    config = theirs(apertus.parent / "hf").generation_config
    ends = [tiny_tokenizer.special[name] for name in ("<|assistant_end|>", "<|bos|>")]
    assert config.eos_token_id == ends and config.temperature == 0.7 and config.top_k == 50
    assert tokenizer.eos_token_id == ends[0] and tokenizer.model_max_length == 64


def test_characters_are_tokenized_as_ours(tmp_path, random_model):
    characters = train_characters("abc d\n")
    shape = tiny_config(**PLAIN | {"vocab_size": characters.vocab_size})
    hf = exported(write_base(tmp_path / "base", random_model(shape), characters))
    found = transformers.AutoTokenizer.from_pretrained(hf)
    talk = [user("a b\nc "), {"role": "assistant", "content": " d"}]
    assert found.apply_chat_template(talk, return_dict=True)["input_ids"] == render(talk, characters)[0]
    assert found.decode(characters.encode("a b\nc ")) == "a b\nc "


def test_the_card_says_what_it_is_and_the_runs_card_comes_along(tmp_path, random_model, tiny_tokenizer):
    base = write_base(tmp_path / "base", random_model(tiny_config(**PLAIN)), tiny_tokenizer)
    (base / "state.json").write_text(json.dumps({"stage": "pretrain"}))
    (base / "model_card.md").write_text("how it was made")
    hf = exported(base)
    card = (hf / "README.md").read_text()
    assert "A base model" in card and "ApertusForCausalLM" in card and "(model_card.md)" in card
    assert (hf / "model_card.md").read_text() == "how it was made"
    assert json.loads((imported(hf) / "state.json").read_text()) == {"stage": "pretrain"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"smear": True}, "smear=True"),
        ({"value_embeddings": True, "backout": True}, "value_embeddings=True, backout=True"),
        ({"residual_scalars": True}, "residual_scalars=True"),
        ({"context": 256, "window_pattern": "SL"}, "window_pattern='SL'"),
        ({"softcap": 15.0, "qk_gain": 1.2}, "softcap=15.0, qk_gain=1.2"),
    ],
)
def test_what_no_class_computes_is_refused_by_name(
    tmp_path, random_model, tiny_tokenizer, capsys, fields, said
):
    base = write_base(tmp_path / "base", random_model(tiny_config(**PLAIN | fields)), tiny_tokenizer)
    code = main(["export", "hf", str(base), "--out", str(tmp_path / "out")])
    assert_error(capsys, code, USAGE, f"computes {said}.", "--preset tiny-portable")
    assert not (tmp_path / "out").exists()


def test_windows_as_long_as_the_context_are_none(random_model):
    assert stock.stock_class(tiny_config(**PLAIN | {"window_pattern": "SL"})) == "apertus"


def test_nothing_is_written_over(apertus, capsys):
    code = main(["export", "hf", str(apertus), "--out", str(apertus)])
    assert_error(capsys, code, CANNOT_CREATE, "exists already", "--out")
