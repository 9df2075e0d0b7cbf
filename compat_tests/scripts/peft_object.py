"""Style 1 (292 of 374): a model object, get_peft_model before the trainer, generate afterwards."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model_path, data, output = sys.argv[1:4]

torch.manual_seed(7)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, device_map="cpu")
tokenizer = AutoTokenizer.from_pretrained(model_path)
config = LoraConfig(
    r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_dropout=0.0, task_type="CAUSAL_LM"
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=output,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=8,
        learning_rate=1e-3,
        warmup_steps=2,
        logging_steps=1,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        seed=3407,
        report_to="none",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    processing_class=tokenizer,
)
stats = trainer.train()
trainer.log_metrics("train", stats.metrics)
trainer.save_metrics("train", stats.metrics)
trainer.save_state()

model.eval()
inputs = tokenizer("What is 3 plus 3? ", return_tensors="pt").to(model.device)
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print("generated:", ids[0].tolist())
model.save_pretrained(f"{output}/adapter")
tokenizer.save_pretrained(f"{output}/adapter")
