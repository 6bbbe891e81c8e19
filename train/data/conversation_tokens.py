"""Conversations as tokens: rendered, counted where they cannot be used, and kept in three bytes a token."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence

from hotlap.common.errors import DataError
from hotlap.model.conversation import render
from hotlap.model.messages import call_text
from hotlap.model.tokenizer import Tokenizer
from hotlap.train.data.conversations import Conversation
from hotlap.train.data.left_out import LeftOut
from hotlap.train.data.mixtures import Part
from hotlap.train.data.shards import CHARACTERS_AT_ONCE, TOKEN_TYPES, version
from hotlap.train.data.sources import SPLITS


class EncodedTexts:
    """Acts as a tokenizer for known texts, which its threads have encoded all at once."""

    def __init__(self, conversations: list[list[dict]], tokenizer: Tokenizer):
        self.bos, self.special = tokenizer.bos, tokenizer.special
        texts = {message["content"] for messages in conversations for message in messages}
        texts |= {
            call_text(message)
            for messages in conversations
            for message in messages
            if message.get("tool_calls")
        }
        self.ids = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))

    def encode(self, text: str) -> list[int]:
        return self.ids[text]


def rendered(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, T: int, left_out: LeftOut
) -> Iterator[tuple[Conversation, list[int], list[bool]]]:
    """The conversations of at most T tokens, with their ids and loss mask; the others go to left_out. Some
    MB of text are encoded at once.
    """
    too_long = f"are longer than the model's context of {T} tokens"
    most = T * max(tokenizer.byte_counts())  # characters that could fit
    batch: list[Conversation] = []
    characters = 0

    def flush() -> Iterator[tuple[Conversation, list[int], list[bool]]]:
        texts = tokenizer
        if tokenizer.is_bpe:  # single characters gain nothing from threads, and may be missing
            texts = EncodedTexts([conversation.messages for conversation in batch], tokenizer)
        for conversation in batch:
            try:
                ids, loss_mask = render(conversation.messages, texts)
            except DataError as error:
                left_out.add(
                    "have characters that the model's tokenizer lacks", f"{conversation.place}: {error}"
                )
                continue
            if len(ids) > T:
                left_out.add(too_long, f"{conversation.place}: {len(ids):,} tokens")
            else:
                yield conversation, ids, loss_mask

    for conversation in conversations:
        said = conversation.messages
        size = sum(len(m["content"]) + len(call_text(m) if m.get("tool_calls") else "") for m in said)
        if size > most:  # encoding it would take much memory
            left_out.add(too_long, f"{conversation.place}: {size:,} characters")
            continue
        batch.append(conversation)
        characters += size
        if characters > CHARACTERS_AT_ONCE:
            yield from flush()
            batch, characters = [], 0
    yield from flush()


class Tokens:
    """Conversations as tokens, in arrays that grow in place: 3 bytes a token, 23 a conversation.

    A conversation that trains is repeated as its part's weight says. Of a weight such as 2.5, half of the
    conversations are there twice and the others thrice: text and seed decide.
    """

    def __init__(self, vocab_size: int, parts: Sequence[Part], seed: int):
        self.dtype = TOKEN_TYPES[version(vocab_size)]
        self.parts, self.seed = parts, seed
        self.ids, self.loss_mask, self.stops = array(self.dtype.char), bytearray(), array("q")
        self.draws, self.splits = array("d"), array("b")  # splits: -1 where the text decides
        self.part, self.copies = array("i"), array("h")

    def add(self, conversation: Conversation, ids: list[int], loss_mask: list[bool]) -> None:
        self.ids.extend(ids)
        self.loss_mask.extend(loss_mask)
        self.stops.append(len(self.ids))
        text = json.dumps(conversation.messages, sort_keys=True)
        self.draws.append(random.Random(text).random())
        self.splits.append(SPLITS.index(conversation.split) if conversation.split else -1)
        self.part.append(conversation.part)
        passes, rest = divmod(self.parts[conversation.part].weight, 1)
        once_more = rest and random.Random(f"{self.seed} {text}").random() < rest
        self.copies.append(int(passes) + bool(once_more))
