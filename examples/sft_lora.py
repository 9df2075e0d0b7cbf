"""LoRA on a chat dataset: a plain TRL script whose trainer class is the only thing that changed.

    python examples/sft_lora.py

MODEL (a hub id or a folder), DATA (a dataset on the hub or a .jsonl file) and OUTPUT can be set in the environment.
"""

import os

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
DATA = os.environ.get("DATA", "trl-lib/Capybara")
OUTPUT = os.environ.get("OUTPUT", "trainer_output/sft_lora")

if DATA.endswith(".jsonl"):
    dataset = load_dataset("json", data_files=DATA, split="train")
else:
    dataset = load_dataset(DATA, split="train")

trainer = MLXSFTTrainer(
    model=MODEL,
    args=SFTConfig(
        output_dir=OUTPUT,
        max_steps=20,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=1,
        max_length=512,
        bf16=False,
        activation_checkpointing=False,
    ),
    train_dataset=dataset,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(OUTPUT)
print(f"adapter for PEFT: {OUTPUT}")
