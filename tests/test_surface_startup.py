"""The line that says where a start's time went."""

from hf_mlx.surface.startup import StartUp


def test_the_script_s_own_time_is_said_beside_the_total():
    start = StartUp(script=4.1, settings=0.02, files=0.0, tokenizer=0.3, data=0.6, model=0.5, first_step=6.0)
    assert start.total == 7.42
    assert start.describe() == (
        "Started in 7.4 s, after 4.1 s of imports and script: settings 0.0 s, files 0.0 s, tokenizer 0.3 s, "
        "data 0.6 s, model 0.5 s, callbacks 0.0 s, opening 0.0 s, first step 6.0 s"
    )


def test_what_is_not_known_is_left_out():
    line = StartUp(script=None, data=1.0).describe()
    assert "script" not in line and "first step" not in line
    assert line.startswith("Started in 1.0 s: settings")
