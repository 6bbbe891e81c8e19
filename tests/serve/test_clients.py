"""What users of LangChain, litellm, Open WebUI, Continue and curl rely on. Nothing leaves this machine."""

import asyncio
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")

from helpers.offline import offline
from helpers.running_server import running_server, served, wait_until
from helpers.tools import tiny_config

from hotlap.model.engine import Engine

pytestmark = [
    pytest.mark.xdist_group("clients"),  # which take seconds to import
    pytest.mark.filterwarnings("ignore:Item:UserWarning", "ignore:Accessing:DeprecationWarning"),  # litellm's
]

KEY = "0123456789abcdef"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTEXT = 256
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
TEXT_ONLY = {str(i): -100 for i in range(289, 300)}  # no special token, so no early end
GREEDY = {"temperature": 0, "max_tokens": 24, "logit_bias": TEXT_ONLY}
ASKED = {"model": "tiny", "messages": QUESTION, **GREEDY}


@pytest.fixture(scope="module", autouse=True)
def nothing_leaves_this_machine():
    with offline():
        yield


@pytest.fixture(scope="module")
def serve(random_model, tiny_tokenizer):
    """A function that starts a server of a small model."""
    model = random_model(tiny_config(context=CONTEXT))

    def start(slots: int = 4, **options):
        return running_server(
            Engine(model, tiny_tokenizer, slots), served(tiny_tokenizer, context=CONTEXT), **options
        )

    return start


@pytest.fixture(scope="module")
def server(serve):
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def base_url(server) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


@pytest.fixture(scope="module")
def expected(server) -> str:
    """The greedy answer."""
    status, reply, _ = server.ask(CHAT, ASKED)
    assert status == 200
    return reply["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def langchain(base_url):
    """A function that makes a ChatOpenAI."""
    module = pytest.importorskip("langchain_openai")

    def make(**fields):
        where = {"base_url": base_url, "api_key": "none", "max_retries": 0}
        return module.ChatOpenAI(**{"model": "tiny", **where, **GREEDY, **fields})

    return make


@pytest.fixture(scope="module")
def litellm():
    module = pytest.importorskip("litellm")
    module.suppress_debug_info = True
    yield module
    asyncio.run(module.close_litellm_async_clients())


@pytest.fixture(scope="module")
def asked_of_litellm(base_url):
    bias = {"extra_body": {"logit_bias": TEXT_ONLY}}
    where = {"model": "openai/tiny", "api_base": base_url, "api_key": "none", "num_retries": 0}
    return {**where, "messages": QUESTION, "temperature": 0, "max_tokens": 24, **bias}


def test_langchain_invokes_and_streams(langchain, expected):
    answer = langchain().invoke("What is 2 + 3?")
    assert answer.content == expected and answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata["output_tokens"] == 24 and answer.response_metadata["model_name"] == "tiny"
    chunks = list(langchain().stream("What is 2 + 3?"))
    assert "".join(chunk.content for chunk in chunks) == expected


def test_langchain_is_told_the_usage_of_a_stream(langchain):
    chunks = list(langchain(stream_usage=True).stream("What is 2 + 3?"))
    assert [c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata] == [24]


def test_langchain_batches(langchain, expected, server):
    answers = langchain().batch(["What is 2 + 3?", "Who?"] * 4)
    assert [answer.content for answer in answers[::2]] == [expected] * 4 != answers[1::2]
    answers = asyncio.run(langchain().abatch(["What is 2 + 3?"] * 3))
    assert [answer.content for answer in answers] == [expected] * 3
    wait_until(server.quiet)


def test_langchain_gets_n_answers(langchain):
    fields, messages = {"temperature": 0.8, "seed": 5}, pytest.importorskip("langchain_core.messages")
    question = messages.HumanMessage("What is 2 + 3?")
    (answers,) = langchain(n=3, **fields).generate([[question]]).generations
    assert len({answer.text for answer in answers}) == 3
    assert answers[0].text == langchain(**fields).invoke("What is 2 + 3?").content


def test_langchain_stops(langchain, expected):
    stop = expected[6:8]
    answer = langchain().invoke("What is 2 + 3?", stop=[stop])
    assert answer.content == expected[: expected.index(stop)]
    assert answer.response_metadata["finish_reason"] == "stop"


def test_langchain_limits_the_answer(langchain):
    assert langchain(max_completion_tokens=5).invoke("Who?").usage_metadata["output_tokens"] == 5


def test_langchain_reads_log_probabilities(langchain):
    answer = langchain(logprobs=True, top_logprobs=2).invoke("What is 2 + 3?")
    content = answer.response_metadata["logprobs"]["content"]
    assert len(content) == 24 and all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_langchain_keeps_a_conversation(langchain):
    turns = [("system", "Be brief."), ("user", "What is 2 + 3?"), ("assistant", "5"), ("user", "Why?")]
    assert langchain().invoke(turns).content != langchain().invoke(turns[-1:]).content


def test_langchain_is_told_that_there_are_no_tools(langchain):
    openai = pytest.importorskip("openai")
    tool = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        langchain().bind_tools([tool]).invoke("What is 2 + 3?")


def test_litellm_completes_and_streams(litellm, asked_of_litellm, expected):
    answer = litellm.completion(**asked_of_litellm)
    assert answer.choices[0].message.content == expected and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**asked_of_litellm, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage.completion_tokens == 24
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == expected


def test_litellm_completes_asynchronously(litellm, asked_of_litellm, expected):
    async def both() -> list[str]:
        whole, stream = await asyncio.gather(
            litellm.acompletion(**asked_of_litellm), litellm.acompletion(stream=True, **asked_of_litellm)
        )
        streamed = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return [whole.choices[0].message.content, "".join(streamed)]

    assert asyncio.run(both()) == [expected, expected]


def test_litellm_continues_text(litellm, server, base_url):
    fields = {"prompt": "The quick", "max_tokens": 8, "temperature": 0}
    _, reply, _ = server.ask(COMPLETIONS, {"model": "tiny", **fields})
    answer = litellm.text_completion(
        model="text-completion-openai/tiny", api_base=base_url, api_key="none", **fields
    )
    assert answer.choices[0].text == reply["choices"][0]["text"]


def test_litellm_tells_errors_apart(litellm, asked_of_litellm):
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked_of_litellm | {"messages": [{"role": "user", "content": "word " * 300}]})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked_of_litellm | {"model": "openai/gpt-4o"})
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked_of_litellm | {"temperature": 99})


