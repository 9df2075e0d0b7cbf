"""Every script of examples/ runs as it stands, on a tiny model and a few rows, and its output loads upstream."""

import json
import re
from pathlib import Path

import pytest
import torch
from forked_scripts import run_forked
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
# One for each script of the folder; a script without a case here fails test_every_example_has_a_case.
CASES = {"sft_lora.py", "sft_full.py", "adapter_to_cuda.py", "demo.py"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama of two layers with every parameter perturbed, and a byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: index for index, token in enumerate([*letters, *specials])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", additional_special_tokens=specials[2:]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    turns = [("user", "add {0} and {0}"), ("assistant", "the sum is {1}")]
    rows = [{"messages": [{"role": role, "content": text.format(n, 2 * n)} for role, text in turns]} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(name: str, *arguments: str, **settings: object) -> str:
    environment = {key: str(value) for key, value in settings.items()}
    return run_forked([EXAMPLES / name, *arguments], environ=environment).stdout


@pytest.fixture(scope="module")
def adapter(model, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    assert f"adapter for PEFT: {folder}" in run("sft_lora.py", MODEL=model, DATA=data, OUTPUT=folder)
    return folder


def test_every_example_has_a_case():
    assert {path.name for path in EXAMPLES.glob("*.py")} == CASES


def test_sft_lora_writes_an_adapter_that_peft_loads(model, adapter):
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(1, 9)[None]
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, adapter)(ids).logits
    assert not torch.allclose(before, after)


def test_sft_full_writes_a_model_that_transformers_loads(model, data, tmp_path):
    assert f"model for transformers: {tmp_path}" in run("sft_full.py", MODEL=model, DATA=data, OUTPUT=tmp_path)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert before.keys() == after.keys()
    assert [name for name, weight in after.items() if torch.equal(weight, before[name])] == []


def test_adapter_to_cuda_merges_what_sft_lora_wrote(model, adapter, tmp_path):
    assert f"merged model: {tmp_path}" in run("adapter_to_cuda.py", MODEL=model, ADAPTER=adapter, OUTPUT=tmp_path)
    ids = torch.arange(1, 9)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)(ids).logits
    # fp32: one merged product instead of two, a few units in the last place of logits of order 1.
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)


def as_script(notebook: Path) -> tuple[str, int]:
    """The code of a notebook as a program; shell lines are run, installs are not."""
    content = json.loads(notebook.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    cells = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in content["cells"] if cell["cell_type"] == "code")
    lines = [line for cell in cells for line in cell.splitlines() if not line.startswith("%pip")]
    shell = (
        "import os, subprocess, sys\nos.environ['PATH'] = os.path.dirname(sys.executable) + ':' + os.environ['PATH']"
    )
    return "\n".join(
        [
            shell,
            *(
                f"subprocess.run({line[1:]!r}, shell=True, check=True)" if line.startswith("!") else line
                for line in lines
            ),
        ]
    ), len(cells)


def test_the_notebook_runs_from_top_to_bottom(model, tmp_path):
    script, cells = as_script(EXAMPLES / "first_finetune.ipynb")
    assert cells >= 8
    # Where the notebook names a model of the hub, a folder of that name stands in.
    named = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    named.parent.mkdir()
    named.symlink_to(model)
    (tmp_path / "notebook.py").write_text(script)
    done = run_forked(["notebook.py"], cwd=tmp_path)
    assert done.stdout.count("before:") == done.stdout.count("after:") == 2
    assert re.search(r"loss [\d.]+ at step 1 → [\d.]+ at step 40", done.stdout)
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "curve.html").exists()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_demo_draws_samples_and_verifies(model, tmp_path):
    printed = run("demo.py", str(model), STEPS=3, OUTPUT=tmp_path)
    assert re.search(r"^before +\| after$", printed, re.MULTILINE)
    assert re.search(r"exactly the right call: \d of 4 before, \d of 4 after", printed)
    assert "loss" in printed and "●" in printed
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0
