"""Training text out of BIG-bench's archive."""

import json

import pytest
from helpers.package_server import serving, tar_archive

from hotlap.train.data import bigbench, bigbench_text
from hotlap.train.data.bigbench_text import bigbench_documents, text_path
from hotlap.train.evaluation.contamination import overlaps

TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks/"
RIVER = (
    "The river rises in the hills above the town and runs for eighty miles through fields of barley before "
    "it reaches the sea at a small harbour."
)
KING = "The king who built the long wall between the two valleys was never seen by those who had to guard it."
MILL = "When the mill closed, the people of the village sold their houses to those who came for the summer."
SHOP = (
    "A: How long have you worked in this shop, and do you like it?\nB: For <MASK>, and I like it very much."
)
GUARDED = (
    "Only {} of the old ships in the museum of the harbour town has "
    "ever carried grain to Norway and to Spain."
)
QUESTION = "Which of the planets that were known to the ancients has the shortest day and the longest year?"
EVALUATED = ("qa_wikidata", "dyck_languages", "natural_instructions/subtask033_winogrande_answer_generation")


def task(*examples: dict) -> str:
    return json.dumps({"task_prefix": "Answer!", "examples": examples})


def read(text: str, question: str) -> dict:
    return {"input": f"Passage: {text} \nQuestion: {question}", "target": ["An answer."]}


def members() -> dict[str, str]:
    numbered = "".join(f"Sent {i}: {sentence} " for i, sentence in enumerate((KING, MILL), 1))
    dialogue = {"input": f"Fill it. Context: \n{SHOP}", "target_scores": {"a mile": 0, "a year": 1}}
    wrong = {"target": "nine", "target_scores": {"nine": 1, "one": 0}}
    tasks = {
        "natural_instructions/subtask002_quoref_answer_generation": task(
            read(RIVER, "Where does it end?"), read(RIVER + ".", "Where does it rise?")
        ),
        "natural_instructions/subtask054_multirc_write_correct_answer": task(
            {"input": f"Paragraph- {numbered}\nQuestion: Who sold them?", "target": ["The people."]}
        ),
        "timedial": task(dialogue, dialogue),
        "contextual_parametric_knowledge_conflicts": task(
            {"input": f"\nQuestion: How many?\nContext: {GUARDED.format('nine')}", **wrong}
        ),
        "paragraph_segmentation": task(
            {"input": f"{KING}\n{MILL}\n{RIVER}", "target": "1 0 1"},
            {"input": "Der König, der die lange Mauer baute, wurde nie gesehen. " * 3, "target": "1"},
        ),
        "real_or_fake_text/gpt2_xl": task(
            {"target_scores": {KING: 0.0, "Two.": 0.0, MILL: 0.0, "Fake!": 1.0}}
        ),
        "vitaminc_fact_verification": task(
            {"input": f"Mills: {MILL}\nClaim: It closed ."},
            {"input": f"Mills: {MILL[:-7]}winter.\nClaim: No ."},
        ),
        **{name: task({"input": QUESTION, "target": QUESTION}) for name in EVALUATED},
    }
    return {f"{TASKS}{name}/task.json": text for name, text in tasks.items()}


@pytest.fixture
def index(tmp_path, monkeypatch):
    with serving(bigbench, tar_archive(members()), monkeypatch, tmp_path) as server:
        monkeypatch.setattr(bigbench_text, "ARCHIVE", bigbench.ARCHIVE)
        yield server


def test_each_text_is_taken_once_without_questions_and_wrong_answers(index):
    assert set(bigbench_documents()) == {
        f"{RIVER}\n",
        f"{KING} {MILL}\n",
        SHOP.replace("<MASK>", "a year") + "\n",
        GUARDED.format("one") + "\n",
        f"{KING}\n{MILL} {RIVER}\n",
        f"{KING} Two. {MILL}\n",
        f"Mills\n{MILL}\n",
    }


def test_what_evaluations_ask_is_not_in_it(index):
    documents = list(bigbench_documents())
    asked = overlaps({"asked": [QUESTION], "read": [RIVER]}, documents)
    assert (asked["asked"].count, asked["read"].count) == (0, 1)
    names = [name for name in members() if bigbench.TASK.fullmatch(name)[1] in EVALUATED]
    assert len(names) == len(EVALUATED)  # they were there to be taken


def test_the_archive_is_read_once(index):
    first = list(bigbench_documents())
    bigbench.ARCHIVE.path.unlink()
    index.sent = b"gone"
    assert list(bigbench_documents()) == first
    assert [path.name for path in text_path().parent.iterdir()] == [text_path().name]
