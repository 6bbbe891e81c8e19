"""Rows of bad input: text, token shards and conversations."""
# ruff: noqa: E501  a row is one line

import struct

from helpers.bad_files import (
    DATA,
    DEEP,
    DPO,
    FAR,
    GZIP,
    HF_TOKENIZER,
    MANY,
    PDF,
    PRETRAIN,
    SFT,
    ZIP,
    Row,
    folder,
    lines,
    link,
    pipe,
    shard,
    talk,
    text,
)
from helpers.commands import BAD_DATA, CANNOT_CREATE, NO_INPUT, USAGE

TEXT = {"text": "a"}
WHOLE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
USER, ASSISTANT, SYSTEM = ("user", "a"), ("assistant", "b"), ("system", "c")
CALL = {"role": "assistant", "content": [{"type": "python", "text": "1"}]}
SHARDS = PRETRAIN.replace("characters", "tokenizer.json") + " --data bad"
TALKS = f"{SFT} --data a.jsonl"

PAIR = {"prompt": "square of 2", "chosen": "is 4.", "rejected": "is 5."}
ROWS: list[Row] = [
    # tokenizer
    ("tokenizer --source text.txt", None, CANNOT_CREATE, r"tokenizer\.json exists.*--force"),
    ("tokenizer --source text.txt --out none/new", None, NO_INPUT, r"no folder none"),
    ("tokenizer --source a.txt --out new", text("a.txt", "\n"), BAD_DATA, r"'a\.txt'.*name files with text"),
    ("tokenizer --source text.txt --out new --vocab-size 100", None, USAGE, r"--vocab-size 100 is less than 267"),
    ("tokenizer --source text.txt --out new --vocab-size -3", None, USAGE, r"--vocab-size -3 must be at least 1"),
    (f"tokenizer --source text.txt --out new --vocab-size {MANY}", None, USAGE, rf"--vocab-size {MANY} needs at least .* GB"),
    (f"tokenizer --source text.txt --out new --vocab-size {FAR}", None, USAGE, rf"--vocab-size {FAR} must be .*less than 2\^63"),
    ("tokenizer --source text.txt --out new --max-chars 0", None, USAGE, r"--max-chars 0 must be at least 1"),
    # data: what and where
    ("data --source text.txt", None, USAGE, r"no name for the data of text\.txt.*--out"),
    ("data --source text.txt --out shards", None, CANNOT_CREATE, r"shards exists.*--out"),
    ("data --source text.txt --out new --tokenizer none.json", None, NO_INPUT, r"none\.json.*hotlap tokenizer"),
    ("data --source text.txt --out new --tokenizer a.json", text("a.json", "[]"), BAD_DATA, r"a\.json is not a hotlap tokenizer"),
    ("data --source text.txt --out new --tokenizer a.json", text("a.json", DEEP), BAD_DATA, r"a\.json is not a hotlap tokenizer"),
    ("data --source text.txt --out new --shards -1", None, USAGE, r"--shards -1 must be at least 1"),
    (f"data --source fineweb --shards {MANY} --out new", None, USAGE, rf"--shards {MANY}, but .* has 1 to 103"),
    (f"{DATA} --source climbmix --shards {MANY}", None, USAGE, rf"--shards {MANY}.*, but .* has 1 to 6542"),
    # text files
    (f"{DATA} --source ' '", None, USAGE, r"the name of the data is empty"),
    (f"{DATA} --source none.txt", None, NO_INPUT, r"'none\.txt'.*name a file"),
    (f"{DATA} --source 'c/none*'", None, NO_INPUT, r"'c/none\*'.*name a file"),
    (f"{DATA} --source a", folder("a"), NO_INPUT, r"'a'.*name a file"),
    (f"{DATA} --source a.txt", pipe("a.txt"), USAGE, r"a\.txt is a pipe"),
    (f"{DATA} --source a.txt", link("a.txt", "gone.txt"), NO_INPUT, r"a\.txt is a link to gone\.txt"),
    (f"{DATA} --source a.md", text("a.md", " \n"), BAD_DATA, r"'a\.md' holds no text"),
    (f"{DATA} --source a.txt", text("a.txt"), BAD_DATA, r"no documents for the train split"),
    (f"{DATA} --source a.txt", text("a.txt", b"caf\xe9 au lait"), BAD_DATA, r"a\.txt is not UTF-8 at byte 3 \(line 1: .*--errors replace"),
    (f"{DATA} --source a.txt", text("a.txt", b"\xff\xfea\0b\0c"), BAD_DATA, r"a\.txt is not UTF-16 at byte 6"),
    (f"{DATA} --source a.txt", text("a.txt", b"a\0b\0c\0d\0"), BAD_DATA, r"a\.txt is binary or compressed, or UTF-16 without"),
    (f"{DATA} --source a.txt", text("a.txt", b"line\n" * 5000 + b"a\0b"), BAD_DATA, r"a\.txt:5001: a NUL character"),
    (f"{DATA} --source a.txt", text("a.txt", GZIP), BAD_DATA, r"a\.txt is compressed by gzip; unpack"),
    (f"{DATA} --source a.pdf", text("a.pdf", PDF), BAD_DATA, r"a\.pdf is a PDF"),
    (f"{DATA} --source a.docx", text("a.docx", ZIP), BAD_DATA, r"a\.docx is a zip archive"),
    (f"{DATA} --source a.txt", text("a.txt", b"PAR1xxxx"), BAD_DATA, r"a\.txt is parquet"),
    # text in JSON Lines
    (f"{DATA} --source a.jsonl", lines("a.jsonl", [TEXT]), BAD_DATA, r"a\.jsonl:1: a JSON array"),
    (f"{DATA} --source a.jsonl", lines("a.jsonl", TEXT, {"text": None}), BAD_DATA, r"a\.jsonl:2: `text` is null, not a string"),
    (f"{DATA} --source a.jsonl", lines("a.jsonl", TEXT, {"body": "x"}), BAD_DATA, r"a\.jsonl:2: no field `text` among \[\"body\"\]"),
    (f"{DATA} --source a.jsonl", lines("a.jsonl", TEXT, 5), BAD_DATA, r"a\.jsonl:2: 5, not an object"),
    (f"{DATA} --source a.jsonl", lines("a.jsonl", TEXT, '{"text": "x"'), BAD_DATA, r"a\.jsonl:2: not JSON"),
    (f"{DATA} --source a.jsonl", lines("a.jsonl", {"messages": []}), BAD_DATA, r"a\.jsonl:1: a conversation.*hotlap sft"),
    ("eval base --tasks bpb --data a", lines("a/b.jsonl", [TEXT]), BAD_DATA, r"a/b\.jsonl:1: a JSON array"),
    # token shards
    (SHARDS, shard(lambda raw: raw[:-2]), BAD_DATA, r"train_000000\.bin: .* but its header says"),
    (SHARDS, shard(lambda raw: raw + b"\0"), BAD_DATA, r"train_000000\.bin: .* but its header says"),
    (SHARDS, shard(lambda raw: b""), BAD_DATA, r"train_000000\.bin: 0 bytes"),
    (SHARDS, shard(lambda raw: b"\1" + raw[1:]), BAD_DATA, r"train_000000\.bin: magic"),
    (SHARDS, shard(lambda raw: raw[:4] + b"\7" + raw[5:]), BAD_DATA, r"train_000000\.bin: .*version 7"),
    (SHARDS, shard(lambda raw: raw[:8] + b"\xff" * 4 + raw[12:]), BAD_DATA, r"train_000000\.bin: .*header says -1 tokens"),
    (SHARDS, shard(lambda raw: raw[:1030] + struct.pack("<H", 280) + raw[1032:]), BAD_DATA, r"train_000000\.bin: token id 280 at byte 1030"),
    # pretrain: folders and files of another kind
    (f"{PRETRAIN} --data ''", None, USAGE, r"the name of the data is empty; name a file"),
    (f"{PRETRAIN} --data '\"text.txt\"'", None, NO_INPUT, r"no text files match '\"text\.txt\"'; name a file"),
    (f"{PRETRAIN} --data base", None, BAD_DATA, r"base/metrics\.jsonl:1: no field `text`"),
    (f"{PRETRAIN} --data model", None, NO_INPUT, r"no text files in 'model' .*; name a file"),
    (f"{PRETRAIN} --data model/model.safetensors", None, BAD_DATA, r"model/model\.safetensors is binary.*name UTF-8 text"),
    (f"{PRETRAIN} --data shards/train_000000.bin", None, BAD_DATA, r"shards/train_000000\.bin is binary.*name UTF-8 text"),
    (f"{PRETRAIN} --data tokenizer.json", None, BAD_DATA, r"tokenizer\.json:1: no field `text`"),
    (f"{PRETRAIN} --tokenizer text.txt", None, BAD_DATA, r"text\.txt is not a hotlap tokenizer\.json"),
    (f"{PRETRAIN} --tokenizer model", None, NO_INPUT, r"model is a folder.*name the tokenizer\.json in it"),
    (f"{PRETRAIN} --tokenizer a.json", text("a.json", HF_TOKENIZER), BAD_DATA, r"a\.json is not a hotlap tokenizer\.json: the tokenizer has no <\|bos\|>"),
    (f"{PRETRAIN} --data none.txt", None, NO_INPUT, r"'none\.txt'.*name a file"),
    (f"{PRETRAIN} --tokenizer none.json", None, NO_INPUT, r"none\.json"),
    # sft: files of conversations
    (f"{SFT} --data none.jsonl", None, NO_INPUT, r"none\.jsonl"),
    (f"{SFT} --data ''", None, USAGE, r"the name of the (data|conversations) is empty; name"),
    (f"{SFT} --data .", None, BAD_DATA, r"\. is a folder; name a file in it"),
    (f"{SFT} --data a", pipe("a"), USAGE, r"a is a pipe.*file"),
    (TALKS, text("a.jsonl", ""), BAD_DATA, r"a\.jsonl.*holds no conversation"),
    (TALKS, text("a.jsonl", GZIP), BAD_DATA, r"a\.jsonl is .*compressed.*unpack"),
    (TALKS, text("a.jsonl", WHOLE + WHOLE.replace(b"a", b"\xe9")), BAD_DATA, r"a\.jsonl.*line 2: 0xe9.*iconv"),
    (TALKS, lines("a.jsonl", '{"messages": ["a"'), BAD_DATA, r"a\.jsonl:1: not JSON"),
    (TALKS, lines("a.jsonl", "{", '"messages": []', "}"), BAD_DATA, r"a\.jsonl:1: JSON over several lines.*jq -c"),
    (TALKS, lines("a.jsonl", [{"messages": []}]), BAD_DATA, r"a\.jsonl:1: a JSON array; each line must be"),
    (TALKS, lines("a.jsonl", {"conversations": []}), BAD_DATA, r"a\.jsonl:1: .*\"messages\" list, not .*'conversations'; this is ShareGPT's"),
    (TALKS, lines("a.jsonl", {"prompt": "a", "completion": "b"}), BAD_DATA, r"a\.jsonl:1: .*\"messages\" list, not .*'prompt', 'completion'"),
    (f"{SFT} --data base", None, BAD_DATA, r"base is a folder; name a file in it"),
    (f"{SFT} --data text.txt", None, BAD_DATA, r"text\.txt:1: not JSON .*each line must be \{\"messages\""),
    # sft: conversations
    (TALKS, talk({"role": "user", "text": "a"}), BAD_DATA, r"a\.jsonl:1: message 0: unknown key 'text'"),
    (TALKS, talk(("human", "a")), BAD_DATA, r"message 0: `role` is 'human'; rename it to 'user'"),
    (TALKS, talk(("user", None)), BAD_DATA, r"message 0: a message from 'user' without `content`"),
    (TALKS, talk(("user", [{"type": "image_url"}])), BAD_DATA, r"message 0: `content` has a part of type 'image_url'"),
    (TALKS, talk(USER, ASSISTANT, SYSTEM), BAD_DATA, r"message 2: a system message must be the first one"),
    (TALKS, talk(USER, USER), BAD_DATA, r"message 1: two messages from 'user' in a row"),
    (TALKS, talk(USER), BAD_DATA, r"a\.jsonl:1: the conversation does not end with the assistant's answer"),
    (TALKS, talk(USER, CALL), BAD_DATA, r"message 1: .*'python'"),
    (TALKS, talk(USER, ASSISTANT, system="c"), BAD_DATA, r"'system' beside `messages` would be lost"),
    (TALKS, talk(("user", "a" * 99), ASSISTANT), BAD_DATA, r"no conversation fits the model: 1 of 1 conversations are longer"),
    # dpo: pairs
    (DPO, None, NO_INPUT, r"no pairs at a\.jsonl; name a \.jsonl or \.parquet file, `ultrafeedback`, or `tasks`"),
    (f"{DPO} --data .", None, BAD_DATA, r"\. is a folder; name a file in it"),
    (DPO, lines("a.jsonl"), BAD_DATA, r"a\.jsonl holds no pair; each line or row must be \{\"prompt\""),
    (DPO, lines("a.jsonl", "[1"), BAD_DATA, r"a\.jsonl:1: a JSON array; each line must be \{\"prompt\""),
    (DPO, lines("a.jsonl", PAIR, {"prompt": "a", "chosen": "b"}), BAD_DATA, r"a\.jsonl:2: no 'rejected', but an object with the keys 'prompt', 'chosen'; it must be"),
    (DPO, lines("a.jsonl", {"prompt": "a", "rejected": "b"}), BAD_DATA, r"a\.jsonl:1: no 'chosen'"),
    (DPO, text("a.jsonl", WHOLE), BAD_DATA, r"a\.jsonl:1: no 'chosen'.*one answer alone is for `hotlap sft`"),
    (DPO, lines("a.jsonl", PAIR | {"rejected": "is 4."}), BAD_DATA, r"no pair can be learned from: 1 of 1 pairs have the same answer twice \(a\.jsonl:1\)"),
    (DPO, lines("a.jsonl", PAIR | {"chosen": "is 4" * 40}), BAD_DATA, r"no pair can be learned from: 1 of 1 pairs are longer than the model's context of 32 tokens"),
    (DPO, lines("a.jsonl", {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "b"}]}), BAD_DATA, r"a\.jsonl:1: the prompts of 'chosen' and 'rejected' differ in message 0"),
    ("dpo --base base --data a.jsonl --out new", lines("a.jsonl", PAIR), USAGE, r"--base base is a base model, which does not converse; fine-tune it with `hotlap sft`"),
]  # fmt: skip
