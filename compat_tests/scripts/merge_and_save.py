"""Style 5: an adapter trained, merged into its base and saved whole; the merged model answers."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model_path, data, output = sys.argv[1:4]

tokenizer = AutoTokenizer.from_pretrained(model_path)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
    args=SFTConfig(
        output_dir=output,
        num_train_epochs=2,
        max_length=24,
        packing=True,
        packing_strategy="wrapped",
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        weight_decay=0.01,
        report_to="none",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
trainer.save_state()
trainer.model.save_pretrained(f"{output}/adapter")

merged = trainer.model.merge_and_unload()
merged.save_pretrained(f"{output}/merged")
tokenizer.save_pretrained(f"{output}/merged")

inputs = tokenizer("What is 5 plus 5? ", return_tensors="pt")
again = AutoModelForCausalLM.from_pretrained(f"{output}/merged", dtype=torch.float32)
apart = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), f"{output}/adapter"
)
with torch.no_grad():
    difference = (again(**inputs).logits - apart(**inputs).logits).abs().max().item()
print("merged equals adapter:", difference < 1e-4)
print("generated:", again.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())
