"""The same curve on a GPU: MLX's CUDA backend beside torch and TRL, one script, one checkpoint, the same rows.

A Llama of about a billion parameters is made at random, or ``--model`` names the folder of a real one. Both trainers
fine-tune it with LoRA in each precision, and both run from the same ``SFTConfig`` and ``LoraConfig``. PEFT then loads
the adapter that MLX trained, its logits are compared with MLX's, and TRL goes on training it.

    python benchmarks/parity_gpu.py --write docs/parity.md     # one CUDA GPU with 40 GiB, 4 minutes
    python benchmarks/parity_gpu.py --size tiny                # the same on any machine, in a minute
    python benchmarks/parity_gpu.py --model FOLDER --part smollm2 --write docs/parity.md

A random model learns a random chain of words. A real one reads text: the ``text`` of each line of ``--rows FILE``, or
else the source of Python's own library. ``--write`` replaces the part of the page between the two markers of that name,
which is the size unless ``--part`` says otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

# hidden, mlp, layers, heads, key-value heads, vocabulary
SIZES = {
    "1b": (2048, 8192, 16, 32, 8, 32000),
    "tiny": (64, 128, 2, 4, 2, 1000),
}
# Shown as -> dtype of the weights, bf16=
PRECISIONS = {
    "fp32": ("float32", False),
    "bf16 autocast over fp32": ("float32", True),
    "bf16": ("bfloat16", True),
}
SHOWN = (1, 2, 3, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50)
MARKERS = "<!-- parity_gpu {}: begin -->\n", "<!-- parity_gpu {}: end -->\n"
COMPARED_TOKENS = 64
MAX_LENGTH = 256
# A real text is divided into what is trained on, evaluated on and compared; each part holds the rows of 50 steps.
PARTS, PART_TOKENS = 3, 100_000


def main() -> None:
    """Run both libraries, print the tables and, where asked for, write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1b", help="tiny is for a CPU")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint, instead of random weights")
    parser.add_argument("--rows", type=Path, help="JSON lines with a text each, for --model")
    parser.add_argument("--part", help="name of the markers in the page; the size unless given")
    parser.add_argument("--cpu", action="store_true", help="run on a machine without a CUDA GPU, however long it takes")
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch; two make a step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--write", type=Path, help="page to put the tables into")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    if options.size != "tiny" and not options.cpu and not _has_cuda():
        print("a CUDA GPU is needed; --size tiny runs the same comparison on this machine, --cpu this one")
        return
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "folder": folder,
            "steps": options.steps,
            "batch": options.batch,
            "size": options.size,
            "model": str(options.model or Path(folder, "base")),
            "precisions": options.precisions,
        }
        if options.model is not None:
            tokenize(options.model, options.rows, folder)
        elif _start({**job, "task": "model"}).wait():
            sys.exit("no model was made; see above")
        # All at a time: numbers do not depend on who else computes.
        tasks = {task: _start({**job, "task": task}) for task in ("mlx", "trl", "load")}
        if tasks["mlx"].wait() or tasks["trl"].wait():
            tasks["load"].kill()
            sys.exit("a run failed; see above")
        if tasks["load"].wait():
            sys.exit("loading the adapters failed; see above")
        results = {task: json.loads(Path(folder, f"{task}.json").read_text()) for task in tasks}
    page = report(results, options)
    print(page)
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        begin, end = (marker.format(options.part or options.size) for marker in MARKERS)
        if begin not in text or end not in text:
            sys.exit(f"{options.write} has no place for it: add the lines {begin!r} and {end!r}")
        before, after = text.split(begin)[0], text.split(end)[1]
        options.write.write_text(before + begin + page + end + after, encoding="utf-8")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _start(job: dict[str, Any]) -> subprocess.Popen:
    # By default MLX multiplies fp32 matrices in TF32 on CUDA; torch does not.
    environment = {**os.environ, "MLX_ENABLE_TF32": "0", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen([sys.executable, __file__, "--worker", json.dumps(job)], env=environment)


def work(job: dict[str, Any]) -> None:
    """One process: make the model, train it with one of the libraries, or load what MLX trained."""
    task = {"model": make_model, "trl": train_all, "mlx": train_all, "load": load_all}[job["task"]]
    result = task(job)
    Path(job["folder"], f"{job['task']}.json").write_text(json.dumps(result))


def make_model(job: dict[str, Any]) -> None:
    """A Llama with random weights, norms included, in fp32, with a tokenizer of that many words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, mlp, layers, heads, kv_heads, vocabulary = SIZES[job["size"]]
    words = {f"<{number}>": number for number in range(vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), pad_token="<0>", eos_token="<1>"
    )
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        rope_theta=50000.0,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(job["model"])
    tokenizer.save_pretrained(job["model"])


def tokenize(model: Path, file: Path | None, folder: str) -> None:
    """Leave the token ids of a real text in ``folder``: the lines of ``file``, or Python's own library."""
    import numpy as np
    from transformers import AutoTokenizer

    if file is None:
        library = Path(sysconfig.get_path("stdlib"))
        texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))]
    else:
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) > PARTS * PART_TOKENS:
            break
    if len(ids) < PARTS * MAX_LENGTH * 16:
        sys.exit(f"{file} holds {len(ids)} tokens; {PARTS * MAX_LENGTH * 16} are needed")
    np.save(Path(folder, "ids.npy"), np.asarray(ids, np.int32))


