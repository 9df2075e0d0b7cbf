"""A run that pushes: at each checkpoint, at the end, and the model on its own."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

model_path, data, output = sys.argv[1:4]

trainer = SFTTrainer(
    model_path,
    SFTConfig(
        output,
        max_steps=4,
        save_steps=2,
        push_to_hub=True,
        hub_model_id="me/tiny-sft",
        hub_token="hf_secret",
        hub_strategy="checkpoint",
        hub_always_push=True,
        per_device_train_batch_size=2,
        report_to="none",
        bf16=False,
        use_cpu=True,
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
)
trainer.train()
info = trainer.push_to_hub(dataset_name="me/rows", tags=["tiny"])
print("id:", trainer.hub_model_id, "commit:", info.oid)
trainer.model.push_to_hub("me/alone")
trainer.end()
