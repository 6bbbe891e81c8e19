"""What users of the `openai` package rely on, asked by that package."""

import asyncio

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai
import torch
from helpers.fake_engine import FakeEngine
from helpers.openai_client import QUESTION, client_of, joined, text_of
from helpers.running_server import running_server, served
from helpers.tools import tiny_config

from hotlap.model.conversation import render_prompt
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling
from hotlap.serve.blocklist import Blocklist
from hotlap.serve.fields import CHAT_FIELDS, COMPLETION_FIELDS

SLOTS, CONTEXT = 4, 256
TEXT_ONLY = {"logit_bias": {str(i): -100 for i in range(289, 300)}}  # no special token, so no early end
DRAWN = {"temperature": 0.8, "seed": 3, "max_tokens": 30, **TEXT_ONLY}
GREEDY = {"temperature": 0, "max_tokens": 30, **TEXT_ONLY}


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(tiny_config(context=CONTEXT))


@pytest.fixture(scope="module")
def server(model, tiny_tokenizer):
    with running_server(Engine(model, tiny_tokenizer, SLOTS), served(tiny_tokenizer, context=CONTEXT)) as it:
        yield it


@pytest.fixture(scope="module")
def client(server):
    with client_of(server, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def ask(client):
    """Ask the question, or what `fields` say."""

    def create(**fields):
        return client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, **fields})

    return create


@pytest.fixture(scope="module")
def continue_text(client):
    def create(prompt, **fields):
        return client.completions.create(**{"model": "tiny", "prompt": prompt, **fields})

    return create


def test_the_model_is_listed_and_found(client):
    (model,) = client.models.list()
    assert model.id == "tiny" and client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


@pytest.mark.parametrize("fields", [GREEDY, DRAWN])
def test_a_streamed_chat_says_what_a_whole_one_says(ask, fields):
    chunks = list(ask(stream=True, **fields))
    assert joined(chunks) == text_of(ask(**fields)) != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and {chunk.model for chunk in chunks} == {"tiny"}


@pytest.mark.parametrize("fields", [GREEDY, DRAWN])
def test_streamed_text_is_that_of_a_whole_completion(continue_text, fields):
    chunks = list(continue_text("The quick", stream=True, **fields))
    whole = continue_text("The quick", **fields)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_the_stream_helper_ends_with_the_whole_completion(client, ask):
    fields = GREEDY | {"stop": text_of(ask(**GREEDY))[-2:]}  # it refuses answers that reach the limit
    options = {"stream_options": {"include_usage": True}}
    with client.chat.completions.stream(model="tiny", messages=QUESTION, **fields, **options) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    whole = ask(**fields)
    assert said == text_of(final) == text_of(whole) != ""
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_usage_is_streamed_only_if_asked_for(ask, continue_text):
    for create in (ask, lambda **fields: continue_text("The", **fields)):
        whole = create(**GREEDY)
        plain = list(create(stream=True, **GREEDY))
        assert all(chunk.choices and chunk.usage is None for chunk in plain)
        *others, last = create(stream=True, stream_options={"include_usage": True}, **GREEDY)
        assert all(chunk.choices and chunk.usage is None for chunk in others)
        assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens == 30
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as refused:
        ask(stream_options={"include_usage": True})
    assert refused.value.param == "stream_options"


def test_an_answer_says_why_it_ended(ask, tiny_tokenizer):
    assert ask(**GREEDY).choices[0].finish_reason == "length"
    end = tiny_tokenizer.special["<|assistant_end|>"]
    at_once = GREEDY | {"logit_bias": {str(end): 100}}
    ended = ask(**at_once)
    assert ended.choices[0].finish_reason == "stop" and text_of(ended) == ""
    chunks = list(ask(stream=True, **at_once))
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]


def test_without_a_limit_a_chat_fills_the_context_and_a_completion_has_16_tokens(ask, continue_text):
    assert ask(**TEXT_ONLY).usage.total_tokens == CONTEXT
    assert continue_text("The", **TEXT_ONLY).usage.completion_tokens == 16


