"""``hf-mlx run`` with scripts whose trainers MLX does not train: torch trains them, and that is said."""

import textwrap

import pytest
from dropin_models import write_model
from forked_scripts import HF_MLX_RUN, run_forked
from test_dropin_scripts import HF_MLX, _run

HEAD = """
import sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

FOLDER, OUT = sys.argv[1:3]
QUIET = dict(output_dir=OUT, max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
JUDGED = Dataset.from_list([{"prompt": "a b", "completion": " c d", "label": i % 2 == 0} for i in range(4)])
IDS = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 1, 1]}] * 4)
MODEL = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
"""
KTO = """
from trl import KTOConfig, KTOTrainer
KTOTrainer(MODEL, args=KTOConfig(bf16=False, **QUIET), train_dataset=JUDGED, processing_class=tokenizer).train()
"""
OTHERS = """
from transformers import BertConfig, BertForMaskedLM
sizes = dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
bert = BertForMaskedLM(BertConfig(**sizes))
Trainer(bert, TrainingArguments(**QUIET), train_dataset=IDS).train()
"""
SUBMODULE = KTO.replace(
    "from trl import KTOConfig, KTOTrainer",
    """
from trl import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
""",
)
SUBCLASS = KTO.replace(
    "KTOTrainer(M",
    """
class Weighted(KTOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

Weighted(M""",
)
THREAD = OTHERS.replace(
    "Trainer(bert",
    """
from threading import Thread
threads = [Thread(target=lambda: Trainer(bert, TrainingArguments(**QUIET), train_dataset=IDS)) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
Trainer(bert""",
    1,
)
# Zero-argument and named super(), two levels: of a model that MLX does not train.
OWN = OTHERS.replace(
    "Trainer(bert",
    """
class Base(Trainer):
    def __init__(self, *args, weight=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = weight

class Weighted(Base):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.weight * super(Weighted, self).compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)

Weighted(bert, TrainingArguments(**QUIET), train_dataset=IDS)
Weighted(bert""",
)
# As sentence_transformers does: an installed library's class, whatever its model.
LIBRARY = OTHERS.replace(
    "Trainer(bert",
    """
import sysconfig
CODE = '''
from transformers import Trainer
class SentenceTrainer(Trainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)
'''
library = {"__name__": "sentences.trainer"}
exec(compile(CODE, sysconfig.get_paths()["purelib"] + "/sentences/trainer.py", "exec"), library)
library["SentenceTrainer"](bert""",
)
SCRIPTS = {
    "trainer": (KTO, ["trl.KTOTrainer"]),
    "from its submodule": (SUBMODULE, ["trl.KTOTrainer"]),
    "a subclass": (SUBCLASS, ["trl.KTOTrainer"]),
    "threads": (THREAD, ["transformers.Trainer"]),
    "another kind of model": (OTHERS, ["transformers.Trainer"]),
    "a subclass of another kind of model": (OWN, ["transformers.Trainer"]),
    "a library's subclass": (LIBRARY, ["transformers.Trainer"]),
    "two kinds": (OTHERS + KTO, ["transformers.Trainer", "trl.KTOTrainer"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bystanders")
    write_model(root / "model")
    return root / "model"


def write(tmp_path, text):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(text))
    return script


@pytest.mark.parametrize("kind", SCRIPTS)
def test_what_torch_trains_is_said_once_and_at_the_end(kind, folder, tmp_path):
    text, names = SCRIPTS[kind]
    words = [write(tmp_path, HEAD + text + "\nprint('done')\n"), folder, tmp_path / "out"]
    done = run_forked([*HF_MLX_RUN, *words])
    said = [line for line in done.stderr.splitlines() if line.startswith("hf-mlx run:")]
    lines = [f"hf-mlx run: {name} is not trained by MLX in this version; it runs on torch" for name in names]
    assert said == [*lines, f"hf-mlx run: nothing was trained by MLX: {', '.join(names)} ran on torch"]
    assert done.stdout.splitlines()[-1] == "done"


@pytest.mark.parametrize("kind", ["trainer", "a subclass"])
def test_strict_refuses_before_a_step(kind, folder, tmp_path):
    script = write(tmp_path, HEAD + SCRIPTS[kind][0] + "\nprint('done')\n")
    done = run_forked([*HF_MLX_RUN, "--strict", script, folder, tmp_path / "out"], status=1)
    assert "SettingError: received: trl.KTOTrainer under hf-mlx run --strict" in done.stderr
    assert "done" not in done.stdout


@pytest.mark.parametrize(("flags", "status"), [([], 0), (["--strict"], 1)])
def test_a_script_without_a_trainer(flags, status, tmp_path):
    done = _run([*HF_MLX, "run", *flags, write(tmp_path, "import sys\nprint('done')\nsys.exit(0)\n")], status=status)
    assert done.stderr.strip() == "hf-mlx run: nothing was trained by MLX: the script built no trainer at all"
    assert done.stdout.strip() == "done"


OWN = """
import sys
from hf_mlx import MLXSFTTrainer as SFTTrainer, MLXTrainer
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

options = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
trainer, arguments = {"sft": (SFTTrainer, SFTConfig), "lm": (MLXTrainer, TrainingArguments)}[sys.argv[3]]
rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8
args = arguments(sys.argv[2], optim=sys.argv[4], **options)
one = trainer(sys.argv[1], args, train_dataset=rows, peft_config=LoraConfig(target_modules=["q_proj"]))
one.train()
print("steps", one.state.global_step)
"""


@pytest.mark.parametrize("kind", ["sft", "lm"])
def test_the_commands_flags_are_for_this_librarys_own_trainers_too(kind, folder, tmp_path):
    script, words = write(tmp_path, OWN), (folder, tmp_path / "out", kind)
    trained = run_forked([*HF_MLX_RUN, script, *words, "adamw_torch"])
    assert trained.stdout.splitlines()[-1] == "steps 1"
    assert "nothing was trained by MLX" not in trained.stderr
    told = run_forked([*HF_MLX_RUN, "--dry-run", script, *words, "adamw_torch"])
    assert "peak memory, estimated" in told.stdout and "steps 1" not in told.stdout
    assert "nothing was trained by MLX" not in told.stderr
    refused = run_forked([*HF_MLX_RUN, "--strict", script, *words, "adamw_8bit"], status=1)
    assert "SettingError" in refused.stderr and "adamw_torch" in refused.stderr