def rows(job: dict[str, Any], count: int, seed: int) -> list[dict[str, list[int]]]:
    """Token ids in rows of uneven length, all in one bucket of 32; ``seed`` counts from 1 and gives other rows.

    A real text is cut into rows, each seed a part of its own, read again from its start where it is too short. Else
    there is a chain to learn: each word has four successors.
    """
    import numpy as np

    draw = random.Random(seed)
    if Path(job["folder"], "ids.npy").exists():
        lengths = [draw.randint(MAX_LENGTH - 30, MAX_LENGTH) for _ in range(count)]
        part = np.array_split(np.load(Path(job["folder"], "ids.npy")), PARTS)[seed - 1].tolist()
        part *= -(-sum(lengths) // len(part))
        ends = list(itertools.accumulate(lengths))
        return [{"input_ids": part[end - length : end]} for end, length in zip(ends, lengths, strict=True)]
    chain = random.Random(0)
    words = SIZES[job["size"]][-1]
    alphabet = chain.sample(range(2, words), 200)
    follow = {word: chain.sample(alphabet, 4) for word in alphabet}
    made = []
    for _ in range(count):
        ids = [draw.choice(alphabet)]
        length = draw.randint(MAX_LENGTH - 30, MAX_LENGTH)
        while len(ids) < length:
            ids.append(draw.choice(follow[ids[-1]]))
        made.append({"input_ids": ids})
    return made


def settings(job: dict[str, Any], precision: str, **changed: Any) -> Any:
    """The one ``SFTConfig`` of both libraries."""
    from trl import SFTConfig

    dtype, autocast = PRECISIONS[precision]
    return SFTConfig(
        str(Path(job["folder"], "out")),
        **{
            "model_init_kwargs": {"dtype": dtype},
            "bf16": autocast,
            "use_cpu": not _has_cuda(),
            "per_device_train_batch_size": job["batch"],
            "gradient_accumulation_steps": 2,
            "max_steps": job["steps"],
            "learning_rate": 5e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 5,
            "weight_decay": 0.01,
            "logging_steps": 1,
            "max_length": MAX_LENGTH,
            "gradient_checkpointing": False,
            "seed": 7,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **changed,
        },
    )


def train_all(job: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradient norms by precision; MLX also leaves its adapters and their logits."""
    import numpy as np
    from datasets import Dataset
    from peft import LoraConfig

    if job["task"] == "mlx":
        from hf_mlx import MLXSFTTrainer as Trainer
    else:
        from trl import SFTTrainer as Trainer
    result = {}
    for precision in job["precisions"]:
        trainer = Trainer(
            job["model"],
            settings(job, precision),
            train_dataset=Dataset.from_list(rows(job, 300, seed=1)),
            eval_dataset=Dataset.from_list(rows(job, 16, seed=2)),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        result[precision] = {key: [entry[key] for entry in logged] for key in ("loss", "grad_norm")}
        result[precision]["eval_loss"] = trainer.evaluate()["eval_loss"]
        if job["task"] == "mlx":
            print(f"{precision}: {trainer.session.describe_shapes()}", file=sys.stderr)
            folder = Path(job["folder"], precision.replace(" ", "-"))
            trainer.save_model(str(folder))
            logits = np.asarray(trainer.model(_probe(job)).logits, np.float32)
            np.save(folder / "partial.npy", logits)
            (folder / "partial.npy").rename(folder / "logits.npy")
        del trainer
        _free(job["task"])
    return result


def load_all(job: dict[str, Any]) -> dict[str, Any]:
    """What PEFT makes of MLX's adapters as they appear: logits beside MLX's, and ten more steps by TRL."""
    import numpy as np
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import SFTTrainer

    result = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for precision in job["precisions"]:
        dtype, autocast = PRECISIONS[precision]
        folder = Path(job["folder"], precision.replace(" ", "-"))
        while not (folder / "logits.npy").exists():
            time.sleep(0.5)
        base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, dtype)).to(device)
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        model.eval()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
            theirs = model(torch.tensor(_probe(job), device=device)).logits.float().cpu().numpy()
        ours = np.load(folder / "logits.npy")
        trainer = SFTTrainer(
            model,
            settings(job, precision, max_steps=10, eval_on_start=True, model_init_kwargs=None, warmup_steps=0),
            train_dataset=Dataset.from_list(rows(job, 300, seed=1)),
            eval_dataset=Dataset.from_list(rows(job, 16, seed=2)),
        )
        trainer.train()
        result[precision] = {
            "largest": float(abs(ours - theirs).max()),
            "mean": float(abs(ours - theirs).mean()),
            "spread": float(theirs.std()),
            "same_token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
            "start": next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry),
            "end": trainer.evaluate()["eval_loss"],
        }
        del trainer, model, base
        _free("trl")
    return result


def _probe(job: dict[str, Any]) -> list[list[int]]:
    return [row["input_ids"][:COMPARED_TOKENS] for row in rows(job, 8, seed=3) if len(row["input_ids"]) > 64][:4]


def _free(task: str) -> None:
    import gc

    gc.collect()
    if task == "mlx":
        import mlx.core as mx

        mx.clear_cache()
    elif _has_cuda():
        import torch

        torch.cuda.empty_cache()


def report(results: dict[str, Any], options: argparse.Namespace) -> str:
    """The tables, as Markdown."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "torch", "transformers", "trl", "peft"))
    run = f"LoRA r=16 on all linear layers, {options.steps} steps of 2 × {options.batch} rows."
    what = (
        _describe(options.size) if options.model is None else f"{options.model.name}, {_describe_text(options.rows)};"
    )
    lines = [f"{_device()}; {versions}. {what} {run}", ""]
    names = options.precisions
    head = ["step"] + [f"{name}: {part}" for name in names for part in ("TRL", "MLX", "difference")]
    lines += [_line(head), _line(["---:"] * len(head))]
    for step in [step for step in SHOWN if step <= options.steps]:
        cells = [str(step)]
        for name in names:
            a, b = (results[task][name]["loss"][step - 1] for task in ("trl", "mlx"))
            cells += [f"{a:.5f}", f"{b:.5f}", f"{b - a:+.1e}"]
        lines.append(_line(cells))
    lines += ["", _line(["all steps", *names]), _line(["---", *["---:"] * len(names)])]
    for title, figure in _FIGURES.items():
        lines.append(_line([title, *(figure(results, name) for name in names)]))
    return "\n".join(lines) + "\n"


def _differences(results: dict[str, Any], name: str, key: str) -> list[float]:
    pairs = zip(results["trl"][name][key], results["mlx"][name][key], strict=True)
    return [b - a for a, b in pairs]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


Figure = Callable[[dict[str, Any], str], str]

_FIGURES: dict[str, Figure] = {
    "loss: mean of the absolute difference": lambda r, name: f"{_mean(map(abs, _differences(r, name, 'loss'))):.1e}",
    "loss: mean of the signed difference": lambda r, name: f"{_mean(_differences(r, name, 'loss')):+.1e}",
    "loss: steps where MLX is above TRL": lambda r, name: f"{sum(d > 0 for d in _differences(r, name, 'loss'))}",
    "loss: largest difference": lambda r, name: f"{max(map(abs, _differences(r, name, 'loss'))):.1e}",
    "grad_norm: largest difference": lambda r, name: f"{max(map(abs, _differences(r, name, 'grad_norm'))):.1e}",
    "eval_loss after training, TRL": lambda r, name: f"{r['trl'][name]['eval_loss']:.5f}",
    "eval_loss after training, MLX": lambda r, name: f"{r['mlx'][name]['eval_loss']:.5f}",
    "eval_loss of MLX's adapter in PEFT": lambda r, name: f"{r['load'][name]['start']:.5f}",
    "… after ten more steps with TRL": lambda r, name: f"{r['load'][name]['end']:.5f}",
    "logits in PEFT and MLX: largest difference": lambda r, name: f"{r['load'][name]['largest']:.1e}",
    "… mean difference": lambda r, name: f"{r['load'][name]['mean']:.1e}",
    "… standard deviation": lambda r, name: f"{r['load'][name]['spread']:.2f}",
    "… same most likely token": lambda r, name: f"{100 * r['load'][name]['same_token']:.1f} %",
}


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _describe(size: str) -> str:
    hidden, mlp, layers, heads, kv_heads, vocabulary = SIZES[size]
    attention = 2 * hidden * hidden * (1 + kv_heads / heads)
    total = layers * (attention + 3 * hidden * mlp) + 2 * vocabulary * hidden
    return f"Llama with random weights, {total / 1e6:,.1f} million parameters;"


def _describe_text(file: Path | None) -> str:
    return "on the source of Python's library" if file is None else f"on {file.name}"


if __name__ == "__main__":
    main()
