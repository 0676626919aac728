"""Small random models and a byte tokenizer, for tests and examples: real architectures, a thousandth of the size.

Needs the extra `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

__all__ = ["TINY_MODELS", "VOCAB_SIZE", "byte_tokenizer", "tiny_model"]

# All bytes and two special tokens.
VOCAB_SIZE = 258

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": None,
    "pad_token_id": 257,
}
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "eos_token_id": None}
_OPT = {
    **{name: _COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    **{name: _COMMON[name] for name in ("max_position_embeddings", "pad_token_id", "eos_token_id")},
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}
_GEMMA3N = {
    **_COMMON,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
_SLIDING = {**_COMMON, "head_dim": 16, "sliding_window": 8}
_MIXED = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
# No SDPA knows soft caps or sinks: transformers' own answer is computed eagerly.
_EAGER = {"attn_implementation": "eager"}

# Name to (model class, config class, options): what each is there for, is in the names of its options.
TINY_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _COMMON),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _COMMON),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_COMMON, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _SLIDING),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_MIXED, **_EAGER, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _MIXED),
    "gemma3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig", _GEMMA3N),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_MIXED,
            **_EAGER,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
}


def tiny_model(name: str, **changes: Any) -> Any:
    """One of TINY_MODELS in eval mode, float32, the same weights each time; `changes` go to its config.

    Weights are wide, so that likely tokens stand out and rounding decides nothing. It has no EOS.
    """
    model_class, config_class, options = TINY_MODELS[name]
    config = getattr(transformers, config_class)(**{**options, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            elif parameter.is_floating_point():
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = VOCAB_SIZE - 1
    return model.eval()


def byte_tokenizer() -> Any:
    """One token a byte, so that characters beyond ASCII take several; ids 256 and 257 are special."""
    alphabet: Callable[[], list[str]] = pre_tokenizers.ByteLevel.alphabet
    vocabulary = {character: index for index, character in enumerate(sorted(alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template="{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
