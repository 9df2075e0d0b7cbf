"""The main job on real weights and rows: `make demo`, or `make demo MODEL=hub/id`.

A LoRA learns to turn a question and a function's signature into the call. Answers are shown before and after.
"""

import os
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer, export_adapter, verify_adapter
from hf_mlx.reports.picture import write_picture
from hf_mlx.reports.run import read_series
from hf_mlx.reports.terminal import draw_text, side_by_side

sys.path.append(str(Path(__file__).resolve().parents[1] / "compat_tests"))
import materials

OUTPUT, STEPS = Path(os.environ.get("OUTPUT", "demo-output")), int(os.environ.get("STEPS", "40"))
model = materials.reachable(sys.argv[1]) if len(sys.argv) > 1 else str(materials.smollm2())
rows = sorted(materials.function_calls(), key=lambda row: len(row["prompt"] + row["completion"]))[:136]
rows, unseen = [row for number, row in enumerate(rows) if number % 34], rows[::34]

trainer = MLXSFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(OUTPUT),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
    ),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)


def answer(prompt: str) -> str:
    inputs = trainer.processing_class(prompt, return_tensors="np")
    ids = trainer.model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return trainer.processing_class.decode(ids[0, inputs["input_ids"].shape[1] :], True).strip().split("\n")[0]


before = [answer(row["prompt"]) for row in unseen]
trainer.train()
after = [answer(row["prompt"]) for row in unseen]

losses = read_series(trainer.state.log_history)[:1]
print(f"\n{draw_text(losses)}\n\nAnswers to questions that were not trained on:\n")
print(side_by_side([(row["prompt"], *two) for row, *two in zip(unseen, before, after, strict=True)]))
right = [sum(map(str.__eq__, [row["completion"].strip() for row in unseen], found)) for found in (before, after)]
print(f"exactly the right call: {right[0]} of {len(unseen)} before, {right[1]} of {len(unseen)} after\n")
print(f"loss plot: {write_picture(losses, OUTPUT / 'loss.png')}\nevery curve: {OUTPUT / 'report.html'}")
export_adapter(trainer, OUTPUT / "adapter")
sys.exit(not verify_adapter(OUTPUT / "adapter", model).ok)
