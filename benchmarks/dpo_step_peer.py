"""One peer of ``dpo_step.py``, in a process of its own: ``dpo_step_peer.py JOB-AS-JSON RESULT-FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sft_step_peer import (
    Clock,
    MLXMemory,
    TorchMemory,
    lora,
    losses,
    make_model,
    named_dtype,
    random_rows,
    settings,
)


def main() -> None:
    """Run the job."""
    job, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    if job["peer"] == "make-model":
        make_model(job)
        make_tokenizer(job)
        output.write_text("[]", encoding="utf-8")
        return
    pairs, tokens = map(int, job["shape"].split("x"))
    measured = run(job, pairs, tokens)
    entry = {"peer": job["peer"], "shape": job["shape"], "share": job["share"], "checkpointing": job["on"]}
    output.write_text(json.dumps([{**entry, "pairs": pairs * job["accumulate"], **measured}]), encoding="utf-8")


def make_tokenizer(job: dict[str, Any]) -> None:
    """Write a tokenizer of words between spaces, none of which is a part of another, into the job's folder."""
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word(i): i for i in range(job["model"][-1])}, unk_token=word(3)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {name: word(i) for i, name in enumerate(("bos_token", "eos_token", "pad_token", "unk_token"))}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(job["folder"])


def word(number: int) -> str:
    """The word with this id."""
    return f"v{number}v"


def make_rows(job: dict[str, Any], count: int, tokens: int) -> list[dict[str, str]]:
    """Prompts and answers of exactly so many tokens."""
    # The last token of a prompt predicts the first of its answers, and is computed with them.
    prompt = min(max(round(job["share"] * tokens), 1) + 1, tokens - 2)
    words = [[word(number) for number in row] for row in random_rows(job, 2 * count, tokens - 1)]
    rows = []
    for chosen, rejected in zip(words[::2], words[1::2], strict=True):
        # Closed by the end of a text already, so that none is appended.
        answers = {
            name: f" {' '.join(row[prompt:])} {word(1)}" for name, row in (("chosen", chosen), ("rejected", rejected))
        }
        rows.append({"prompt": " ".join(chosen[:prompt]), **answers})
    return rows


def run(job: dict[str, Any], pairs: int, tokens: int) -> dict[str, Any]:
    """The script that both trainers run."""
    from datasets import Dataset
    from trl import DPOConfig

    if job["peer"] == "trl":
        from trl import DPOTrainer as Trainer

        clock = Clock(job, TorchMemory())
    else:
        from hf_mlx import MLXDPOTrainer as Trainer

        clock = Clock(job, MLXMemory())

    args = DPOConfig(
        **settings(job, pairs, clock),
        max_length=tokens,
        learning_rate=1e-4,
        logging_steps=clock.last,
        precompute_ref_log_probs=job["reference"] == "precomputed",
        model_init_kwargs=named_dtype(job),
    )
    rows = Dataset.from_list(make_rows(job, pairs * job["accumulate"] * clock.last, tokens))
    callbacks = [clock.callback()]
    trainer = Trainer(job["folder"], args=args, train_dataset=rows, peft_config=lora(job), callbacks=callbacks)
    if job["peer"] == "hf_mlx, prompts twice":
        trainer.data.share_rows = False
    trainer.train()
    return clock.result() | {"losses": losses(trainer)}


if __name__ == "__main__":
    main()
