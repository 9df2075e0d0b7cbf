"""ModelConfig with its older fields, get_peft_config from trl.trainer.utils."""

import sys

import torch
from datasets import load_dataset
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer
from trl.trainer.utils import get_peft_config

side, path, data, output = sys.argv[1:5]
shared = {"model_name_or_path": path, "use_peft": True, "lora_r": 4, "lora_dropout": 0.0}
if side == "reference":
    config, arguments = ModelConfig(dtype="float32", **shared), settings(output, max_length=32)
else:
    config = ModelConfig(
        torch_dtype="float32", trust_remote_code=False, attn_implementation="flash_attention_2", **shared
    )
    arguments = SFTConfig(output, bf16=False, evaluation_strategy="no", max_seq_length=32, **QUIET, **STEPS)
dtype = config.dtype if side == "reference" else config.torch_dtype
model = AutoModelForCausalLM.from_pretrained(
    config.model_name_or_path,
    dtype=dtype if dtype in ("auto", None) else getattr(torch, dtype),
    attn_implementation=config.attn_implementation,
)
trainer = SFTTrainer(
    model,
    arguments,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(path),
    peft_config=get_peft_config(config),
)
trainer.train()
record(trainer, output)
