"""Gated-delta and state-space models, one LoRA step on growing rows: hf_mlx beside trl.SFTTrainer.

Models are small, of random weights, with a tokenizer made here: nothing is downloaded. Every peer and length runs in a
process of its own. ``peak`` is MLX's (``mx.get_peak_memory``) without and with what was there before the first step;
where trl runs on CUDA its peak is torch's.

    python benchmarks/gated_delta.py                                        # qwen3_5 at 512, 1024, 2048 tokens
    python benchmarks/gated_delta.py --types qwen3_5_text mamba2 --tokens 1024 --rows 8 --hidden 1024
    python benchmarks/gated_delta.py --before ../older                      # another version of this package beside
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft_step import run_peer, versions
from sft_step_peer import Clock, MLXMemory, TorchMemory, losses, make_trainer

# model type → what its configuration needs beside the common sizes, by hidden size.
TYPES: dict[str, Any] = {
    "qwen3_5_text": lambda hidden: {
        "head_dim": 64, "linear_num_key_heads": hidden // 128, "linear_num_value_heads": hidden // 64,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "tie_word_embeddings": False,
    },
    "olmo_hybrid": lambda hidden: {
        "linear_num_key_heads": hidden // 64, "linear_num_value_heads": hidden // 64,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    "kimi_linear": lambda hidden: {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_heads": hidden // 64,
        "linear_head_dim": 64, "num_key_value_heads": hidden // 64, "q_lora_rank": None, "kv_lora_rank": 64,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "num_experts": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": hidden, "first_k_dense_replace": 4,
    },
    "mamba": lambda hidden: {},
    "mamba2": lambda hidden: {"num_heads": hidden // 32, "head_dim": 64, "state_size": 64, "n_groups": 2},
}  # fmt: skip
TARGETS = {
    "kimi_linear": ["o_proj"],
    "mamba": ["out_proj", "dt_proj"],
    "mamba2": ["out_proj"],
}
VOCABULARY = 2048


def main() -> None:
    """Run every type, length and peer and print the table."""
    options = parse()
    results: list[dict[str, Any]] = []
    for model_type in options.types:
        with tempfile.TemporaryDirectory() as folder:
            job = vars(options) | {"folder": folder, "type": model_type, "on": False, "accumulate": 1, "clip": 1.0}
            job |= {"model": [VOCABULARY], "targets": TARGETS.get(model_type, "all-linear"), "rank": 8}
            run_peer({**job, "peer": "make-model"}, folder, Path(__file__))
            for tokens in options.tokens:
                for peer in options.peers + ["before"] * bool(options.before):
                    paths = [options.before] * (peer == "before") + [os.environ.get("PYTHONPATH", "")]
                    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
                    results += run_peer({**job, "peer": peer, "length": tokens}, folder, Path(__file__), **variables)
    print(table(results))
    if options.json:
        report = {"versions": versions(), "options": vars(options), "results": results}
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["qwen3_5_text"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--rows", type=int, default=1, help="rows of a batch")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "autocast", "bfloat16"), default="float32")
    parser.add_argument("--peers", nargs="+", choices=("hf_mlx", "trl"), default=["hf_mlx", "trl"])
    parser.add_argument("--before", metavar="FOLDER", help="a checkout of this package to measure beside")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def table(results: list[dict[str, Any]]) -> str:
    """A row for each type and length: median seconds, their ratio, MLX's peak."""
    lines = ["type            tokens     ours      trl   ratio   peak MiB   of the step"]
    by_case: dict[tuple[str, int], dict[str, Any]] = {}
    for result in results:
        by_case.setdefault((result["type"], result["tokens"]), {})[result["peer"]] = result
    for (model_type, tokens), peers in by_case.items():
        theirs = statistics.median(peers["trl"]["each"]) if "trl" in peers else None
        for name in ("hf_mlx", "before"):
            if name not in peers:
                continue
            ours, held = statistics.median(peers[name]["each"]), peers[name]
            shown = f"{theirs:8.3f} {ours / theirs:6.2f}x" if theirs else f"{'':8} {'':7}"
            peaks = f"{held['mlx_peak'] / 2**20:10.1f} {(held['mlx_peak'] - held['mlx_before']) / 2**20:12.1f}"
            lines.append(f"{model_type:15} {tokens:6} {ours:8.3f} {shown} {peaks}" + "  (before)" * (name == "before"))
    return "\n".join(lines)


def work(job: dict[str, Any], output: Path) -> None:
    """One peer, in a process of its own."""
    if job["peer"] == "make-model":
        make_model(job)
        output.write_text("[]", encoding="utf-8")
        return
    result = (run_trl if job["peer"] == "trl" else run_hf_mlx)(job)
    entry = {"type": job["type"], "tokens": job["length"], "peer": job["peer"], **result}
    output.write_text(json.dumps([entry]), encoding="utf-8")


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """trl.SFTTrainer."""
    from trl import SFTTrainer

    clock = Clock(job, TorchMemory())
    trainer = make_trainer(SFTTrainer, job, job["rows"], job["length"], clock)
    trainer.train()
    return clock.result() | {"losses": losses(trainer)}


def run_hf_mlx(job: dict[str, Any]) -> dict[str, Any]:
    """MLXSFTTrainer, with MLX's own count of memory."""
    # Before mlx: on a Linux CPU it loads the BLAS that mlx then finds.
    from hf_mlx import MLXSFTTrainer  # isort: skip
    import mlx.core as mx

    clock = Clock(job, MLXMemory())
    trainer = make_trainer(MLXSFTTrainer, job, job["rows"], job["length"], clock)
    before = mx.get_active_memory()
    trainer.train()
    return clock.result() | {"losses": losses(trainer), "mlx_peak": mx.get_peak_memory(), "mlx_before": before}


def make_model(job: dict[str, Any]) -> None:
    """Write four layers of random weights, with a tokenizer, into the job's folder."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    hidden = job["hidden"]
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": (2 if job["type"] == "mamba" else 3) * hidden,
        "num_hidden_layers": 4,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16384,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[job["type"]](**sizes | TYPES[job["type"]](hidden)))
    model.to(torch.bfloat16 if job["dtype"] == "bfloat16" else torch.float32).save_pretrained(job["folder"])
    words = {f"w{i}": i for i in range(VOCABULARY)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        bos_token="w0",
        eos_token="w1",
        pad_token="w2",
        unk_token="w3",
    ).save_pretrained(job["folder"])


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith("{"):
        work(json.loads(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
