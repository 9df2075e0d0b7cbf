"""SFTTrainer's keywords of 0.7, with packing."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

side, path, data, output = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(path)
dataset = load_dataset("json", data_files=data, split="train")
dataset = dataset.map(lambda row: {"body": row["prompt"] + row["completion"]}, remove_columns=dataset.column_names)
shared = {"train_dataset": dataset, "peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")}
if side == "reference":
    arguments = settings(output, dataset_text_field="body", max_length=32, packing=True)
    trainer = SFTTrainer(model, arguments, processing_class=tokenizer, **shared)
else:
    trainer = SFTTrainer(
        model=model,
        args=TrainingArguments(output, evaluation_strategy="no", save_safetensors=True, **QUIET, **STEPS),
        tokenizer=tokenizer,
        dataset_text_field="body",
        max_seq_length=32,
        packing=True,
        infinite=False,
        num_of_sequences=1024,
        chars_per_token=3.6,
        dataset_batch_size=1000,
        neftune_noise_alpha=None,
        dataset_kwargs={"add_special_tokens": False, "append_concat_token": False},
        **shared,
    )
trainer.train()
record(trainer, output)
