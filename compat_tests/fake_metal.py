"""A process in which MLX says that it computes on Metal, and lacks what Metal lacks. Run as a program, it trains.

The arrays are still computed on the CPU; what is asked of MLX is what a Mac would be asked.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

# mlx 0.32: evaluated on the CPU alone.
CPU_ONLY = (
    "cholesky", "cholesky_inv", "eig", "eigh", "eigvals", "eigvalsh", "inv", "lu", "lu_factor", "pinv", "qr", "solve",
    "solve_triangular", "svd", "tri_inv",
)  # fmt: skip
INFO = {
    "device_name": "Apple M2",
    "memory_size": 16 << 30,
    "max_recommended_working_set_size": 11 << 30,
    "max_buffer_length": 9 << 30,
    "resource_limit": 499_000,
}

# The allocator's limit of freed memory: as much as it may hold at all.
CACHE = INFO["max_recommended_working_set_size"] * 3 // 2


def pretend() -> dict[str, Any]:
    """Change ``mlx.core`` in this process; returns what is written down while it is used."""
    seen: dict[str, Any] = {"wired": [], "cached": [], "kernels": 0}
    core: Any = mx
    core.metal.is_available = lambda: True
    core.default_device = lambda: mx.Device(mx.gpu)
    core.device_info = lambda *which: dict(INFO)

    def wire(limit: int) -> int:
        seen["wired"].append(limit)
        return 0

    def cache(limit: int) -> int:
        seen["cached"].append(limit)
        return CACHE

    def kernel(**described: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen["kernels"] += 1
            raise RuntimeError(f"the Metal kernel {described.get('name')} has no gradient")

        return call

    core.set_wired_limit, core.set_cache_limit, core.fast.metal_kernel = wire, cache, kernel
    for name in CPU_ONLY:
        if hasattr(core.linalg, name):
            setattr(core.linalg, name, _lacking(name))
    # Metal has no fp64: whoever asks for it here gets an AttributeError.
    del core.float64
    return seen


def _lacking(name: str) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"[linalg::{name}] This op is not yet supported on the GPU.")

    return fail


def reach(seen: dict[str, Any]) -> None:
    """Make what is for the Linux CPU alone say that it was reached."""
    from hf_mlx.training import exponential, lanes

    seen["lanes"], seen["exponentials"] = 0, 0
    start, expand = lanes.LanedStep.__init__, exponential._expand

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        seen["lanes"] += 1
        start(self, *args, **kwargs)

    def expanded(x: mx.array) -> mx.array:
        seen["exponentials"] += 1
        return expand(x)

    lanes.LanedStep.__init__, exponential._expand = started, expanded


def import_everything() -> int:
    """Import each module of the library; how many there are."""
    import hf_mlx

    names = [found.name for found in pkgutil.walk_packages(hf_mlx.__path__, "hf_mlx.")]
    for name in names:
        importlib.import_module(name)
    return len(names)


def train(model: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Two steps of a run; its losses."""
    from datasets import Dataset
    from pairs import SILENT
    from peft import LoraConfig
    from trl import DPOConfig, SFTConfig

    from hf_mlx import MLXDPOTrainer, MLXSFTTrainer

    options, trainer, config, adapted = KINDS[kind]
    settings = {**SILENT, "use_cpu": False, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    args = {"sft": SFTConfig, "dpo": DPOConfig}[trainer](
        output_dir=str(folder), **{**settings, **config, "bf16": False}
    )
    # Set afterwards: on construction transformers asks this machine's torch, which has no MPS.
    args.bf16 = config.get("bf16", False)
    rows = [{"prompt": f"add {n}", "completion": f" is {n}"} for n in range(8)]
    if trainer == "dpo":
        rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in rows]
    peft_config = LoraConfig(r=2, target_modules="all-linear", **options) if adapted else None
    run = {"sft": MLXSFTTrainer, "dpo": MLXDPOTrainer}[trainer](
        str(model), args=args, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:2]),
        peft_config=peft_config,
    )  # fmt: skip
    run.train()
    run.evaluate()
    return {"losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry]}


# LoRA's options, the trainer, its settings, and whether there is an adapter.
KINDS: dict[str, tuple[dict[str, Any], str, dict[str, Any], bool]] = {
    "lora": ({}, "sft", {}, True),
    "pissa": ({"init_lora_weights": "pissa"}, "sft", {}, True),
    "dora, bf16": ({"use_dora": True}, "sft", {"bf16": True}, True),
    "packed": ({}, "sft", {"packing": True, "max_length": 32, "bf16": True}, True),
    "full": ({}, "sft", {"gradient_checkpointing": True, "optim": "adafactor"}, False),
    "pairs": ({}, "dpo", {}, True),
}


def main(model: str, *kinds: str) -> None:
    """Pretend, import, train; one line of JSON at the end."""
    seen = pretend()
    modules = import_everything()
    reach(seen)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            runs[kind] = train(Path(model), Path(folder, kind), kind)
    print(json.dumps({**seen, "modules": modules, "runs": runs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
