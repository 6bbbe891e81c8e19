"""Multiple choice: the answer is the likeliest of the letters at the start of the assistant's turn."""
# B prompts of a batch, T tokens of the longest, V vocab, L letters

from __future__ import annotations

import torch
from tqdm import tqdm

from hotlap.common.errors import DataError
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.transformer import Transformer
from hotlap.train.evaluation.batching import by_length


def letter_ids(letters: str, tokenizer: Tokenizer) -> list[int]:
    """The token of each letter. DataError if one is several tokens, or lacking."""
    ids = []
    for letter in letters:
        found = tokenizer.encode(letter)
        if len(found) != 1:
            raise DataError(f"the tokenizer makes {len(found)} tokens of the letter {letter}, and needs one")
        ids += found
    return ids


@torch.inference_mode()
def likeliest_letters(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], letters: list[str], bar: tqdm
) -> list[str]:
    """For each prompt, which of its letters the model is most likely to say next; of equals, the first.

    All choose from the beginning of the same alphabet. FloatingPointError if a logit is not finite.
    """
    device = model.embedding.weight.device
    among = letter_ids(max(letters, key=len, default=""), tokenizer)
    answers = [""] * len(prompts)
    for batch in by_length(range(len(prompts)), lambda i: len(prompts[i])):
        T = len(prompts[batch[-1]])
        ids = [prompts[i] + [tokenizer.bos] * (T - len(prompts[i])) for i in batch]
        last = torch.tensor([len(prompts[i]) - 1 for i in batch], device=device)
        rows = torch.arange(len(batch), device=device)
        hidden = model.hidden(torch.tensor(ids, device=device))[rows, last]
        logits = model.logits(hidden)[:, : tokenizer.vocab_size]  # (B, V), without padding
        if not logits.isfinite().all():
            raise FloatingPointError("the logits are not finite; the model has diverged or is damaged")
        for i, row in zip(batch, logits[:, among].tolist(), strict=True):  # (B, L)
            own = row[: len(letters[i])]
            answers[i] = letters[i][own.index(max(own))]
        bar.update(len(batch))
    return answers
