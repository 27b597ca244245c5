"""Small random models of several families, and plans for them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import convbasis as cb
from convbasis.plan import HeadPlan, HeadSetting, ModelShape

VOCABULARY = 60
WINDOW = 96  # of layers with a sliding window
SHARED = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "llama": (LlamaConfig, SHARED),
    "mistral": (MistralConfig, {**SHARED, "sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, SHARED),
    "qwen3": (Qwen3Config, {**SHARED, "head_dim": 16}),
    "gemma": (GemmaConfig, {**SHARED, "head_dim": 8, "num_key_value_heads": 1}),
    "gpt2": (GPT2Config, {"n_head": 4}),
    "gpt_neox": (GPTNeoXConfig, {"num_attention_heads": 4, "intermediate_size": 32}),
    # Soft-capped logits, and attention-sink parameters: never approximated.
    "gemma2": (Gemma2Config, {**SHARED, "head_dim": 8, "sliding_window": WINDOW}),
    "gpt_oss": (
        GptOssConfig,
        {
            **SHARED, "head_dim": 8, "sliding_window": WINDOW, "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
}  # fmt: skip
EXACT_ONLY = ("gemma2", "gpt_oss")
APPROXIMATED = tuple(family for family in CONFIGS if family not in EXACT_ONLY)


def config(family="llama", **changes):
    kind, sizes = CONFIGS[family]
    return kind(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2, **sizes, **changes,
        }
    )  # fmt: skip


def build(family="llama", implementation=None, **changes):
    """Return a model in eval mode, the same at every call."""
    torch.manual_seed(1)
    if implementation is None:
        implementation = "eager" if family in EXACT_ONLY else "sdpa"
    made = AutoModelForCausalLM.from_config(
        config(family, **changes), attn_implementation=implementation
    )
    return made.eval()


def ids(n=80, batch=1):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(3, VOCABULARY, (batch, n), generator=generator)


def padded(tokens, side, counts=(0, 13)):
    """Return tokens and their mask with so many padding tokens in each row."""
    mask = torch.ones_like(tokens)
    for row, count in enumerate(counts):
        if count:
            mask[row, slice(count) if side == "left" else slice(-count, None)] = 0
    return tokens.masked_fill(mask == 0, 0), mask


EVERYTHING = HeadSetting(window=4096)
LITTLE = HeadSetting(window=8, sinks=1, columns=0)


def plan_for(model, setting=EVERYTHING, *, tolerance=0.1, length=100, min_length=16, exact_heads=()):
    """Return a plan with one setting for all heads except some exact ones."""
    shape = ModelShape.of(model)
    heads = [HeadPlan(None if head in exact_heads else setting) for head in range(shape.heads)]
    return cb.Plan(shape, "0" * 64, tolerance, length, min_length, [heads] * shape.layers)
