"""The clip that is in force, for every pair of settings."""

import math
import warnings

import pytest

from hf_mlx.errors import SettingError
from hf_mlx.settings.clipping import GradClip, resolve_grad_clip

# max_grad_value, max_grad_norm, mode, threshold
ROWS = [
    (None, 0.0, "value", 1.0),
    (None, None, "value", 1.0),
    (None, 1.0, "norm", 1.0),
    (None, 0.3, "norm", 0.3),
    (0.0, 0.0, "none", 0.0),
    (0.0, None, "none", 0.0),
    (0.0, 1.0, "norm", 1.0),
    (0, 2, "norm", 2.0),
    (5.0, 0.0, "value", 5.0),
    (5.0, None, "value", 5.0),
]
BAD = [-1.0, -1e-9, math.nan, math.inf, -math.inf, "1.0", "", True, False, b"1", [1.0], {"norm": 1.0}, 1j]


@pytest.mark.parametrize(("value", "norm", "mode", "threshold"), ROWS)
def test_the_two_settings_decide_one_clip(value, norm, mode, threshold):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_grad_clip(max_grad_norm=norm, max_grad_value=value) == GradClip(mode, threshold)


def test_a_norm_that_is_dropped_is_said_by_a_warning():
    with pytest.warns(UserWarning, match=r"max_grad_value=5 clips elementwise, so max_grad_norm=1 is dropped"):
        clip = resolve_grad_clip(max_grad_norm=1.0, max_grad_value=5.0)
    assert clip == GradClip("value", 5.0)


@pytest.mark.parametrize("setting", ["max_grad_norm", "max_grad_value"])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_threshold_is_refused_by_name_and_value(setting, bad):
    settings = {"max_grad_norm": 1.0, "max_grad_value": 0.0} | {setting: bad}
    with pytest.raises(SettingError) as caught:
        resolve_grad_clip(**settings)
    assert f"{setting}={bad!r}" in caught.value.received
    assert setting in caught.value.remedy


def test_each_mode_describes_itself_in_one_line():
    lines = {GradClip(mode, 0.5).describe() for mode in ("norm", "value", "none")}
    assert len(lines) == 3
    assert not any("\n" in line for line in lines)


def test_the_clip_in_force_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        GradClip("norm", 1.0).threshold = 2.0