def test_both_names_of_the_limit_work(ask):
    for name in ("max_tokens", "max_completion_tokens"):
        assert ask(**TEXT_ONLY, **{name: 5}).usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 99}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
    ],
)
def test_a_bad_request_names_the_field(ask, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(**fields)
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


def test_every_field_that_the_client_has_is_known():
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_params

    assert set(chat_params.CompletionCreateParamsBase.__annotations__) | {"stream"} <= {*CHAT_FIELDS}
    assert set(completion_create_params.CompletionCreateParamsBase.__annotations__) <= {*COMPLETION_FIELDS}


def test_a_prompt_that_does_not_fit_has_a_code_of_its_own(ask):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(messages=[{"role": "user", "content": "word " * 300}])
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"


def test_another_model_is_not_found(ask):
    with pytest.raises(openai.NotFoundError) as refused:
        ask(model="gpt-4o")
    assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_what_the_server_lacks_is_not_found(client):
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="tiny", input="hello")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="hello")


def test_answers_end_before_a_stop_string(ask):
    text = text_of(ask(**GREEDY))
    at = next(i for i in range(4, len(text)) if text.find(text[i : i + 2]) == i and text[i : i + 2].isascii())
    for stop in (text[at : at + 2], ["never said", text[at : at + 2]]):
        whole = ask(stop=stop, **GREEDY)
        assert text_of(whole) == text[:at] and whole.choices[0].finish_reason == "stop"
        chunks = list(ask(stop=stop, stream=True, **GREEDY))
        assert joined(chunks) == text[:at] and chunks[-1].choices[0].finish_reason == "stop"
    assert text_of(ask(stop=["never said"] * 16, **GREEDY)) == text


def test_a_seed_repeats_an_answer(ask):
    same = [text_of(ask(**DRAWN)) for _ in range(2)]
    others = [text_of(ask(**DRAWN | {"seed": seed})) for seed in (4, -4)]
    without = [text_of(ask(max_tokens=30, **TEXT_ONLY)) for _ in range(2)]
    assert same[0] == same[1] and len({*same, *others, *without}) == 5


def test_choices_are_those_of_the_seeds_that_follow(ask, continue_text):
    alone = [text_of(ask(**DRAWN | {"seed": 3 + i})) for i in range(3)]
    whole = ask(n=3, **DRAWN)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [choice.message.content for choice in whole.choices] == alone
    assert whole.usage.completion_tokens == 90
    chunks = list(ask(n=3, stream=True, **DRAWN))
    assert [joined(chunks, i) for i in range(3)] == alone
    ends = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(ends) == [0, 1, 2]


def test_a_batch_of_prompts_has_a_choice_each(continue_text, tiny_tokenizer):
    texts = ["The quick", "What is"]
    ids = [[tiny_tokenizer.bos, *tiny_tokenizer.encode(text)] for text in texts]
    alone = [continue_text(text, **GREEDY).choices[0].text for text in texts]
    for prompt in (texts, ids):
        choices = continue_text(prompt, **GREEDY).choices
        assert [(c.index, c.text) for c in choices] == [*enumerate(alone)]
    assert continue_text(ids[0], **GREEDY).choices[0].text == alone[0]


def test_a_bias_forces_a_token(ask, tiny_tokenizer):
    (token,) = tiny_tokenizer.encode("x")
    assert text_of(ask(logit_bias={str(token): 100}, max_tokens=5, seed=1)) == "xxxxx"


def test_log_probabilities_are_the_models(ask, model, tiny_tokenizer):
    found = ask(logprobs=True, top_logprobs=5, **GREEDY).choices[0].logprobs.content
    id_of = {tiny_tokenizer.token_bytes(i): i for i in range(tiny_tokenizer.text_size)}
    ids = render_prompt(QUESTION, tiny_tokenizer)
    for entry in found:
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        top = expected[: tiny_tokenizer.vocab_size].topk(5).values.tolist()
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(top, abs=1e-4)
        ids.append(id_of[bytes(entry.bytes)])
        assert entry.logprob == pytest.approx(float(expected[ids[-1]]), abs=1e-4)
    assert len(found) == GREEDY["max_tokens"]


def test_streamed_log_probabilities_are_those_of_a_whole_answer(ask):
    fields = {"logprobs": True, "top_logprobs": 2, **DRAWN}
    chunks = [c for chunk in ask(stream=True, **fields) for c in chunk.choices if c.logprobs]
    streamed = [entry for choice in chunks for entry in choice.logprobs.content]
    assert [entry.token for entry in streamed] == [e.token for e in ask(**fields).choices[0].logprobs.content]


