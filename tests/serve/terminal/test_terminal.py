"""A chat as its user meets it on a terminal."""

import json
import sys

import pytest
from helpers.talker import save_models
from helpers.terminal import CTRL_D, PARROT, PASTE, PASTED, UP, Terminal, plain

MARKED = pytest.mark.parametrize("term", ["xterm-256color", "dumb"], ids=["marked", "unmarked"])


def paste(terminal: Terminal, text: str, term: str) -> None:
    """Paste a block and press Enter. A dumb terminal does not mark where blocks begin and end."""
    terminal.expect("> ")
    text = text.replace("\n", "\r")  # as terminals do
    terminal.type(f"{text}\r" if term == "dumb" else f"{PASTE}{text}{PASTED}\r")


@MARKED
def test_a_pasted_block_is_one_message(term, tmp_path):
    with Terminal(*PARROT, folder=tmp_path, TERM=term) as terminal:
        paste(terminal, "def f():\n\treturn 1\n\nf()", term)
        terminal.expect(r"heard 'def f():\n\treturn 1\n\nf()'")
        paste(terminal, "/usr/bin/env: no such file\nWhat is wrong?", term)
        terminal.expect(r"heard '/usr/bin/env: no such file\nWhat is wrong?'")
        paste(terminal, '"""Docstring."""\nx = 1', term)
        terminal.expect("heard " + repr('"""Docstring."""\nx = 1'))
        terminal.ask("single", "heard 'single'")


@pytest.mark.parametrize(("term", "lines"), [("xterm-256color", 10_000), ("dumb", 1_000)])
def test_a_large_paste_arrives_whole(term, lines, tmp_path):
    with Terminal(*PARROT, folder=tmp_path, TERM=term) as terminal:
        paste(terminal, "\n".join(["x" * 99] * lines), term)
        terminal.expect(f"heard {100 * lines - 1} characters", seconds=60)
        terminal.ask("next", "heard 'next'")


def test_three_quotes_hold_several_lines_together(tmp_path):
    with Terminal(*PARROT, folder=tmp_path) as terminal:
        terminal.ask('"""', ". ")
        terminal.type('one\n/quit\n  """quoted"""\n\nfour\n"""\n')
        terminal.expect("heard " + repr('one\n/quit\n  """quoted"""\n\nfour'))
        terminal.ask('"""one line"""', "heard 'one line'")
        terminal.ask('"""first', ". ")
        terminal.type('last"""\n')
        terminal.expect(r"heard 'first\nlast'")


def test_the_end_of_input_inside_three_quotes_sends_the_message(tmp_path):
    with Terminal(*PARROT, folder=tmp_path) as terminal:
        terminal.ask('"""', ". ")
        terminal.type("not closed\n")
        terminal.expect(". ")
        terminal.type(CTRL_D)
        terminal.expect("heard 'not closed'")
        terminal.ask("next", "heard 'next'")


