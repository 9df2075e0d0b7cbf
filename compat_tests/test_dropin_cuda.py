"""What a script hears about CUDA under ``hf-mlx run``, and that nobody else hears it."""

import resource
import subprocess
import sys
import textwrap

import pytest
from forked_scripts import HF_MLX_RUN, run_forked
from test_dropin_scripts import HF_MLX, _run

# Seconds of CPU time that the command may add to a script that imports no library; 0.1 was measured.
COST = 0.2

ANSWERS = """
import io, threading, torch
from concurrent.futures import ThreadPoolExecutor

assert torch.cuda.is_available() and torch.cuda.is_bf16_supported() and torch.cuda.is_initialized()
assert torch.cuda.get_device_capability()[0] >= 8 and torch.cuda.get_device_capability("cuda:0") == (8, 0)
gpu = torch.cuda.get_device_properties(0)
assert gpu.name == torch.cuda.get_device_name(0) and gpu.total_memory > 2**28 and gpu.major == 8
assert torch.cuda.device_count() == 1 and torch.cuda.current_device() == 0
assert int(torch.version.cuda.split(".")[0]) >= 12 and torch.version.cuda >= "11.8"
free, total = torch.cuda.mem_get_info()
assert free <= total == gpu.total_memory
for name in ("max_memory_reserved", "memory_allocated", "memory_reserved", "max_memory_allocated"):
    assert getattr(torch.cuda, name)() >= 0
for name in ("empty_cache", "synchronize", "reset_peak_memory_stats", "ipc_collect"):
    assert getattr(torch.cuda, name)() is None
torch.cuda.set_device(0), torch.cuda.manual_seed(0), torch.cuda.manual_seed_all(0)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record(), end.record(), torch.cuda.synchronize()
assert start.elapsed_time(end) >= 0

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
assert device.type == "cuda" and device == torch.device("cuda")
made = [
    torch.zeros(3, device="cuda"), torch.ones(3).to("cuda"), torch.arange(3.0).cuda(), torch.rand(3, device=device),
    torch.tensor([1.0, 2.0, 3.0], device=torch.device("cuda:0")), torch.ones(3).to(0), torch.full((3,), 2.0).to(device),
    torch.ones(3).to(device="cuda", dtype=torch.float32, non_blocking=True), torch.ones(3).new_zeros(3, device="cuda"),
    torch.empty_like(torch.ones(3), device=device).fill_(1), torch.randn(3).cuda(0).pin_memory(),
]
assert sum(made).shape == (3,) and len({tensor.device for tensor in made}) == 1
assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16 and torch.ones(2).to("cpu").device.type == "cpu"
layer = torch.nn.Linear(3, 2, device="cuda").to(device).cuda().to("cuda", dtype=torch.float32)
assert layer(made[0]).shape == (2,) and layer.weight.grad is None
layer(made[0]).sum().backward()
assert layer.weight.grad.device == layer.weight.device
with torch.device("cuda"):
    assert torch.zeros(2).device == made[0].device
with torch.device("meta"):
    assert torch.zeros(2).device.type == "meta"
with torch.cuda.device(0):
    pass
for context in (torch.autocast("cuda", dtype=torch.float16), torch.cuda.amp.autocast(), torch.amp.autocast("cuda")):
    with context:
        assert (torch.ones(2, 2, device="cuda") @ torch.ones(2, 2).cuda()).dtype == torch.bfloat16
scaler = torch.cuda.amp.GradScaler()
assert scaler.scale(made[0]) is made[0]
places = []
thread = threading.Thread(target=lambda: places.append(torch.ones(2, device="cuda").device))
thread.start(), thread.join()
with ThreadPoolExecutor(2) as pool:
    places += pool.map(lambda size: torch.ones(size).to(device).device, [1, 2])
assert places == [made[0].device] * 3
file = io.BytesIO()
torch.save(made[0], file), file.seek(0)
assert torch.load(file, map_location="cuda").shape == (3,)

drawn = [torch.Generator(device=place).manual_seed(5) for place in ("cpu", "cuda", torch.device("cuda:0"))]
assert isinstance(drawn[1], torch.Generator) and isinstance(torch.default_generator, torch.Generator)
assert len({tuple(torch.randn(3, generator=one, device=one.device).tolist()) for one in drawn}) == 1
assert torch.randperm(4, generator=torch.Generator("cuda"), device="cuda").shape == (4,)
assert torch.cuda.FloatTensor([1.0]).dtype == torch.float32 and torch.cuda.LongTensor is torch.LongTensor
assert torch.ones(1).type("torch.cuda.HalfTensor").dtype == torch.ones(1).type(torch.cuda.HalfTensor).dtype
state = torch.cuda.get_rng_state()
torch.cuda.set_rng_state(state), torch.cuda.set_rng_state_all(torch.cuda.get_rng_state_all())
with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.nvtx.range("x"):
    torch.cuda.current_stream().synchronize(), torch.cuda.nvtx.range_push("y"), torch.cuda.nvtx.range_pop()
assert torch.cuda.initial_seed() >= 0 and not torch.cuda.is_current_stream_capturing()

from accelerate import Accelerator, PartialState
from accelerate.utils import is_bf16_available, is_cuda_available
from transformers import TrainingArguments
from transformers.utils import is_flash_attn_2_available, is_torch_cuda_available

assert not is_cuda_available() and not is_torch_cuda_available() and not is_flash_attn_2_available()
assert Accelerator().device.type != "cuda" and PartialState().process_index == 0
bf16 = torch.cuda.is_bf16_supported()
arguments = TrainingArguments("unused", bf16=bf16, fp16=not bf16, tf32=True, use_cpu=False)
assert arguments.device.type != "cuda" and arguments.n_gpu == 0 and arguments.bf16
halves = TrainingArguments("unused", fp16=True), TrainingArguments("unused", fp16=True)
assert all(half.bf16 and not half.fp16 for half in halves)
print("heard")
"""


