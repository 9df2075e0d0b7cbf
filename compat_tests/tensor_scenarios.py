"""What processes that hold one model together are asked beside plain runs; one process plays most of it too."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensor_cases import build, case, untimed

SAVED = case(
    max_steps=6, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, lora={"lora_dropout": 0.1}
)
#: Weights dominate: 13 M of them, and rows of a few tokens.
LARGE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}


def resumed(models: Path, out: str) -> dict[str, Any]:
    """A run, and the same run again from its fourth step on."""
    whole = build(SAVED, models, out)
    whole.train()
    whole.save_model(f"{out}-adapter")
    shown = whole.model.get_nb_trainable_parameters()
    files = sorted(path.name for path in Path(out, "checkpoint-4").iterdir())
    again = build(SAVED, models, out)
    again.train(resume_from_checkpoint=str(Path(out, "checkpoint-4")))
    again.save_model(f"{out}-again")
    return {
        "whole": untimed(whole.state.log_history),
        "again": untimed(again.state.log_history),
        "files": files,
        "shown": [*shown, whole.get_num_trainable_parameters()],
        "flos": whole.state.total_flos,
    }


def taken_over(models: Path, out: str) -> dict[str, Any]:
    """A run from the fourth step of another's folder on."""
    trainer = build(SAVED, models, out)
    trainer.train(resume_from_checkpoint=str(Path(f"{out}-from", "checkpoint-4")))
    trainer.save_model(f"{out}-adapter")
    return {"log": untimed(trainer.state.log_history)}


def objects(models: Path, out: str) -> dict[str, Any]:
    """What HF's objects say."""
    import torch
    from datasets import Dataset
    from rank_cases import token_rows

    from hf_mlx import export_adapter

    trainer = build(case(max_steps=1), models, out)
    trainer.train()
    predicted = trainer.predict(Dataset.from_list(token_rows(3, 7)))
    generated = trainer.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
    # Scripts export and save on every rank.
    export_adapter(trainer, f"{out}-exported")
    trainer.model.save_pretrained(f"{out}-saved")
    return {
        "predicted": [float(row[row != -100].sum()) for row in predicted.predictions],
        "magnitudes": [float(abs(row[row != -100]).sum()) for row in predicted.predictions],
        "generated": generated.tolist(),
        "args": [trainer.args.world_size, trainer.args.process_index],
        "sizes": [trainer.get_tp_size(), trainer.get_total_train_batch_size(trainer.args)],
        "accelerator": [trainer.accelerator.num_processes, trainer.accelerator.process_index],
        "zero": trainer.is_world_process_zero(),
    }


def interrupted(models: Path, out: str) -> dict[str, Any]:
    """Ctrl-C on the last rank in the second step."""
    import os
    import signal

    from transformers import TrainerCallback

    from hf_mlx.processes.world import the_world

    class Press(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1 and the_world().rank == the_world().size - 1:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = build(SAVED | {"settings": SAVED["settings"] | {"save_steps": 100}}, models, out, callbacks=[Press()])
    try:
        trainer.train()
    except KeyboardInterrupt:
        return {"step": trainer.state.global_step, "saved": sorted(p.name for p in Path(out).glob("checkpoint-*"))}
    return {}


def raising(models: Path, out: str) -> dict[str, Any]:
    """A callback of the last rank raises in the second step."""
    from transformers import TrainerCallback

    from hf_mlx.processes.world import the_world

    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and the_world().rank == the_world().size - 1:
                raise ValueError("the disk of the last rank is full")

    build(case(max_steps=6), models, out, callbacks=[Fail()]).train()
    return {}


def unlike(models: Path, out: str) -> dict[str, Any]:
    """The last rank has other rows."""
    from datasets import Dataset
    from rank_cases import token_rows

    from hf_mlx.errors import HFMLXError
    from hf_mlx.processes.world import the_world

    rows = Dataset.from_list(token_rows(8, 5 + the_world().rank))
    try:
        build(case(max_steps=2), models, out, train_dataset=rows).train()
    except HFMLXError as error:
        return {"said": str(error)}
    return {}


def refused(models: Path, out: str) -> dict[str, Any]:
    """What is refused, by what it is."""
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig

    from hf_mlx import MLXDPOTrainer
    from hf_mlx.errors import HFMLXError

    copied = AutoModelForCausalLM.from_pretrained(models / "llama")
    asked: dict[str, Callable[[], Any]] = {
        "a type without it": lambda: build(case("phi"), models, out),
        "three heads": lambda: build(case("odd"), models, out),
        "all weights": lambda: build(case(), models, out, peft_config=None),
        "use_dora": lambda: build(case(lora={"use_dora": True}), models, out),
        "bias": lambda: build(case(lora={"bias": "lora_only"}), models, out),
        "lora_bias": lambda: build(case(lora={"lora_bias": True}), models, out),
        "modules_to_save": lambda: build(case(lora={"modules_to_save": ["lm_head"]}), models, out),
        "trainable_token_indices": lambda: build(case(lora={"trainable_token_indices": [3]}), models, out),
        "pissa": lambda: build(case(lora={"init_lora_weights": "pissa"}), models, out),
        "adafactor": lambda: build(case(optim="adafactor"), models, out),
        "a model object": lambda: build(case(), models, out, model=copied),
        "auto_find_batch_size": lambda: build(case(auto_find_batch_size=True), models, out),
        "dpo": lambda: MLXDPOTrainer(
            str(models / "llama"), args=DPOConfig(out, use_cpu=True, bf16=False), train_dataset=[]
        ),
        "sampling": lambda: build(case(), models, out).model.generate([[5, 6]], max_new_tokens=2, do_sample=True),
        "merge_and_unload": lambda: build(case(), models, out).model.merge_and_unload(),
        "balanced experts": lambda: build(case("balanced"), models, out),
    }
    said = {}
    for name, ask in asked.items():
        try:
            ask()
            said[name] = ["nothing", ""]
        except HFMLXError as error:
            said[name] = [type(error).__name__, str(error)]
    return said


def peak(models: Path, out: str) -> dict[str, Any]:
    """The most memory that a run of a model held whose weights dominate."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    trainer = build(case("large", max_steps=2, per_device_train_batch_size=1), models, out)
    trainer.train()
    from hf_mlx.surface.estimate import describe_run, estimate_memory

    made = {"peak": mx.get_peak_memory() - before, "estimate": estimate_memory(trainer).total}
    return made | {"described": describe_run(trainer), "log": untimed(trainer.state.log_history)}


SCENARIOS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "peak": peak,
    "objects": objects,
    "resumed": resumed,
    "taken_over": taken_over,
    "interrupted": interrupted,
    "unlike": unlike,
    "raising": raising,
    "refused": refused,
}


def perform(name: str, models: Path, out: str) -> dict[str, Any]:
    """What a scenario says, as JSON has it."""
    return json.loads(json.dumps(SCENARIOS[name](models, out)))
