"""The web page, used in a browser, in front of the real API and a model with scripted answers."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("streamlit")
pytest.importorskip("playwright")

if not shutil.which("chromium"):
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)

from helpers.page_commands import running_page
from helpers.page_payloads import PAYLOADS, Watched
from helpers.page_tabs import (
    TIMEOUT,
    ask,
    box,
    expect,
    expect_said,
    measured,
    press,
    running_browser,
    said,
    send,
    settle,
)
from helpers.running_server import running_server, served, wait_until
from helpers.scripted_engine import ScriptedEngine
from helpers.talking_server import talking_server
from helpers.tools import tiny_config

from hotlap.model.conversation import render_prompt
from hotlap.model.gpt import GPT
from hotlap.model.weights import save_model
from hotlap.serve import saved_conversations as saved
from hotlap.train.data.conversation_files import read_conversations

pytestmark = pytest.mark.xdist_group("page")
LONG = " ".join(f"word{i}" for i in range(30))


@pytest.fixture(scope="module")
def browser():
    with running_browser() as it:
        yield it


class Api:
    """The server that the page asks. It can be stopped, and come back."""

    def __init__(self, tokenizer):
        self.tokenizer, self.port, self.stack = tokenizer, 0, contextlib.ExitStack()

    def start(self, **options):
        self.engine = ScriptedEngine(self.tokenizer)
        model = served(self.tokenizer, context=1 << 15, **options)
        self.running = self.stack.enter_context(running_server(self.engine, model, port=self.port, grace=0))
        self.port = self.running.port

    def stop(self):
        self.stack.close()


@pytest.fixture(scope="module")
def api(tiny_tokenizer):
    it = Api(tiny_tokenizer)
    it.start()
    yield it
    it.stop()


@pytest.fixture
def engine(api):
    """With nothing left to say of other tests."""
    api.engine.answers.clear()
    api.engine.pace = 0.0
    return api.engine


@pytest.fixture(scope="module")
def page(api, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversations")
    with running_page(folder, "--url", f"http://127.0.0.1:{api.port}") as (address, _):
        yield address, folder


@pytest.fixture
def folder(page) -> Path:
    return page[1]


@pytest.fixture
def new_tab(browser, page):
    """Opens a tab, at the page's address or another."""
    with contextlib.ExitStack() as stack:

        def open_tab(address: str = page[0]):
            context = stack.enter_context(browser.new_context())
            tab = context.new_page()
            tab.set_default_timeout(TIMEOUT)
            tab.goto(address)
            return tab

        yield open_tab


@pytest.fixture
def tab(new_tab):
    return new_tab()


def test_a_conversation_with_its_history_and_a_folded_calculator(tab, engine, tiny_tokenizer):
    engine.answers += ["Hello you.", [("2+3", "5"), "It is 5."]]
    ask(tab, "Hi")
    ask(tab, "2 + 3?")
    expect_said(tab, "Hi", "Hello you.", "2 + 3?", "\nIt is 5.")  # the result is folded
    assert re.search("tokens/s · first text after", measured(tab).last.inner_text())
    asked = [("user", "Hi"), ("assistant", "Hello you."), ("user", "2 + 3?")]
    prompt = render_prompt([{"role": role, "content": text} for role, text in asked], tiny_tokenizer)
    assert engine.started[-1].prompt == prompt and engine.started[-1].sampling.temperature == 0.7
    expect(tab.get_by_text("2+3", exact=True)).not_to_be_visible()
    tab.get_by_text("calculator").click()
    expect(tab.get_by_text("2+3", exact=True)).to_be_visible()


def test_a_new_user_reads_who_answers_and_where_conversations_are_kept(tab, engine, folder):
    expect(tab.get_by_text("Type a message to tiny")).to_be_visible()
    expect(tab.get_by_text(str(folder))).to_be_visible()
    engine.answers += ["Hello you."]
    ask(tab, "Hi")
    expect(tab.get_by_text("Type a message to tiny")).not_to_be_visible()


def test_stop_keeps_what_there_is_and_frees_the_slot(tab, engine, api, folder):
    engine.pace = 0.02
    engine.answers += [LONG]
    send(tab, "Tell me")
    expect(tab.get_by_text("word3")).to_be_visible()
    press(tab, "Stop")
    expect(tab.get_by_text("stopped")).to_be_visible()
    text = next(iter(saved.listed(folder)[0].values())).turns[0].answer.text
    assert LONG.startswith(text) and len(text) < len(LONG)
    expect_said(tab, "Tell me", text.strip())
    wait_until(api.running.quiet)


