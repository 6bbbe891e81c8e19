"""Rows of bad input: models, exports and what chat, eval and export are asked."""
# ruff: noqa: E501  a row is one line

from helpers.bad_files import CHAT, DEEP, MANY, SFT, Row, config, model, text, tokenizer
from helpers.commands import BAD_DATA, CANNOT_CREATE, NO_INPUT, USAGE

ROWS: list[Row] = [
    # which model
    ("chat none -p a", None, NO_INPUT, r"no model at none"),
    ("eval --model none", None, NO_INPUT, r"no model at none"),
    ("export weights --model none --out new", None, NO_INPUT, r"no model at none"),
    (f"{SFT} --base none", None, NO_INPUT, r"no model at none"),
    ("chat shards -p a", None, NO_INPUT, r"shards has token shards and no model; train one on them"),
    ("chat bad -p a", text("bad/config.json", "{}"), NO_INPUT, r"bad is no whole model: it lacks tokenizer\.json and \*\.safetensors"),
    ("chat base/checkpoints/step-000004/optimizer -p a", None, NO_INPUT, r"optimizer is a part of a checkpoint; give"),
    ("chat", text("runs"), NO_INPUT, r"runs is a file, not the folder of a run or model"),
    # what is asked of it
    ("chat sft -p ''", None, USAGE, r"the question of -p is empty"),
    ("eval --model sft --tasks sums", None, USAGE, r"unknown task 'sums'; known: bpb"),
    ("eval --model sft --tasks", None, USAGE, r"no --tasks; known: bpb, core"),
    ("eval --model sft --tasks bpb", None, USAGE, r"bpb needs text.*--data"),
    ("eval --model base --tasks facts", None, USAGE, r"base is a base model, and facts need a chat model"),
    ("eval --model base --tasks bpb --data shards", None, USAGE, r"another tokenizer"),
    ("eval --model sft --out text.txt", None, CANNOT_CREATE, r"text\.txt exists.*--out"),
    ("eval --model sft --out none/new", None, NO_INPUT, r"no folder none"),
    ("export weights --model sft --out base", None, CANNOT_CREATE, r"base exists already.*--out"),
    # sizes that config.json claims
    (CHAT, config(context=2 * MANY), USAGE, rf"bad/config\.json: a context of {2 * MANY} tokens needs at least .* GB"),
    (f"{SFT} --base bad", config(context=2 * MANY), USAGE, rf"bad/config\.json: a context of {2 * MANY} tokens needs"),
    ("eval --model bad --tasks samples", config(context=2 * MANY), USAGE, rf"a context of {2 * MANY} tokens needs"),
    (CHAT, config(layers=3_000_000), BAD_DATA, r"bad/config\.json is of a model of .* parameters, but the tensors there have"),
    (f"{SFT} --base bad", config(layers=3_000_000), BAD_DATA, r"bad/config\.json is of a model of .* parameters, but the tensors"),
    ("export weights --model bad --out new", config(layers=3_000_000), BAD_DATA, r"bad/config\.json is of a model of"),
    (CHAT, config(vocab_size=MANY), BAD_DATA, r"bad/config\.json is of a model of"),
    (CHAT, config(layers=2), BAD_DATA, r"bad does not fit the model"),
    # config.json
    (CHAT, config(layers="1"), BAD_DATA, r"config\.json .*layers='1' must be of type int"),
    (CHAT, config(layers=[1]), BAD_DATA, r"config\.json .*layers=\[1\] must be of type int"),
    (CHAT, config(layers=None), BAD_DATA, r"config\.json .*layers=None must be of type int"),
    (CHAT, config(layers=True), BAD_DATA, r"config\.json .*layers=True must be of type int"),
    (CHAT, config(layers=1e3), BAD_DATA, r"config\.json .*layers=1000\.0 must be of type int"),
    (CHAT, config(layers=-1), BAD_DATA, r"config\.json .*layers=-1 must be at least 1"),
    (CHAT, config(softcap=float("nan")), BAD_DATA, r"config\.json .*softcap=nan must be 0 \(off\) or more"),
    (CHAT, config(dropout=0.1), BAD_DATA, r"config\.json.*unknown model field 'dropout'"),
    (CHAT, model("config.json", '{"layers": 1, "layers": 2}'), BAD_DATA, r"config\.json is not JSON: 'layers' is there twice"),
    (CHAT, model("config.json", "[1, 2]"), BAD_DATA, r"config\.json holds no JSON object"),
    (CHAT, model("config.json", DEEP), BAD_DATA, r"config\.json is nested too deeply"),
    (CHAT, model("config.json", ""), BAD_DATA, r"config\.json is not JSON"),
    (CHAT, model("config.json", b"\xff\xfe{"), BAD_DATA, r"config\.json is not JSON"),
    # tokenizer.json
    (CHAT, model("tokenizer.json", DEEP), BAD_DATA, r"bad/tokenizer\.json is not a hotlap tokenizer\.json"),
    (CHAT, model("tokenizer.json", ""), BAD_DATA, r"bad/tokenizer\.json is not a hotlap tokenizer\.json"),
    (CHAT, tokenizer(lambda t: t["model"].update(vocab="x")), BAD_DATA, r"bad/tokenizer\.json is not a hotlap"),
    (CHAT, tokenizer(lambda t: t["added_tokens"][0].update(id="5")), BAD_DATA, r"tokenizer\.json.*id '5' is not a whole number"),
    (CHAT, tokenizer(lambda t: t["added_tokens"][0].update(id=10**30)), BAD_DATA, r"special ids do not follow"),
    (CHAT, tokenizer(lambda t: t["model"].update(type="Unigram")), BAD_DATA, r"'Unigram'; it must be BPE or WordLevel"),
    (CHAT, tokenizer(lambda t: t.update(added_tokens=t["added_tokens"][:1])), BAD_DATA, r"the tokenizer has no <\|system_start\|>"),
    # state.json and the tensors
    (CHAT, model("state.json", "[]"), BAD_DATA, r"state\.json holds no JSON object"),
    (CHAT, model("state.json", '{"stage": 3}'), BAD_DATA, r"state\.json: stage=3"),
    (CHAT, model("model.safetensors", b""), BAD_DATA, r"cannot read bad/model\.safetensors"),
    (CHAT, model("model.safetensors", b"\xff" * 8 + b"{}"), BAD_DATA, r"cannot read bad/model\.safetensors"),
]  # fmt: skip