def write(folder, text):
    script = folder / "train.py"
    script.write_text(textwrap.dedent(text))
    return script


def test_cudas_questions_are_answered_and_its_tensors_work(tmp_path):
    done = run_forked([*HF_MLX_RUN, write(tmp_path, ANSWERS)])
    assert done.stdout.strip() == "heard"
    said = [line for line in done.stderr.splitlines() if line.startswith("hf-mlx run: ")]
    [summary] = [line for line in said if "CUDA as the script found it" in line]
    for answer in ("is_available() True", "get_device_capability() (8, 0)", 'device "cuda" is '):
        assert summary.count(answer) == 1
    assert sum("fp16=True is done as bf16=True" in line for line in said) == 1
    assert sum("tf32=True" in line for line in said) == 1


REAL = """
import torch

assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
for make in (lambda: torch.zeros(1, device="cuda"), lambda: torch.ones(1).cuda(), lambda: torch.ones(1).to("cuda")):
    try:
        make()
    except (AssertionError, RuntimeError):
        print("refused")
try:
    import bitsandbytes
except ImportError:
    print("refused")
"""


# --strict ends with 1 where nothing was trained.
@pytest.mark.parametrize(("command", "status"), [([], 0), ([*HF_MLX_RUN, "--strict"], 1)], ids=["python", "strict"])
def test_torch_answers_for_itself(command, status, tmp_path):
    done = run_forked([*command, write(tmp_path, REAL)], status=status)
    assert done.stdout.split() == ["refused"] * 4
    assert "CUDA as the script found it" not in done.stderr


def test_nothing_leaks_into_a_process_that_does_not_use_it(tmp_path):
    _run([sys.executable, write(tmp_path, LEAK)])


LEAK = """
import sys, threading
before = list(sys.meta_path), threading.Thread.start
import hf_mlx.cli.main, hf_mlx.trainers.sft
hf_mlx.cli.main.build_parser()
import datasets, huggingface_hub, importlib.util, peft, torch, transformers, trl
from trl import ModelConfig, SFTConfig, SFTTrainer
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments

assert not any(name.startswith("hf_mlx.stand_in") for name in sys.modules)
assert [finder for finder in sys.meta_path if finder not in before[0] and "hf_mlx" in type(finder).__module__] == []
assert threading.Thread.start is before[1]
assert not torch.overrides._get_current_function_mode_stack()
kept = [
    SFTTrainer.__init__, SFTConfig.__init__, ModelConfig.__init__, TrainingArguments.__init__, torch.autocast.__init__,
    HfArgumentParser.parse_args_into_dataclasses, AutoModelForCausalLM.from_pretrained, torch.cuda.is_available,
    torch.load, torch.set_default_device, transformers.Trainer.__init__, transformers.PreTrainedModel.from_pretrained,
    transformers.Seq2SeqTrainer.__init__, transformers.PreTrainedTokenizerBase.apply_chat_template,
    transformers.PreTrainedConfig._attn_implementation.fset, HfArgumentParser.parse_dict,
    TrainingArguments.__post_init__, datasets.load_dataset, huggingface_hub.login, importlib.util.find_spec,
    torch.set_default_tensor_type,
]
# A wrapper of ours would be compiled in this library's files, whatever its name says.
assert [function for function in kept if "hf_mlx" in function.__code__.co_filename.split("site-packages")[-1]] == []
assert SFTTrainer.__module__.startswith("trl.")
assert [name for name in ("setup_chat_format", "DataCollatorForCompletionOnlyLM") if hasattr(trl, name)] == []
assert not hasattr(peft, "prepare_model_for_int8_training") and not hasattr(ModelConfig, "torch_dtype")
assert torch.Generator is torch._C.Generator and not hasattr(transformers.PreTrainedTokenizerBase, "_pad_token")
assert not hasattr(TrainingArguments("unused", use_cpu=True), "evaluation_strategy")
for name in ("wandb", "flash_attn", "google.colab", "bitsandbytes", "unsloth"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
"""


def cpu_seconds(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout


def test_the_command_costs_little_and_imports_nothing(tmp_path):
    script = write(
        tmp_path, 'import sys\nprint(*{"torch", "mlx", "transformers", "trl", "numpy"} & set(sys.modules))\n'
    )
    plain, run = (
        [cpu_seconds([*command, script]) for _ in range(5)] for command in ([sys.executable], [*HF_MLX, "run"])
    )
    assert {printed for _, printed in run} == {"\n"}
    assert min(run)[0] - min(plain)[0] < COST
