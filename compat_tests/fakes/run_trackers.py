"""Trains with trl's trainer and ours; run with a model folder, settings as JSON and a file for the calls."""

import json
import sys
from pathlib import Path

import recording
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

model, asked, target = sys.argv[1:]
asked = json.loads(asked)
rows = [{"text": "what the model learns " * (1 + i % 4)} for i in range(12)]
calls = {}
for kind in ("trl", "mlx"):
    if kind == "mlx":
        from hf_mlx import MLXSFTTrainer as SFTTrainer
    recording.CALLS.clear()
    args = SFTConfig(
        "out", max_steps=4, per_device_train_batch_size=2, logging_steps=1, save_steps=2, eval_strategy="steps",
        eval_steps=2, learning_rate=1e-3, use_cpu=True, bf16=False, disable_tqdm=True, run_name="first",
        report_to=asked["report_to"], max_length=16, trackio_space_id="me/space",
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model) if asked["object"] else model,
        args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:3]),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if asked["lora"] else None,
    )
    trainer.train()
    trainer.create_model_card("mine")
    calls[kind] = {"calls": list(recording.CALLS), "card": Path("out/README.md").read_text()}
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    Path("out").rename(f"out-{kind}")
Path(target).write_text(json.dumps(calls))