def test_an_echo_scores_the_prompt(continue_text, model, tiny_tokenizer):
    prompt = [tiny_tokenizer.bos, *tiny_tokenizer.encode("The lazy dog")]
    (choice,) = continue_text(prompt, echo=True, logprobs=1, max_tokens=0, temperature=0).choices
    with torch.no_grad():
        scores = model(torch.tensor([prompt]))[0].log_softmax(-1)
    expected = [float(scores[i, token]) for i, token in enumerate(prompt[1:])]
    assert choice.text == "The lazy dog" and choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_tokens_of_a_prompt_are_told_by_equal_numbers(continue_text, model, tiny_tokenizer):
    """How lm-eval finds out whether an answer is the greedy one."""
    prompt = [tiny_tokenizer.bos, *tiny_tokenizer.encode("The lazy dog")]
    (answer,) = Engine(model, tiny_tokenizer).complete([prompt], Sampling(temperature=0, max_tokens=8), {})
    ids = [*prompt, *answer]
    (choice,) = continue_text(ids, echo=True, logprobs=1, max_tokens=1, temperature=0).choices
    own, top = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
    assert len(own) == len(top) == len(ids) + 1
    assert all(own[i] == max(top[i].values()) for i in range(len(prompt), len(ids)))
    assert any(own[i] != max(top[i].values()) for i in range(1, len(prompt)))


def test_vllms_fields_go_into_the_extra_body(ask):
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1}
    penalized = ask(extra_body={"repetition_penalty": 1.1}, **GREEDY)
    assert (
        text_of(ask(extra_body=extra, max_tokens=30, **TEXT_ONLY))
        == text_of(penalized)
        != text_of(ask(**GREEDY))
    )
    with pytest.raises(openai.BadRequestError) as refused:
        ask(extra_body={"min_p": 2})
    assert refused.value.param == "min_p"


def test_content_may_come_in_parts_and_the_system_may_be_a_developer(ask):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 3?"}]
    assert text_of(ask(messages=[{"role": "user", "content": parts}], **GREEDY)) == text_of(ask(**GREEDY))
    told = [
        text_of(ask(messages=[{"role": role, "content": "Be brief."}, *QUESTION], **GREEDY))
        for role in ("system", "developer")
    ]
    assert told[0] == told[1] != text_of(ask(**GREEDY))


def test_an_answer_goes_back_as_part_of_the_conversation(ask):
    answer = ask(**GREEDY).choices[0].message
    plain = {"role": "assistant", "content": answer.content}
    found = [
        text_of(ask(messages=[*QUESTION, said, {"role": "user", "content": "Why?"}], **GREEDY))
        for said in (plain, answer, answer.model_dump())
    ]
    assert found[0] == found[1] == found[2]


def test_sixteen_at_once_get_what_each_gets_alone(server, ask):
    def own(seed: int) -> dict:
        return DRAWN | {"seed": seed, "max_tokens": 10 + seed}

    async def all_at_once() -> list[str]:
        async with client_of(server, openai.AsyncOpenAI) as client:

            async def one(seed: int) -> str:
                fields = {
                    "model": "tiny",
                    "messages": QUESTION,
                    **DRAWN,
                    "seed": seed,
                    "max_tokens": 10 + seed,
                }
                if seed % 2:
                    return text_of(await client.chat.completions.create(**fields))
                stream = await client.chat.completions.create(stream=True, **fields)
                return joined([chunk async for chunk in stream])

            return await asyncio.gather(*map(one, range(16)))

    found = asyncio.run(all_at_once())
    assert found == [text_of(ask(**own(seed))) for seed in range(16)]


def test_the_filter_is_seen_as_one(tiny_tokenizer, tmp_path):
    (tmp_path / "list.txt").write_text("dog")
    engine = FakeEngine(tiny_tokenizer, says=("It is a fine day and the dog is here. ",))
    blocklist = Blocklist(tmp_path / "list.txt")
    with (
        running_server(engine, served(tiny_tokenizer, context=CONTEXT), moderate=blocklist) as running,
        client_of(running, max_retries=0) as client,
    ):
        fields = {"model": "tiny", "max_tokens": 200}
        whole = client.chat.completions.create(messages=QUESTION, **fields)
        assert whole.choices[0].finish_reason == "content_filter" and "dog" not in text_of(whole)
        chunks = list(client.chat.completions.create(messages=QUESTION, stream=True, **fields))
        assert chunks[-1].choices[0].finish_reason == "content_filter" and joined(chunks) == text_of(whole)
        (choice,) = client.completions.create(prompt="Hi", **fields).choices
        assert choice.finish_reason == "content_filter" and choice.text == text_of(whole)
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(prompt="the dog", **fields)
        assert refused.value.code == "content_filter" and refused.value.param == "prompt"


def test_responses_have_the_servers_id(ask):
    assert ask(**GREEDY)._request_id.startswith("req-")