def test_a_liked_and_a_disliked_answer_are_a_pair(tab, engine, folder):
    engine.answers += ["Bad.", "Good."]
    ask(tab, "Which one?")
    tab.get_by_label("Thumbs down").click()
    wait_until(lambda: (folder / saved.RATINGS).exists())
    press(tab, "Regenerate")
    expect(tab.get_by_text("2 of 2")).to_be_visible()
    expect_said(tab, "Which one?", "Good.")
    tab.get_by_label("Thumbs up").click()
    wait_until(lambda: (folder / saved.PREFERENCES).exists())
    (pair,) = map(json.loads, (folder / saved.PREFERENCES).read_text().splitlines())
    assert pair["chosen"][0]["content"] == "Good." and pair["rejected"][0]["content"] == "Bad."


def test_an_edited_question_takes_the_place_of_the_last_one(tab, engine):
    engine.answers += ["One.", "Two.", "Three."]
    ask(tab, "First")
    ask(tab, "Secnod")
    press(tab, "Edit")
    tab.get_by_label("Edit your message").fill("Second")
    press(tab, "Ask")
    expect(tab.get_by_text("Three.")).to_be_visible()
    expect_said(tab, "First", "One.", "Second", "Three.")


def test_the_system_prompt_and_the_sampling_go_with_the_question(tab, engine, tiny_tokenizer):
    engine.answers += ["Yes."]
    tab.get_by_label("System prompt").fill("Be brief.")
    tab.get_by_label("Max tokens").fill("7")
    tab.get_by_label("Seed", exact=True).fill("5")
    tab.get_by_label("Seed", exact=True).press("Tab")
    tab.wait_for_timeout(500)
    ask(tab, "Hi")
    request = engine.started[-1]
    assert request.sampling.max_tokens == 7 and request.sampling.seed == 5
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert request.prompt == render_prompt(talk, tiny_tokenizer)


def test_a_tab_that_has_missed_something_changes_nothing_and_keeps_what_was_typed(tab, new_tab, engine):
    engine.answers += ["One.", "Two.", "Three."]
    ask(tab, "First")
    other = new_tab(tab.url)
    expect(other.get_by_text("One.")).to_be_visible()
    ask(tab, "Second")
    send(other, "Third")
    expect(other.get_by_text("another page has changed the conversation")).to_be_visible()
    expect_said(other, "First", "One.", "Second", "Two.")
    expect(box(other)).to_have_value("Third")
    box(other).press("Enter")
    expect(other.get_by_text("Three.")).to_be_visible()


def test_two_tabs_with_conversations_of_their_own_do_not_disturb_each_other(tab, new_tab, engine):
    engine.answers += ["One.", "Two."]
    other = new_tab()
    ask(tab, "First")
    ask(other, "Second")
    expect_said(tab, "First", "One.")
    expect_said(other, "Second", "Two.")


def test_reloading_keeps_the_conversation_and_an_answer_that_is_being_written(tab, engine):
    engine.pace = 0.02
    engine.answers += [LONG]
    send(tab, "Tell me")
    expect(tab.get_by_text("word3")).to_be_visible()
    tab.reload()
    expect(tab.get_by_text("word3")).to_be_visible()
    engine.pace = 0.0
    expect(measured(tab)).to_have_count(1)
    expect_said(tab, "Tell me", LONG)


def test_a_server_that_dies_and_comes_back_costs_nothing_but_the_answer(tab, api, engine):
    engine.answers += ["One."]
    ask(tab, "First")
    engine.pace = 0.02
    engine.answers += [LONG]
    send(tab, "Second")
    expect(tab.get_by_text("word3")).to_be_visible()
    api.stop()
    expect(tab.get_by_text("There is no complete answer.")).to_be_visible()
    expect(tab.get_by_text("There is no model to talk to.")).to_be_visible()
    expect(box(tab)).to_be_disabled()
    api.start()
    api.engine.answers += ["Two."]
    press(tab.get_by_test_id("stSidebar"), "Retry")
    expect(box(tab)).to_be_enabled()
    press(tab, "Retry")
    expect(tab.get_by_text("Two.")).to_be_visible()
    expect_said(tab, "First", "One.", "Second", "Two.")