def test_open_webui_asks_five_times_at_once(serve, expected):
    """A person's chat as a stream, and what it wants for its own display, with one slot for all."""
    tasks = ["Make a title.", "Give tags.", "Suggest a question.", "What to search for?"]

    def body(text: str, **fields) -> dict:
        asked = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        return {"model": "tiny", "messages": asked, **GREEDY, **fields}

    def whole(text: str) -> str:
        status, reply, _ = running.ask(CHAT, body(text, stream=False))
        assert status == 200
        return reply["choices"][0]["message"]["content"]

    with serve(slots=1) as running:
        alone = [whole(task) for task in tasks]
        with ThreadPoolExecutor(5) as pool:
            stream = pool.submit(running.events, CHAT, body("What is 2 + 3?", stream=True))
            assert list(pool.map(whole, tasks)) == alone
        assert streamed_text(stream.result()) == expected
        wait_until(running.quiet)


def test_continue_sends_its_key_in_a_header_of_its_own(serve, expected):
    fields = {"stream": True, "stop": ["<|im_start|>", "<|im_end|>", "a", "b", "c"], "top_p": 1}
    with serve(key=KEY) as running:
        headers = {"Content-Type": "application/json", "api-key": KEY}
        status, text, _ = running.ask(CHAT, ASKED | fields | {"stop": ["never"] * 5}, **headers)
        assert status == 200 and streamed_text(text.removesuffix("\n\n").split("\n\n")) == expected
        assert running.ask(CHAT, ASKED | fields, **headers | {"api-key": "no"})[0] == 401


def streamed_text(events: list[str]) -> str:
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


@pytest.fixture(scope="module")
def curl(server):
    program = shutil.which("curl")
    if not program:
        pytest.skip("needs curl")

    def run(path: str, body: dict, *flags: str) -> str:
        command = [program, "-sS", "-N", "--noproxy", "*", "--max-time", "20", *flags]
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        done = subprocess.run([*command, f"http://127.0.0.1:{server.port}{path}"], capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode("utf-8")

    return run


def strict(text: str) -> dict:
    """JSON without doubled names, NaN or infinities."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique, parse_constant=lambda name: pytest.fail(name))


def test_curl_gets_json(curl, expected):
    reply = strict(curl(CHAT, ASKED))
    assert set(reply) == {"id", "object", "created", "model", "choices", "usage"}
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected}
    assert strict(curl(CHAT, {"model": "tiny"}))["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("path", "asked", "kind", "new"),
    [
        (CHAT, {"messages": QUESTION, "logprobs": True}, "chat.completion.chunk", "delta"),
        (COMPLETIONS, {"prompt": "The", "logprobs": 2}, "text_completion", "text"),
    ],
)
def test_curl_gets_events_that_are_well_formed(curl, path, asked, kind, new):
    fields = {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    answer = curl(path, {"model": "tiny", **asked, **fields, **GREEDY})
    assert answer.isascii() and answer.endswith("\n\n")
    *events, done = answer.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]" and all(e.startswith("data: {") and "\n" not in e for e in events)
    *chunks, last = [strict(event.removeprefix("data: ")) for event in events]
    (head,) = {(c["object"], c["model"], c["id"], c["created"]) for c in [*chunks, last]}
    assert head[:2] == (kind, "tiny") and type(last["created"]) is int
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 48
    assert all(set(c) == {"id", "object", "created", "model", "choices", "usage"} for c in [*chunks, last])
    assert all(c["usage"] is None and len(c["choices"]) == 1 for c in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all(set(c) == {"index", new, "logprobs", "finish_reason"} for c in choices)
    for index in range(2):
        own = [choice for choice in choices if choice["index"] == index]
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
        if path == CHAT:
            assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[-1]["delta"] == {}
            assert all(set(choice["delta"]) == {"content"} for choice in own[1:-1])


def test_curl_says_what_was_wrong(curl):
    answer = curl(CHAT, ASKED | {"stream": True, "temperature": 99}, "-w", "%{http_code} %{content_type}")
    body, _, end = answer.rpartition("}")
    assert end == "400 application/json" and strict(body + "}")["error"]["param"] == "temperature"
