"""What other processes do in tests of the web page."""

from pathlib import Path

from hotlap.serve import saved_conversations as saved


def add_questions(folder: Path, name: str, letter: str, count: int) -> None:
    for i in range(count):
        with saved.changing(folder, name) as conversation:
            saved.ask(conversation, f"{letter}{i}")