def test_ctrl_c_drops_what_was_typed_and_stops_an_answer_but_not_the_program(tmp_path):
    with Terminal(*PARROT, folder=tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type("never sent")
        terminal.expect("never sent")
        terminal.interrupt("[nothing was sent")
        terminal.ask('"""', ". ")
        terminal.type("never\nsent")
        terminal.expect("sent")
        terminal.interrupt("[nothing was sent")
        terminal.ask("count", "0 1 2 ")
        terminal.interrupt("[stopped]")
        terminal.ask("next", "heard 'next'")
        assert "heard 'never" not in terminal.output


def test_ctrl_d_quits(tmp_path):
    with Terminal(*PARROT, folder=tmp_path) as terminal:
        terminal.ask("hi", "heard 'hi'")
        terminal.expect("> ")
        terminal.type(CTRL_D)
        assert terminal.ended() == 0 and terminal.output.endswith("\n")


def test_bytes_that_are_no_text_and_control_characters_do_no_harm(tmp_path):
    with Terminal(*PARROT, folder=tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type(b"\xff\xfe a\n")
        terminal.expect("heard '\ufffd\ufffd a'")
        terminal.expect("> ")
        terminal.type(f"{PASTE}\x1b[2J\x07b{PASTED}\n")
        terminal.expect("heard '[2Jb'")


def test_inputs_are_remembered_by_the_next_session(tmp_path):
    file = tmp_path / "state" / "hotlap" / "history"
    for said, answer in (("first", "heard 'first'"), ('"""two\nlines"""', r"heard 'two\nlines'")):
        with Terminal(*PARROT, folder=tmp_path) as terminal:
            terminal.ask(said, "heard ")
            terminal.ask("/stats off", "off]")
        with Terminal(*PARROT, folder=tmp_path) as terminal:
            terminal.ask(UP * 2, answer)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [json.loads(line) for line in file.read_text().splitlines()][:3] == [
        "first",
        "/stats off",
        "first",
    ]


def test_a_folder_that_cannot_be_written_costs_one_note(tmp_path):
    (tmp_path / "state").write_text("a file")
    with Terminal(*PARROT, folder=tmp_path) as terminal:
        for word in ("one", "two"):
            terminal.ask(word, f"heard '{word}'")
        terminal.ask(UP, "heard 'two'")
        assert terminal.output.count("[inputs are not kept for the next session: ") == 1


@pytest.mark.parametrize(
    ("environment", "dim"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["colours", "NO_COLOR", "dumb"],
)
def test_prompts_and_notes_are_dim_where_colours_are_wanted_and_answers_never(environment, dim, tmp_path):
    with Terminal(*PARROT, folder=tmp_path, **environment) as terminal:
        terminal.ask("hi", "heard 'hi'\n")
        terminal.ask("/stats off", "off]")
        output = terminal.output
    assert ("\x1b[2m" in output) == dim and "heard 'hi'\n" in output.split("\x1b[2m")[2 * dim]
    assert "> hi\nheard 'hi'\n" in plain(output)


def test_tab_completes_commands_and_is_a_tab_elsewhere(tmp_path):
    with Terminal(*PARROT, folder=tmp_path) as terminal:
        terminal.ask("/sys\tBe brief", "[system message: 'Be brief']")
        terminal.ask("a\tb", r"heard 'a\tb'")


def test_a_session_on_a_terminal_says_which_model_it_is_and_how_to_leave(tmp_path, tiny_tokenizer):
    save_models(tmp_path, tiny_tokenizer)
    command = (sys.executable, "-m", "hotlap.cli", "chat", "runs/talker", "--max-tokens", "4")
    with Terminal(*command, folder=tmp_path) as terminal:
        terminal.expect("> ")
        first = plain(terminal.output).strip().splitlines()
        assert first[0].startswith("[runs/talker: 0.2M parameters on ")
        assert first[1] == "Type a message, then Enter. /help lists the commands, Ctrl-D quits."
        assert first[2:] == ["", "> "] or first[2:] == ["", ">"]  # no kernels
        terminal.type("hi\n")
        terminal.ask("/stats", "context: ")
        terminal.ask("/model runs/none", "error: no model at runs/none; found: ")
        terminal.ask("/model runs/base", "base model: it continues text")
        terminal.ask("The quick", "\n")
        terminal.ask("/dance", "\n")  # text to continue
        terminal.ask("/undo", "needs a conversation")
        terminal.expect("> ")
        terminal.type("/quit\n")
        assert terminal.ended() == 0
        assert "unknown command" not in terminal.output and "kernels" not in terminal.output


def test_answers_that_go_to_a_file_go_there_alone(tmp_path):
    python, option, code = PARROT
    command = (python, option, f"import sys; sys.stdout = open('answers', 'w'); {code}")
    with Terminal(*command, folder=tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type("hi\n")
        terminal.expect("> ")
        terminal.type("/help\n")
        terminal.expect("/undo")
        terminal.expect("> ")
        terminal.type(CTRL_D)
        assert terminal.ended() == 0
    assert (tmp_path / "answers").read_text() == "heard 'hi'\n"
