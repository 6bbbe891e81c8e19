"""The figures in the README are those of the result files that it names, to the digits that it gives."""

# ruff: noqa: RUF001  the README has a multiplication sign
import pytest
from helpers.figures import (
    GRAPH,
    HALF,
    XEON,
    XEON_WITHOUT_AMX,
    bits,
    characters,
    decoding,
    demo,
    filled,
    kernel,
    minutes,
    peer,
    preferences,
    race,
    rewards,
    serving,
    training,
    words_of,
)

LONG, DOCUMENTS = "long_attention {} d24 2x8192x12x128", "document_attention both d24 8x2048x12x128"
MLP, HEAD = "linear_relu2 both d24 16384x1536x6144", "linear_cross_entropy both d24 16384x1536x32768"
MUON, FP8 = "muon forward d24 24x1536x6144", "linear_fp8 both d24 16384x1536x6144"

CLAIMS = [  # a text with {} for figures, and the figures
    ("tests a chat model in {} s", [demo("seconds")]),
    (
        "the demo took {} s after installation. The model answered {} of 534 questions about Python in "
        "phrasings it was not trained on, {} of 200 new sums (it calls a calculator), and spelled {} of 100 "
        "new words. It refused {} of 245 questions about anything else, and {} of 854 by mistake",
        [
            demo("seconds"),
            demo("facts_of_534", scale=534),
            demo("sums_of_200", scale=200),
            demo("words_of_100", scale=100),
            demo("refused_of_245", scale=245),
            demo("wrongly_refused_of_854", scale=854),
        ],
    ),
    (
        "preferred the refusal in {} % of held-out pairs, and refused {} instead of {} of 198 questions "
        "about other unknown names; it answered {} of 534 facts",
        [
            preferences("held_out_pairs", ".1f", 100),
            preferences("unknown_refused_of_198", scale=198),
            preferences("unknown_refused_of_198", scale=198, provider="before"),
            preferences("facts_of_534", scale=534),
        ],
    ),
    (
        "reached {} bits per byte of held-out text in {} s on two cores of an AMD EPYC (Zen 4)",
        [minutes("validation_bpb", ".3f"), minutes("seconds", ".0f")],
    ),
    (
        "bigrams and stronger weight decay reached {} in {} s",
        [minutes("validation_bpb", ".3f", "before"), minutes("seconds", ".0f", "before")],
    ),
    (
        "training step is {} times as fast as nanoGPT's and {} times as fast as nanochat's",
        [peer(XEON, "nanogpt"), peer(XEON, "nanochat")],
    ),
    (
        "it is {} and {} times as fast",
        [peer(XEON_WITHOUT_AMX, "nanogpt"), peer(XEON_WITHOUT_AMX, "nanochat")],
    ),
    (
        "forward only | {} TFLOP/s | cuDNN, {} TFLOP/s |",
        [kernel(LONG.format("forward"), name, ".0f", "tflops") for name in ("hotlap", "sdpa")],
    ),
    (
        "tokens | {} ms (so `auto` uses cuDNN) | cuDNN, {} ms |",
        [kernel(LONG.format("both"), name) for name in ("hotlap", "sdpa")],
    ),
    (
        "document masks, 8 × 2,048 tokens | {} ms | FlexAttention, {} ms |",
        [kernel(DOCUMENTS, name) for name in ("hotlap", "flex")],
    ),
    (
        "| linear + ReLU² + linear | {} ms | torch.compile, {} ms |",
        [kernel(MLP, name) for name in ("hotlap", "compile")],
    ),
    (
        "| output head + cross-entropy | {} ms, {} GB | torch.compile, {} ms, {} GB |",
        [kernel(HEAD, name, ".1f", field) for name in ("hotlap", "compile") for field in ("ms", "memory_gb")],
    ),
    (
        "| Muon step for 24 matrices | {} ms | torch.compile, {} ms |",
        [kernel(MUON, name, ".1f") for name in ("hotlap", "compile")],
    ),
    (
        "| linear layer in fp8 | {} ms | torch.compile in bf16, {} ms |",
        [kernel(FP8, name) for name in ("hotlap", "compile")],
    ),
    (
        "training d24, 131,072 tokens a step | {} tokens/s, {} % MFU |",
        [training("tokens_per_second", "4 digits"), training("mfu_nanochat", ".0f", 100)],
    ),
    (
        "own commands | {} tokens/s | nanochat, {} tokens/s |",
        [race("hotlap"), race("nanochat")],
    ),
    ("no value embeddings, at {} tokens/s", [race("nanoGPT")]),
    (
        "training d12, own commands | {} | nanochat, {} |",
        [bits("hotlap"), bits("nanochat")],
    ),
    (
        "with {} bits per byte of held-out text. nanochat's 12 layers reach {} in 60 s, and nanoGPT's 124M "
        "recipe {}",
        [bits("hotlap", HALF), bits("nanochat"), bits("nanoGPT")],
    ),
    (
        "batch 1, 1,024 tokens before | {} tokens/s | nanochat, {} tokens/s |",
        [decoding(1, GRAPH, "3 digits"), decoding(1, "nanochat", "2 digits")],
    ),
    (
        "| decoding d24, batch 128 | {} tokens/s | nanochat, {} tokens/s |",
        [decoding(128, GRAPH, "3 digits"), decoding(128, "nanochat", "2 digits")],
    ),
    (
        "hotlap reached a validation loss of {} in {} s and {} s, nanoGPT {} in {} s and {} s",
        [
            number
            for name, turns in (("hotlap", (1, 2)), ("nanoGPT", (1, 2)))
            for number in (
                characters(1, name, "validation_loss", ".2f"),
                *(characters(turn, name) for turn in turns),
            )
        ],
    ),
    (
        "16 streams of the demo's model get {} tokens/s, and one gets {}",
        [serving("streams 16"), serving("streams 1")],
    ),
    (
        "After {} s on one thread of an AMD EPYC (Zen 4), it refused {} instead of {} of 198 questions about "
        "held-out unknown names, and still answered {} of 534 facts",
        (
            rewards("training_seconds"),
            rewards("unknown_refused_of_198", scale=198),
            rewards("unknown_refused_of_198", scale=198, provider="before"),
            rewards("facts_of_534", scale=534),
        ),
    ),
]


@pytest.mark.parametrize(("text", "figures"), CLAIMS, ids=[text[:40] for text, _ in CLAIMS])
def test_the_readme_gives_the_figures_of_its_result_files(text, figures):
    assert filled(text, figures) in words_of("README.md")
