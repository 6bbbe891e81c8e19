"""`bigbench` as training text: the English prose in the tasks of BIG-bench's archive, each text once.

Only the tasks below are read. None of them is one that `hotlap eval` or CORE asks, such as BIG-bench's own
qa_wikidata and dyck_languages, or has the passages of one: disfl_qa and question_selection have SQuAD's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from hotlap.common.files import cache_folder
from hotlap.common.log import log
from hotlap.common.package_archive import download_archive
from hotlap.train.data.bigbench import ARCHIVE, archived_tasks, talks, tidied
from hotlap.train.data.english import is_english, without_token_spaces
from hotlap.train.data.kept_lines import distinct_shuffled, keep_lines, kept_lines

RULES = 1  # counts changes of what is taken and how, so that an older version's lines are not read
SHORTEST = 100  # characters of a text

FIELD = re.compile(
    r"^(?:Passage|Context|Background Paragraph|Paragraph|Story)[:-] *(.*?)"
    r"(?=\n(?:Story|Question|Correct Answer|Incorrect Answer|Answer|Answer type): |\Z)",
    re.DOTALL | re.MULTILINE,
)
SENTENCE_NUMBER = re.compile(r" *Sent \d+: *")
TAG = re.compile(r"</?[a-z]+>")
SPACES = re.compile(r"[ \t\xa0]+")
QUOTED = re.compile(r'^"|"$')
MARKUP = re.compile(r"[={}|]|://")
ALIKE = 3  # words at the beginning of two versions of a sentence
HUMAN_SENTENCES = 3  # of a text that a model went on with


def bigbench_documents() -> Iterator[str]:
    """77 MB of English, shuffled. The archive is downloaded, and what is taken of it kept, at first."""
    path = text_path()
    if not path.exists():
        archive = download_archive(ARCHIVE)
        count = keep_lines(path, distinct_shuffled(archived_texts(archive), path.parent))
        log.info("%s: %s texts of %s", path, f"{count:,}", archive.name)
    yield from kept_lines(path)


def text_path() -> Path:
    return cache_folder() / f"bigbench-text-{ARCHIVE.content.sha256[:12]}-{RULES}.jsonl.gz"


def archived_texts(archive: Path) -> Iterator[str]:
    """The texts of the tasks in the order of the archive, with repetitions."""
    for name, task in archived_tasks(archive, re.compile("|".join(f"(?:{name})" for name in TAKEN))):
        texts = next(take for pattern, take in TAKEN.items() if re.fullmatch(pattern, name))
        for text in dict.fromkeys(texts(task)):
            text = without_token_spaces(tidied(SPACES.sub(" ", TAG.sub("", text))))
            if len(text) >= SHORTEST:
                yield text + "\n"


def inputs(task: dict) -> Iterator[str]:
    """The texts that the task asks about, or for a summary of."""
    return (example["input"] for example in task["examples"])


def passages(task: dict) -> Iterator[str]:
    """What the questions of Natural Instructions are about."""
    for text in inputs(task):
        for passage in FIELD.findall(text):
            yield SENTENCE_NUMBER.sub(" ", passage)


def conversations(task: dict) -> Iterator[str]:
    """Topical-Chat, a turn a line."""
    return ("\n".join(said) for said in talks(task))


def film_dialogues(task: dict) -> Iterator[str]:
    """Before the question whether the same person speaks."""
    return (text.partition(" ----- ")[0] for text in inputs(task))


def everyday_dialogues(task: dict) -> Iterator[str]:
    """Dialogues with a gap, filled with the first of the right answers. They come once for each of their
    gaps, so the first is taken of those that begin alike.
    """
    seen = set()
    for example in task["examples"]:
        text = example["input"].partition("Context:")[2].strip()
        opening = text[: text.find("\n")]
        right = next((answer for answer, score in example["target_scores"].items() if score), None)
        if right and opening not in seen:
            seen.add(opening)
            yield text.replace("<MASK>", right.strip())


def encyclopedia_sentences(task: dict) -> Iterator[str]:
    """VitaminC: the sentences of Wikipedia about a subject. Most are there in several versions, which
    contradict each other, so the first is taken of those that begin alike.
    """
    found: dict[str, dict[str, str]] = {}
    for text in inputs(task):
        subject, _, sentence = text.rpartition("\nClaim: ")[0].partition(": ")
        sentence = sentence.strip(" ,")
        if not MARKUP.search(sentence):
            opening = " ".join(sentence.split()[:ALIKE])
            found.setdefault(subject, {}).setdefault(opening, sentence)
    for subject, sentences in found.items():
        yield "\n".join((subject, *sentences.values()))


def true_contexts(task: dict) -> Iterator[str]:
    """Contexts whose answer was replaced by a wrong one, with the right one."""
    for example in task["examples"]:
        right = next(answer for answer, score in example["target_scores"].items() if not score)
        yield example["input"].partition("\nContext: ")[2].replace(example["target"], right)


def articles(task: dict) -> Iterator[str]:
    """Wikipedia's articles in English, a sentence a line, whose target is 1 where a paragraph ends."""
    for text, target in ((example["input"], example["target"]) for example in task["examples"]):
        if is_english(text):
            ends = zip(text.split("\n"), target.split(), strict=False)
            yield "".join(sentence + ("\n" if end == "1" else " ") for sentence, end in ends)


def news(task: dict) -> Iterator[str]:
    """XSum's articles, after the sentence that began them."""
    return (f"{example['target']}\n{example['input']}" for example in task["examples"])


def instructions(task: dict) -> Iterator[str]:
    """WikiLingua's, but for a few that hold data of pictures."""
    return (text for text in inputs(task) if "smallUrl" not in text)


def solved_mysteries(task: dict) -> Iterator[str]:
    return (f"{example['input']}\n\n{example['target']}" for example in task["examples"])


def excerpts(task: dict) -> Iterator[str]:
    """Pages of novels: one, and those that may be by the same author."""
    for example in task["examples"]:
        for text in (example["input"], *example["target_scores"]):
            yield QUOTED.sub("", text.strip())


def human_beginnings(task: dict) -> Iterator[str]:
    """The sentences before those of a language model. The same text was cut at several places, so the longest
    has the others.
    """
    longest: dict[str, str] = {}
    for example in task["examples"]:
        sentences, scores = [*example["target_scores"]], [*example["target_scores"].values()]
        human = sentences[: scores.index(1.0)] if 1.0 in scores else []
        if len(human) >= HUMAN_SENTENCES:
            text = " ".join(sentence.strip() for sentence in human)
            longest[human[0]] = max(longest.get(human[0], ""), text, key=len)
    yield from longest.values()


TAKEN: dict[str, Callable[[dict], Iterator[str]]] = {  # by a pattern of the task's name
    r"natural_instructions/subtask\d{3}_(?:quoref|cosmosqa|drop|multirc|ropes)_\w+": passages,
    r"topical_chat": conversations,
    r"movie_dialog_same_or_different": film_dialogues,
    r"timedial": everyday_dialogues,
    r"vitaminc_fact_verification": encyclopedia_sentences,
    r"contextual_parametric_knowledge_conflicts": true_contexts,
    r"paragraph_segmentation": articles,
    r"gem/xsum": news,
    r"gem/wikilingua_en": instructions,
    r"multiemo/all_text_en": inputs,
    r"minute_mysteries_qa/freetext": solved_mysteries,
    r"authorship_verification/\w+": excerpts,
    r"real_or_fake_text/gpt2_xl": human_beginnings,
}
