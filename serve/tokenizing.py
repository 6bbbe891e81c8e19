"""What /tokenize, /detokenize and /tokenizer_info answer, with vLLM's names. lm-eval asks for them."""

from __future__ import annotations

from hotlap.model.messages import shown
from hotlap.serve.errors import refused
from hotlap.serve.fields import check_names, flag, required
from hotlap.serve.protocol import Served, conversation_ids, text_ids


def tokenized(body: object, served: Served) -> dict:
    """The token ids of a prompt, or of a conversation up to where the assistant answers.

    A prompt begins with <|bos|> unless `add_special_tokens` is false. Text never has the id of a special
    token, but for a prompt that is the name of one and nothing else: lm-eval asks for them so.
    """
    body = checked(body, ("model", "prompt", "messages", "add_special_tokens"))
    add_special = body.get("add_special_tokens") is None or flag(body, "add_special_tokens")
    if body.get("messages") is not None:
        if body.get("prompt") is not None:
            raise refused("`prompt` and `messages` exclude each other; send one of them", "prompt")
        tokens = conversation_ids(body, served)
    else:
        prompt = required(body, "prompt")
        if not isinstance(prompt, str):
            raise refused(f"`prompt` must be a string, not {shown(prompt)}", "prompt")
        special = served.tokenizer.special.get(prompt)
        tokens = text_ids(prompt, served) if special is None else [served.tokenizer.bos, special]
        tokens = tokens if add_special else tokens[1:]
    return {"tokens": tokens, "count": len(tokens), "max_model_len": served.context}


def detokenized(body: object, served: Served) -> dict:
    """The text of token ids, without special tokens."""
    tokens = required(checked(body, ("model", "tokens")), "tokens")
    vocabulary = range(served.tokenizer.vocab_size)
    if not isinstance(tokens, list) or not all(type(i) is int and i in vocabulary for i in tokens):
        raise refused(f"`tokens` must be a list of token ids from 0 to {vocabulary[-1]}", "tokens")
    return {"prompt": served.tokenizer.decode(tokens)}


def tokenizer_info(served: Served) -> dict:
    """Special tokens by their names. Conversations are made of ids, not by a template of text."""
    return {
        "tokenizer_class": "hotlap",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>" if served.chat else "<|bos|>",
        "pad_token": None,
        "chat_template": None,
        "model_max_length": served.context,
    }


def checked(body: object, names: tuple[str, ...]) -> dict:
    if not isinstance(body, dict):
        raise refused(f"the body must be a JSON object, not {shown(body)}")
    check_names(body, names)
    return body
