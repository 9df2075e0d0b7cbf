"""Full fine-tuning: no peft_config, every weight trains, and a Hugging Face folder comes out.

    python examples/sft_full.py

MODEL (a hub id or a folder), DATA (a dataset on the hub or a .jsonl file) and OUTPUT can be set in the environment.
"""

import os

from datasets import load_dataset
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M")
DATA = os.environ.get("DATA", "trl-lib/Capybara")
OUTPUT = os.environ.get("OUTPUT", "trainer_output/sft_full")

if DATA.endswith(".jsonl"):
    dataset = load_dataset("json", data_files=DATA, split="train")
else:
    dataset = load_dataset(DATA, split="train")
parts = dataset.train_test_split(test_size=0.1, seed=0)

trainer = MLXSFTTrainer(
    model=MODEL,
    args=SFTConfig(
        output_dir=OUTPUT,
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=2e-5,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="no",
        max_length=512,
        bf16=False,
    ),
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
)
trainer.train()
trainer.save_model(OUTPUT)
print(f"model for transformers: {OUTPUT}")
