"""Take an adapter that was trained on MLX to torch: CUDA where there is a GPU. hf_mlx is not needed there.

    python examples/adapter_to_cuda.py

MODEL (the base: a hub id or a folder), ADAPTER (what save_model or export_adapter wrote) and OUTPUT (the merged
model) can be set in the environment.
"""

import os

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
ADAPTER = os.environ.get("ADAPTER", "trainer_output/sft_lora")
OUTPUT = os.environ.get("OUTPUT", "trainer_output/merged")

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
model = PeftModel.from_pretrained(base, ADAPTER).to(device).eval()

inputs = tokenizer("The capital of France is", return_tensors="pt").to(device)
generated = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(generated[0], skip_special_tokens=True))

model.merge_and_unload().save_pretrained(OUTPUT)
tokenizer.save_pretrained(OUTPUT)
print(f"merged model: {OUTPUT}")
