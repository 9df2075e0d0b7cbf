"""What the trainer says to models and subclasses it cannot honour, before anything is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_mlx.errors import SettingError
from hf_mlx.models.bridge import is_torch_model
from hf_mlx.recipes.never_called import NEVER_CALLED
from hf_mlx.stand_in.loading import portable_kwargs
from hf_mlx.surface.bases import open_base
from hf_mlx.surface.hooks import check_overrides


class Base:
    def log(self): ...
    def save_model(self): ...


def test_a_name_is_no_torch_model_and_other_types_are_refused():
    assert not open_base("owner/name").is_copied
    assert not is_torch_model("owner/name")
    with pytest.raises(SettingError, match="model of type int"):
        open_base(3)


def test_the_bridge_asks_about_torch_without_importing_it():
    code = (
        "import sys; from hf_mlx.models.bridge import is_torch_model; "
        "assert not is_torch_model(object()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_command_line_starts_without_mlx():
    # OpenBLAS must be loaded before mlx is, which the command does once it knows what to run.
    code = "import sys; from hf_mlx.cli.main import build_parser; build_parser(); assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["compute_loss", "training_step", "create_optimizer", "get_train_dataloader"])
def test_an_override_that_would_never_run_is_refused(name):
    derived = type("Mine", (Base,), {name: lambda self: None})
    with pytest.raises(SettingError, match=rf"Mine\.{name}\(\)"):
        check_overrides(type("Again", (derived,), {}), Base, NEVER_CALLED)


def test_overrides_that_are_called_are_welcome():
    derived = type("Mine", (Base,), {"log": lambda self: None, "helper": lambda self: None})
    check_overrides(derived, Base, NEVER_CALLED)
    check_overrides(Base, Base, NEVER_CALLED)


def test_loading_keywords_of_cuda_are_taken_out_and_said():
    left, bits, notes = portable_kwargs(
        {"quantization_config": {"load_in_8bit": True}, "device_map": "auto", "dtype": "bfloat16"}
    )
    assert (left, bits) == ({"dtype": "bfloat16"}, 8)
    assert len(notes) == 2
    left, bits, notes = portable_kwargs({"attn_implementation": "sdpa", "load_in_4bit": False, "device_map": None})
    assert (left["attn_implementation"], bits, notes) == ("sdpa", None, [])
    left, _, notes = portable_kwargs({"attn_implementation": "flash_attention_2"})
    assert left == {}
    assert "flash_attention_2" in notes[0]
