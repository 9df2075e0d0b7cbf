"""The ledger, read from stand-ins: no transformers, trl or peft is needed to explain a configuration."""

import dataclasses
import enum
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_mlx.errors import SettingError
from hf_mlx.settings.ledger import explain


class Schedule(enum.Enum):
    COSINE = "cosine"


@dataclasses.dataclass
class Arguments:
    learning_rate: float = 5e-5
    lr_scheduler_type: object = Schedule.COSINE
    fp16: bool = False
    model_name: str = "tiny"

    @property
    def device(self):
        raise AssertionError("explain() touched a property that would import torch")


def test_the_ledger_iterates_as_field_value_verdict_reason():
    rows = list(explain(Arguments()))
    assert rows[0][:3] == ("learning_rate", 5e-5, "HONOUR")
    assert ("lr_scheduler_type", "cosine", "HONOUR") in [row[:3] for row in rows]
    assert all(len(row) == 4 and row[3] for row in rows)
    assert len(rows) == 4


def test_a_namespace_a_dataclass_and_a_dict_get_the_same_verdicts():
    fields = {"optim": "adamw_8bit", "fp16": True, "packing": True}
    made = dataclasses.make_dataclass("Config", list(fields))(**fields)
    for settings in (SimpleNamespace(**fields), made, fields):
        ledger = explain(settings)
        assert [str(ledger[field].verdict) for field in fields] == ["ADAPT", "REFUSE", "HONOUR"]


def test_every_refused_field_stands_in_one_error():
    ledger = explain({"fp16": True, "fsdp": "full_shard"}, {"init_lora_weights": "eva"})
    assert {entry.field for entry in ledger.refused} == {"fp16", "fsdp", "init_lora_weights"}
    with pytest.raises(SettingError) as caught:
        ledger.raise_refused()
    message = str(caught.value)
    for part in (
        "fp16=True",
        "fsdp='full_shard'",
        "init_lora_weights='eva'",
        "write fp16=False, bf16=True",
        "write fsdp=None",
    ):
        assert part in message


def test_strict_refuses_what_changes_numbers_and_nothing_else():
    ledger = explain({"optim": "adamw_8bit", "torch_empty_cache_steps": 5, "bf16": True})
    ledger.raise_refused()
    assert [entry.field for entry in ledger.adapted(changes_numbers=True)] == ["optim"]
    assert {"bf16", "torch_empty_cache_steps"} <= {entry.field for entry in ledger.adapted(changes_numbers=False)}
    with pytest.raises(SettingError, match=r'write optim="adamw_torch"') as caught:
        ledger.raise_refused(strict=True)
    assert "bf16" not in str(caught.value)


def test_what_is_done_another_way_is_one_line_each():
    lines = explain({"optim": "paged_adamw_32bit", "bf16": False}).notices()
    assert len(lines) == 1
    assert lines[0].startswith("optim='paged_adamw_32bit': ")


def test_a_field_at_its_default_is_never_refused():
    assert not explain({}, {"peft_type": "LORA"}).refused
    # dft would drop label smoothing, but nobody asked for any
    assert not explain({"loss_type": "dft", "label_smoothing_factor": 0.0}).refused
    assert not explain({"fsdp": [], "debug": "", "include_for_metrics": None, "deepspeed": None}).refused


@dataclasses.dataclass
class Newer:
    learning_rate: float = 5e-5
    sharpness: float = 0.0


Newer.__module__ = "transformers.training_args"


def test_a_field_of_a_newer_upstream_is_accepted_at_its_default_only():
    assert explain(Newer())["sharpness"].verdict == "NO-OP"
    with pytest.raises(SettingError, match=r"sharpness=0\.5"):
        explain(Newer(sharpness=0.5)).raise_refused()


def test_a_field_that_the_script_added_to_its_own_class_is_left_alone():
    entry = explain(Arguments(model_name="other"))["model_name"]
    assert (entry.verdict, "Arguments" in entry.reason) == ("NO-OP", True)


def test_an_unknown_key_is_refused_with_the_nearest_name():
    with pytest.raises(SettingError, match="write learning_rate="):
        explain({"learning_rat": 1e-4}).raise_refused()


def test_another_kind_of_adapter_is_one_refusal():
    ledger = explain({}, SimpleNamespace(peft_type="PROMPT_TUNING", num_virtual_tokens=8))
    assert [entry.field for entry in ledger.refused] == ["peft_type"]
    assert "LoraConfig(" in ledger.refused[0].remedy


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        ({"revision": "main", "attn_implementation": "sdpa", "dtype": "bfloat16"}, "HONOUR"),
        ({"attn_implementation": "flash_attention_2", "device_map": "auto"}, "NO-OP"),
        ({"load_in_4bit": True}, "ADAPT"),
        ({"load_in_4bit": False, "subfolder": None}, "HONOUR"),
        ({"subfolder": "x", "load_in_4bit": True}, "REFUSE"),
        ({"dtype": "bf16"}, "REFUSE"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "REFUSE"),
        ({"quantization_config": {"load_in_8bit": True}}, "ADAPT"),
        ('{"revision": "main"}', "HONOUR"),
        (["revision"], "REFUSE"),
    ],
)
def test_the_worst_key_of_a_dict_decides(value, verdict):
    assert explain({"model_init_kwargs": value})["model_init_kwargs"].verdict == verdict


def test_checkpointing_kwargs_are_refused_once_under_their_two_names():
    kwargs = {"offload": True}
    settings = {"activation_checkpointing_kwargs": kwargs, "gradient_checkpointing_kwargs": kwargs}
    assert [entry.field for entry in explain(settings).refused] == ["activation_checkpointing_kwargs"]


def test_a_token_is_never_printed():
    ledger = explain({"hub_token": "hf_secret", "model_init_kwargs": {"token": "hf_secret"}, "fp16": True})
    with pytest.raises(SettingError) as caught:
        ledger.raise_refused()
    assert "hf_secret" not in str(ledger) + ledger.as_text(changed_only=True) + str(caught.value)


def test_the_table_has_a_row_for_each_field():
    ledger = explain({"optim": "adamw_8bit"})
    text = str(ledger)
    assert all(f"\n{entry.field} " in text for entry in ledger.entries)
    assert len(ledger.entries) == 135
    changed = ledger.as_text(changed_only=True)
    assert "adamw_8bit" in changed
    assert "\nfsdp " not in changed


def test_show_prints_with_and_without_rich(capsys, monkeypatch):
    explain({"optim": "adamw_8bit"}).show(changed_only=True)
    assert "adamw_8bit" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich", None)
    explain({"optim": "adamw_8bit"}).show(changed_only=True)
    assert capsys.readouterr().out.startswith("field ")


def test_a_class_instead_of_an_instance_is_refused():
    with pytest.raises(SettingError, match="with the parentheses"):
        explain(Arguments)


def test_settings_import_neither_mlx_nor_torch_nor_transformers():
    code = (
        "import sys, types\n"
        "from hf_mlx.settings.resolve import resolve_plan\n"
        "from hf_mlx.settings import legacy, tables\n"
        "plan, ledger = resolve_plan(types.SimpleNamespace(learning_rate=1e-4), {'r': 4})\n"
        "str(ledger)\n"
        "heavy = ('mlx', 'torch', 'transformers', 'peft', 'trl', 'datasets')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.replace("'", '"')) == []
