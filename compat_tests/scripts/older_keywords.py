"""Style 4b: the keywords of older libraries (235 notebooks pass tokenizer=), which today's TRL no longer takes.

The last argument "today" writes the same run in today's names, for comparison.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig, SFTTrainer

model_path, data, output, age = sys.argv[1:5]

tokenizer = AutoTokenizer.from_pretrained(model_path)
model = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(model_path, dtype="float32"))
dataset = load_dataset("json", data_files=data, split="train")
dataset = dataset.map(lambda row: {"document": row["prompt"] + row["completion"]}, remove_columns=dataset.column_names)
shared = dict(
    output_dir=output, max_steps=6, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-3, use_cpu=True,
    report_to="none", save_strategy="no", seed=1,
)  # fmt: skip
adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

if age == "today":
    arguments = SFTConfig(
        **shared, bf16=False, warmup_steps=0.5, eval_strategy="no", max_length=12, dataset_text_field="document"
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter
    )
else:
    arguments = TrainingArguments(**shared, warmup_ratio=0.5, evaluation_strategy="no", overwrite_output_dir=True)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        tokenizer=tokenizer,
        max_seq_length=12,
        dataset_text_field="document",
        packing=False,
        peft_config=adapter,
    )
trainer.train()
trainer.save_state()
