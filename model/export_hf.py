"""`hotlap export hf`: a model, its tokenizer and its conversation format, for Transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import processors

from hotlap.common.files import write, write_object
from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.model.chat_template import chat_template
from hotlap.model.config import HfExportConfig, Sampling, Shape
from hotlap.model.export import new_folder
from hotlap.model.export_code import CODE, OWN_CLASS, code_config, code_weights, write_code
from hotlap.model.foreign_config import OURS
from hotlap.model.hf_card import KEPT, RUN_CARD, card
from hotlap.model.stock import EMBEDDING, not_stock, stock_class, to_stock
from hotlap.model.stock_config import stock_config
from hotlap.model.tensors import save_tensors
from hotlap.model.tokenizer import TOKENIZER, Tokenizer, parsed
from hotlap.model.weights import CONFIG, WEIGHTS, lineage, load_config, load_model, model_folder, stage


def export_hf(config: HfExportConfig) -> Path:
    """Write the model, with its adapters merged, for Transformers, and return its folder."""
    folder = model_folder(config.model)
    kind = class_of(load_config(lineage(folder)[-1]))
    with new_folder(config.out) as partial:
        model, tokenizer = load_model(folder, torch.device("cpu"), torch.float32)
        weights, dtype = model.state_dict(), getattr(torch, config.dtype)
        if kind == OWN_CLASS:
            fields, tensors = code_config(model.config), code_weights(weights)
            write_code(partial)
        else:
            fields, tensors = stock_config(model.config, kind), to_stock(weights, model.config, kind)
        if kind == "apertus" and dtype == torch.float32:  # division cannot be undone to the last bit
            (partial / KEPT).parent.mkdir()
            save_tensors({EMBEDDING: weights["embedding.weight"]}, partial / KEPT)
        save_tensors({name: tensor.to(dtype) for name, tensor in tensors.items()}, partial / WEIGHTS)
        trained_for = stage(folder)
        about = {"stage": trained_for, "document_masks": model.config.document_masks}
        if kind == OWN_CLASS:
            about["window_pattern"] = model.config.window_pattern
        fields |= special_ids(tokenizer) | {"dtype": config.dtype, OURS: about}
        write_object(partial / CONFIG, fields)
        write_object(partial / "generation_config.json", generation_fields(tokenizer))
        write(partial / TOKENIZER, beginning_with_bos(tokenizer))
        write_object(partial / "tokenizer_config.json", tokenizer_fields(model.config))
        write(partial / "chat_template.jinja", chat_template(tokenizer))
        if has_card := (config.model / RUN_CARD).is_file():
            shutil.copyfile(config.model / RUN_CARD, partial / RUN_CARD)
        write(partial / "README.md", card(config, model.config, kind, trained_for, has_card))
    return config.out


def class_of(config: Shape) -> str:
    """The stock class for a model, or else our own."""
    if kind := stock_class(config):
        return kind
    log.warning(
        "no class of Transformers computes %s, so %s is in the folder: load it with trust_remote_code=True. "
        "Models of the presets *-portable need no such file",
        ", ".join(not_stock(config)), CODE.name,
    )  # fmt: skip
    return OWN_CLASS


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Padding is <|bos|>: an end of turn as padding would be left out of the loss when fine-tuning."""
    bos, end = tokenizer.bos, tokenizer.special["<|assistant_end|>"]
    return {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": bos}


def generation_fields(tokenizer: Tokenizer) -> dict:
    """Our default sampling. Answers end where ours do, at the end of the turn or the start of a document."""
    sampling, ids = Sampling(), special_ids(tokenizer)
    return ids | {
        "eos_token_id": [ids["eos_token_id"], ids["bos_token_id"]],
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
    }


def beginning_with_bos(tokenizer: Tokenizer) -> str:
    """tokenizer.json by which plain text begins with <|bos|>, as documents do in training."""
    found = parsed(tokenizer.definition)
    found.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B:1", special_tokens=[("<|bos|>", tokenizer.bos)]
    )
    return found.to_str()


def tokenizer_fields(config: Shape) -> dict:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.context,
        "padding_side": "left",
    }


def main(config: HfExportConfig) -> None:
    """`hotlap export hf`."""
    print(printable(str(export_hf(config))))
