"""The README.md of a model exported for Transformers: what it is, how to use it, what differs from hotlap."""

from __future__ import annotations

from hotlap.common.terminal import printable
from hotlap.model.config import HfExportConfig, Shape, counts_of
from hotlap.model.export_code import OWN_CLASS
from hotlap.model.stock_config import CLASSES

KEPT = "hotlap/embedding.safetensors"  # in a subfolder: vLLM reads all .safetensors beside config.json
RUN_CARD = "model_card.md"  # of the run
CHAT = (
    'tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, '
    'return_dict=True, return_tensors="pt")'
)
TEXT = 'tokenizer("Once upon a time", return_tensors="pt")'
NOTES = (
    "Fill conversations with `apply_chat_template`, which begins with `<|bos|>`. Calling the tokenizer adds "
    "one, too, so do not call it on text that the template made.",
    "Transformers reads special tokens that text spells out, such as `<|bos|>`; hotlap does not. So the "
    "template refuses messages that spell one. For other text that you do not trust, pass "
    "`split_special_tokens=True` to the tokenizer.",
    "Tools are not run. A call ends with `<|tool_end|>`: stop there, and give the result as a message of the "
    "role `tool`.",
    "Not tried with vLLM.",
)
CODE_NOTES = (
    "Transformers has no class for its extras, so `modeling_hotlap.py` in this folder is one, which "
    "`trust_remote_code=True` lets it run. Read it first: it is 320 lines.",
    "`hotlap import hf` reads this model again.",
)
TOKEN_BEFORE_NOTE = (
    "It has smear or bigrams, which need the token before each one. Engines that batch rows of their own do "
    "not keep it, so vLLM and `generate_batch` are refused."
)
APERTUS_NOTES = (
    "Apertus' activation xIELU has the parameters at which it is ReLU². Its optional CUDA extension (the "
    "package `xielu`) ignores one of them, beta, and computes something else: do not install it beside this "
    "model.",
    "The rows of the embedding are divided by their RMS, which hotlap's forward pass does.",
    "`hotlap import hf` reads this model again, also with LoRA adapters merged into its linear layers. If "
    "all of it is trained further, xIELU, norms and rows become what hotlap has not.",
)


def card(config: HfExportConfig, shape: Shape, kind: str, stage: str | None, has_card: bool) -> str:
    """The text. kind: the class; has_card: whether the run's own card lies beside it."""
    what, prompt = "A chat model, which answers messages.", CHAT
    if stage == "pretrain":
        what, prompt = "A base model, which continues text; it was not trained on the chat template.", TEXT
    about = (
        f"{what} It has {counts_of(shape)['total']:,} parameters: {shape.layers} layers, width "
        f"{shape.width}, {shape.heads} query heads, {shape.kv_heads} key and value heads, "
        f"{shape.vocab_size:,} ids. Exported by hotlap{f', last stage {stage}' if stage else ''}; weights "
        f"in {config.dtype}, for "
        + ("a class of its own." if kind == OWN_CLASS else f"`{CLASSES[kind]}` of Transformers.")
    )
    if has_card:
        about += f" [{RUN_CARD}]({RUN_CARD}) says how it was trained, on what data, and its scores."
    notes = [f"It was trained on at most {shape.context:,} tokens at once: use no more.", *NOTES]
    notes += APERTUS_NOTES if kind == "apertus" else CODE_NOTES if kind == OWN_CLASS else ()
    notes += [TOKEN_BEFORE_NOTE] if kind == OWN_CLASS and (shape.smear or shape.bigram_rows) else []
    trust = ", trust_remote_code=True" if kind == OWN_CLASS else ""
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
        f"# {printable(config.out.resolve().name)}", "", about, "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("."{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("."{trust})',
        f"inputs = {prompt}",
        "ids = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```", "",
        *(f"* {note}" for note in notes), "",
    ]  # fmt: skip
    return "\n".join(lines)
