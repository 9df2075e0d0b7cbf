"""One peer of ``trainer_step.py``, in a process of its own: ``trainer_step_peer.py JOB-AS-JSON RESULT-FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sft_step_peer import Clock, MLXMemory, TorchMemory, lora, losses, make_model, random_rows, settings


def main() -> None:
    """Run the job."""
    job, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    if job["peer"] == "make-model":
        make_model(job)
        output.write_text("[]", encoding="utf-8")
        return
    rows, tokens = map(int, job["shape"].split("x"))
    entry = {"peer": job["peer"], "shape": job["shape"], "tokens": rows * tokens * job["accumulate"]}
    output.write_text(json.dumps([entry | run(job, rows, tokens)]), encoding="utf-8")


def run(job: dict[str, Any], rows: int, tokens: int) -> dict[str, Any]:
    """The script that both trainers run."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainingArguments, default_data_collator

    if job["peer"] == "hf_mlx":
        from hf_mlx import MLXTrainer as Trainer

        clock = Clock(job, MLXMemory())
    else:
        from transformers import Trainer

        clock = Clock(job, TorchMemory())

    ids = random_rows(job, rows * job["accumulate"] * clock.last, tokens)
    args = TrainingArguments(**settings(job, rows, clock), logging_steps=clock.last)
    model: Any = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=getattr(torch, job["dtype"]))
    if job["rank"]:
        from peft import get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, lora(job))
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=default_data_collator,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[clock.callback()],
    )
    trainer.train()
    return clock.result() | {"losses": losses(trainer)}


if __name__ == "__main__":
    main()
