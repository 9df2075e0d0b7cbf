"""The model and the rows of the self-test, the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS = 128, 64, 96, 2, 2, 1
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# Two micro-batches a step, rows of several lengths, a clip that is reached, a rate that changes.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "seed": 11,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
}


def write_model(folder: Path) -> Path:
    """A two-layer Llama in fp32 with its tokenizer; numbers from numpy's MT19937, which never change."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    return folder


def rows(count: int = 24) -> list[list[int]]:
    """Token ids that follow a rule, so that training learns something; 6 to 40 a row."""
    random = np.random.RandomState(5)
    made = []
    for _ in range(count):
        start, step, length = random.randint(3, VOCABULARY), random.randint(1, 4), random.randint(6, 41)
        made.append([int(3 + (start + step * i) % (VOCABULARY - 3)) for i in range(length)])
    return made


def pairs(count: int = 24) -> list[dict[str, str]]:
    """Prompts with two answers each, in the tokenizer's words."""
    texts = [" ".join(f"t{token}" for token in row) for row in rows(3 * count)]
    prompts, chosen, rejected = texts[:count], texts[count : 2 * count], texts[2 * count :]
    return [
        {"prompt": prompt, "chosen": f" {good}", "rejected": f" {bad}"}
        for prompt, good, bad in zip(prompts, chosen, rejected, strict=True)
    ]


def _weights() -> dict[str, np.ndarray]:
    keys = HIDDEN // HEADS * KEY_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        block = f"model.layers.{i}"
        shapes |= {
            f"{block}.input_layernorm.weight": (HIDDEN,),
            f"{block}.post_attention_layernorm.weight": (HIDDEN,),
            f"{block}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{block}.self_attn.k_proj.weight": (keys, HIDDEN),
            f"{block}.self_attn.v_proj.weight": (keys, HIDDEN),
            f"{block}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{block}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{block}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{block}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    random = np.random.RandomState(0)
    return {
        name: (random.standard_normal(shape) * 0.15 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
