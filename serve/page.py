"""The web page: Streamlit runs this file from its top to its end after each click (web.py serves it).

It keeps nothing between runs but what the user has typed or chosen: conversations are read from their files,
and answers that are being written from their threads, so that reloads and further tabs show the same. What
changes something is a callback, which runs before the page does; `seen` is what the user saw then.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import openai
import streamlit as st

from hotlap.common.errors import DataError
from hotlap.model.messages import TOOL, called
from hotlap.serve import answering, page_sidebar
from hotlap.serve import saved_conversations as saved
from hotlap.serve.page_text import guarded, plain, show, trouble
from hotlap.serve.saved_conversations import Answer, Changed, Conversation, Turn

LONGEST = 100_000  # characters of a message
REFRESH = 0.1  # seconds between two looks at an answer that is being written
WAIT = 60.0  # seconds for the next bytes of an answer; our server sends some every ten


@st.cache_resource
def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=st.secrets["key"] or "none", max_retries=0, timeout=WAIT
    )


def main() -> None:
    st.set_page_config(page_title="hotlap")
    folder, client = Path(st.secrets["folder"]), client_of(st.secrets["url"])
    name = st.query_params.get("c")
    running = answering.RUNNING.get((folder, name))  # before the file is read, which it may change
    writing = running is not None and not running.ended.is_set()
    try:
        conversation = saved.load(folder, name) if name else Conversation()
    except (OSError, DataError) as error:
        there = not isinstance(error, FileNotFoundError)
        trouble("This conversation cannot be shown.", str(error) if there else "It is no longer there.")
        name, conversation = None, Conversation()
        st.query_params.clear()
    if problem := st.session_state.pop("problem", ""):
        trouble("Nothing was changed.", problem)
    st.session_state.seen = conversation
    with st.sidebar:
        served = page_sidebar.show(client, folder, name, conversation)
    if served and not conversation.turns:
        welcome(folder)
    show_turns(client, folder, name, conversation, running if writing else None, served)
    error = running.error if running and not writing else ""
    if error:
        trouble("There is no complete answer.", error)
        show_messages(running.lost)
    unanswered = conversation.turns and not conversation.turns[-1].answer
    if (unanswered or error) and not writing:
        st.button("Retry", on_click=again, args=(client, folder, name), disabled=not served)
    st.chat_input(
        "Your message",
        key="question",
        max_chars=LONGEST,
        disabled=not served or writing,
        on_submit=send,
        args=(client, folder, name),
    )
    if writing:
        follow(running)


def welcome(folder: Path) -> None:
    st.title("hotlap", anchor=False)
    plain(
        f"Type a message to {st.session_state.model}, a language model. What it says can be wrong.\n"
        f"Conversations are kept on this computer, in {folder}."
    )


def show_turns(
    client: openai.OpenAI,
    folder: Path,
    name: str | None,
    conversation: Conversation,
    running: answering.Answering | None,
    served: bool,
) -> None:
    """The conversation, up to the turn whose answer is being written."""
    for turn in conversation.turns:
        changeable = turn is conversation.turns[-1] and served and not running
        show_question(client, folder, name, turn, changeable)
        if running and running.turn == turn.name:
            return
        if turn.answer:
            show_answer(client, folder, name, turn, changeable)


def follow(running: answering.Answering) -> None:
    """Show an answer while it is written. A click ends this run of the page, but not the answer."""
    with st.chat_message("assistant"):
        box = st.empty()
        st.button("Stop", icon=":material/stop:", on_click=running.stop)
        while not running.ended.wait(REFRESH):
            with box.container():  # also if nothing is new: only here the page notices clicks
                show_messages(running.messages)
    st.rerun()


def show_question(client: openai.OpenAI, folder: Path, name: str, turn: Turn, editable: bool) -> None:
    with st.chat_message("user"):
        if st.session_state.get("editing") == turn.name and editable:
            with st.form("edit", border=False):
                st.text_area("Edit your message", turn.question, key="edited", max_chars=LONGEST)
                with st.container(horizontal=True):
                    st.form_submit_button("Ask", type="primary", on_click=edit, args=(client, folder, name))
                    st.form_submit_button("Cancel", on_click=st.session_state.pop, args=("editing",))
            return
        plain(turn.question)
        if editable:
            st.button(
                "Edit", key="edit-last", type="tertiary", icon=":material/edit:",
                on_click=st.session_state.update, args=({"editing": turn.name},),
            )  # fmt: skip


def show_answer(client: openai.OpenAI, folder: Path, name: str, turn: Turn, last: bool) -> None:
    with st.chat_message("assistant"):
        show_messages(turn.answer.messages)
        st.caption(measured(turn.answer))
        with st.container(horizontal=True, vertical_alignment="center"):
            key = f"liked-{turn.name}-{turn.shown}"
            liked = turn.answer.liked
            st.session_state[key] = None if liked is None else int(liked)
            st.feedback("thumbs", key=key, on_change=rate, args=(folder, name, turn, key))
            if last and len(turn.answers) > 1:
                for step, icon in ((-1, ":material/chevron_left:"), (1, ":material/chevron_right:")):
                    there = 0 <= turn.shown + step < len(turn.answers)
                    st.button(icon, disabled=not there, on_click=turn_over, args=(folder, name, turn, step))
                st.caption(f"{turn.shown + 1} of {len(turn.answers)}")
            if last:
                st.button(
                    "Regenerate", type="tertiary", icon=":material/refresh:",
                    on_click=again, args=(client, folder, name),
                )  # fmt: skip


def show_messages(messages: list[dict]) -> None:
    """The messages of an answer: text, and the calls of its tool, folded."""
    for message, result in zip_longest(messages, messages[1:]):
        if message["role"] == "assistant":
            show(message["content"])
        if message.get("tool_calls"):
            tool, text = called(message)
            icon = ":material/calculate:" if tool == TOOL else ":material/terminal:"
            with st.expander(tool, icon=icon):
                st.code(text, language=None if tool == TOOL else "python", wrap_lines=True)
                plain(result["content"])


def measured(answer: Answer) -> str:
    """How fast an answer came, and what there is to know about it."""
    rate = answer.tokens / max(answer.seconds, 0.001)
    found = [f"{rate:.0f} tokens/s", f"first text after {answer.first:.2f} s"]
    ends = {
        "length": "cut off at its maximum length", "content_filter": "ended by the filter",
        "stopped": "stopped", "error": "incomplete",
    }  # fmt: skip
    if answer.end in ends:
        found.append(ends[answer.end])
    if answer.dropped:
        found.append(f"read without the first {answer.dropped} questions, for which the context has no room")
    return " · ".join(found)


@guarded
def send(client: openai.OpenAI, folder: Path, name: str | None) -> None:
    """Ask the question that was typed. If it is refused, it stays where it was typed."""
    question = st.session_state.question
    if not question or not question.strip():
        return
    try:
        if name is None:
            conversation = Conversation(system=st.session_state.get("system-None", ""))
            turn = saved.ask(conversation, question)
            st.query_params["c"] = name = saved.create(folder, conversation)
        else:
            with saved.changing(folder, name, st.session_state.seen) as conversation:
                turn = saved.ask(conversation, question)
    except (Changed, DataError, OSError):
        st.session_state.question = question
        raise
    answering.begin(client, folder, name, turn.name, page_sidebar.fields())


@guarded
def edit(client: openai.OpenAI, folder: Path, name: str) -> None:
    """Ask the last question in other words."""
    question = st.session_state.edited
    if question.strip():
        with saved.changing(folder, name, st.session_state.seen) as conversation:
            turn = saved.replace_last(conversation, question)
        del st.session_state.editing
        answering.begin(client, folder, name, turn.name, page_sidebar.fields())


@guarded
def again(client: openai.OpenAI, folder: Path, name: str) -> None:
    """Answer the last question again."""
    with saved.changing(folder, name, st.session_state.seen) as conversation:
        turn = conversation.turns[-1]
    answering.begin(client, folder, name, turn.name, page_sidebar.fields())


@guarded
def turn_over(folder: Path, name: str, turn: Turn, step: int) -> None:
    """Show another answer of the last question."""
    with saved.changing(folder, name, st.session_state.seen) as conversation:
        conversation.turns[-1].shown = turn.shown + step


@guarded
def rate(folder: Path, name: str, turn: Turn, key: str) -> None:
    """Keep whether the user likes an answer."""
    with saved.changing(folder, name) as conversation:
        thumb = st.session_state[key]
        conversation.turn(turn.name).answers[turn.shown].liked = None if thumb is None else bool(thumb)
    saved.write_preferences(folder)


if __name__ == "__main__":
    main()
