"""Style 4: plain TrainingArguments, full fine-tuning of a model object, a formatting function."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

model_path, data, output = sys.argv[1:4]

tokenizer = AutoTokenizer.from_pretrained(model_path)
tokenizer.pad_token = tokenizer.eos_token
tokenizer.padding_side = "right"
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
model.config.use_cache = False
dataset = load_dataset("json", data_files=data, split="train")
dataset = dataset.rename_columns({"prompt": "question", "completion": "answer"})


def format_row(row):
    return f"### Question: {row['question']}\n### Answer: {row['answer']}"


trainer = SFTTrainer(
    model=model,
    train_dataset=dataset,
    args=TrainingArguments(
        output_dir=output,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        optim="adamw_torch_fused",
        logging_steps=1,
        learning_rate=2e-4,
        max_grad_norm=0.3,
        warmup_steps=0.25,
        lr_scheduler_type="constant_with_warmup",
        save_strategy="no",
        use_cpu=True,
        report_to="none",
    ),
    processing_class=tokenizer,
    formatting_func=format_row,
)
result = trainer.train()
print("train_loss:", round(result.metrics["train_loss"], 4))
trainer.save_state()
trainer.model.save_pretrained(f"{output}/model")