def test_an_exported_conversation_can_be_learned_from(tab, engine, tmp_path):
    engine.answers += [[("2+3", "5"), "It is 5."]]
    ask(tab, "2 + 3?")
    tab.get_by_text("This conversation").click()
    with tab.expect_download() as download:
        press(tab, "Export")
    download.value.save_as(tmp_path / "talk.jsonl")
    ((_, talk),) = read_conversations(tmp_path / "talk.jsonl")
    assert [m["role"] for m in talk] == ["user", "assistant", "tool", "assistant"]
    with tab.expect_download() as download:
        press(tab, "Export all conversations")
    download.value.save_as(tmp_path / "all.jsonl")
    assert talk in [messages for _, messages in read_conversations(tmp_path / "all.jsonl")]


def test_a_conversation_can_be_renamed_and_deleted_after_a_question(tab, engine, folder):
    engine.answers += ["One."]
    ask(tab, "To be renamed")
    name = tab.url.partition("?c=")[2]
    tab.get_by_text("This conversation").click()
    tab.get_by_label("Title").fill("Renamed")
    tab.get_by_label("Title").press("Enter")
    expect(tab.get_by_role("button", name="Renamed")).to_be_visible()
    settle(tab)
    press(tab, "Delete")
    expect(tab.get_by_text("and its ratings?")).to_be_visible()
    assert (folder / f"{name}.json").exists()
    settle(tab)
    press(tab, "Yes, delete")
    expect(tab.get_by_role("button", name="Renamed")).to_have_count(0)
    expect_said(tab)
    assert not (folder / f"{name}.json").exists()


@pytest.fixture
def watched(new_tab, page):
    return Watched(new_tab, page[0])


def test_what_a_model_writes_can_neither_run_nor_load_anything(watched, engine):
    """While it is streamed, as one answer and as the arguments and result of a tool."""
    text = "\n\n".join(PAYLOADS)
    engine.answers += [[(text, text), text]]
    tab = watched()
    tab.get_by_label("Max tokens").fill("100000")
    ask(tab, text)
    tab.get_by_text("calculator").click()
    for line in (PAYLOADS[1], PAYLOADS[12], "graph TD; A[<img src=x onerror='window.hacked=1'>]"):
        assert tab.get_by_text(line).count() == 4, line  # question, arguments, result and answer
    watched.check()


def test_nor_can_titles_system_prompts_and_saved_conversations(watched, page, folder):
    for payload in PAYLOADS:
        saved.create(folder, saved.Conversation(payload))
    turns = [
        saved.Turn(text, [saved.Answer([{"role": "assistant", "content": text}], text, text, 1, 0.0, 0.0)])
        for text in PAYLOADS
    ]
    name = saved.create(folder, saved.Conversation(PAYLOADS[0], "\n\n".join(PAYLOADS), turns))
    tab = watched(f"{page[0]}?c={name}")
    tab.get_by_text("This conversation").click()
    shown = tab.get_by_test_id("stSidebar").get_by_role("button").all_inner_texts()
    wanted = [" ".join(payload.split()) for payload in PAYLOADS[:16]]
    assert [title for title in wanted if title not in shown] == []
    watched.check()


def test_nor_can_names_of_models_files_and_errors_of_a_server(watched, tmp_path):
    (tmp_path / f"{'0' * 16}.json").write_text(json.dumps({"turns": [PAYLOADS[1]], "edited": PAYLOADS[12]}))
    with (
        talking_server([*PAYLOADS], "\n\n".join(PAYLOADS)) as url,
        running_page(tmp_path, "--url", url) as (address, _),
    ):
        tab = watched(address)
        expect(tab.get_by_text("Some conversations cannot be read.")).to_be_visible()
        send(tab, "Hi")
        expect(tab.get_by_text("The server says: <script>")).to_be_visible()
        tab.get_by_label("Model", exact=True).click()
        expect(tab.get_by_text("<svg onload").first).to_be_visible()
        watched.check()


def test_with_no_model_the_page_says_so(new_tab, tmp_path):
    with talking_server([], "no") as url, running_page(tmp_path, "--url", url) as (address, _):
        tab = new_tab(address)
        expect(tab.get_by_text("The list of its models is empty.")).to_be_visible()
        expect(box(tab)).to_be_disabled()


def test_a_real_model_is_served_and_ends_with_the_page(new_tab, tiny_tokenizer, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    save_model(model, GPT(tiny_config(context=256)).init_weights(3), tiny_tokenizer)
    (model / "state.json").write_text(json.dumps({"stage": "sft"}))
    with running_page(tmp_path / "talks", str(model), HOTLAP_API_KEY="k" * 16) as (address, process):
        tab = new_tab(address)
        tab.get_by_label("Seed", exact=True).fill("1")
        ask(tab, "Hi")
        assert said(tab)[1]
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        (server,) = children.read_text().split()
    assert not Path(f"/proc/{server}").exists()
