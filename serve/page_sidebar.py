"""The web page's sidebar: conversations, the current one's title and system prompt, and how to sample."""

from __future__ import annotations

from pathlib import Path

import openai
import streamlit as st

from hotlap.common.terminal import printable
from hotlap.model.config import Sampling
from hotlap.serve import saved_conversations as saved
from hotlap.serve.answering import told
from hotlap.serve.page_text import guarded, label, trouble
from hotlap.serve.saved_conversations import Conversation

LONG_LIST = 8  # conversations that are shown without scrolling
SOON = 5.0  # seconds for the list of models
LARGEST = 2**53 - 1  # whole numbers that browsers can tell apart


def show(client: openai.OpenAI, folder: Path, name: str | None, conversation: Conversation) -> bool:
    """Returns whether there is a model to talk to."""
    conversations, wrong = saved.listed(folder)
    st.button("New conversation", icon=":material/add:", on_click=open_conversation, args=(None,))
    with st.container(height=320 if len(conversations) > LONG_LIST else "content", gap=None):
        for other, found in conversations.items():
            st.button(
                label(found.title) or "untitled", key=f"open-{other}", width="stretch",
                type="secondary" if other == name else "tertiary", on_click=open_conversation, args=(other,),
            )  # fmt: skip
    if wrong:
        trouble("Some conversations cannot be read.", "\n".join(wrong))
    if name:
        this_conversation(folder, name, conversation)
    served = settings(client, folder, name, conversation)
    text, _ = saved.exported([*conversations.values()])
    st.download_button(
        "Export all conversations", text, "conversations.jsonl", disabled=not text, on_click="ignore",
        help="A line of JSON each, for `hotlap sft --data`.",
    )  # fmt: skip
    return served


def this_conversation(folder: Path, name: str, conversation: Conversation) -> None:
    with st.expander("This conversation"):
        st.session_state[f"title-{name}"] = conversation.title
        st.text_input("Title", key=f"title-{name}", on_change=rename, args=(folder, name), max_chars=200)
        text, _ = saved.exported([conversation])
        st.download_button(
            "Export", text, f"conversation-{name}.jsonl", disabled=not text, on_click="ignore",
            help="A line of JSON, for `hotlap sft --data`.",
        )  # fmt: skip
        if st.session_state.get("deleting") != name:
            st.button("Delete", on_click=st.session_state.update, args=({"deleting": name},))
            return
        st.warning("Delete the conversation, and its ratings?")
        with st.container(horizontal=True):
            st.button("Yes, delete", type="primary", on_click=delete, args=(folder, name))
            st.button("Keep", on_click=st.session_state.pop, args=("deleting",))


def settings(client: openai.OpenAI, folder: Path, name: str | None, conversation: Conversation) -> bool:
    """What goes with each question. Returns whether there is a model."""
    models = models_of(client)
    if models:
        st.selectbox("Model", models, key="model", format_func=printable)
    key = f"system-{name}"
    if name:
        st.session_state[key] = conversation.system
    st.text_area(
        "System prompt", key=key, on_change=set_system if name else None, args=(folder, name) if name else (),
        max_chars=20_000,
    )  # fmt: skip
    st.slider(
        "Temperature", 0.0, 2.0, Sampling.temperature, 0.05, key="temperature", help="0: the likeliest token."
    )
    st.slider("Top-p", 0.0, 1.0, 1.0, 0.05, key="top_p")
    st.slider("Min-p", 0.0, 1.0, 0.0, 0.01, key="min_p")
    st.number_input("Max tokens", 1, LARGEST, Sampling.max_tokens, key="max_tokens")
    st.number_input(
        "Seed", 0, LARGEST, None, key="seed", placeholder="random",
        help="With a seed, the same question has the same answer.",
    )  # fmt: skip
    return bool(models)


def models_of(client: openai.OpenAI) -> list[str]:
    """The models to choose from. If there are none, says why, and how to go on."""
    try:
        models = [model.id for model in client.with_options(timeout=SOON).models.list().data]
        why = "The list of its models is empty."
    except (openai.OpenAIError, ValueError) as error:
        models, why = [], told(error, client)
    if not models:
        trouble("There is no model to talk to. Conversations are kept.", why)
        st.button("Retry", key="retry-models")
    return models


def fields() -> dict:
    """The fields of a request that the user has chosen."""
    state = st.session_state
    chosen = {name: state[name] for name in ("model", "temperature", "top_p", "max_tokens")}
    chosen |= {"seed": state.seed} if state.seed is not None else {}
    return chosen | ({"extra_body": {"min_p": state.min_p}} if state.min_p else {})


def open_conversation(name: str | None) -> None:
    """Show another one; None: a new one."""
    st.query_params.clear()
    if name:
        st.query_params["c"] = name


@guarded
def rename(folder: Path, name: str) -> None:
    with saved.changing(folder, name) as conversation:
        conversation.title = st.session_state[f"title-{name}"].strip() or conversation.title


@guarded
def set_system(folder: Path, name: str) -> None:
    with saved.changing(folder, name, st.session_state.seen) as conversation:
        conversation.system = st.session_state[f"system-{name}"]


@guarded
def delete(folder: Path, name: str) -> None:
    saved.delete(folder, name)
    open_conversation(None)
