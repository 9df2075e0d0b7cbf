"""``hf-mlx launch``: what mlx.launch is told, and what each process runs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hf_mlx.cli.launch import make_command
from hf_mlx.cli.main import build_parser
from hf_mlx.cli.run import start_processes
from hf_mlx.errors import SettingError
from hf_mlx.processes.launcher import read_tensor_parallel


def command(*words):
    return make_command(build_parser("launch").parse_args(["launch", *words]))


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


def test_flags_of_the_script_are_not_the_launchers(script):
    made = command("-n", "2", script, "-n", "3", "--verbose", "--env", "x")
    launcher, process = made[3 : made.index("--")], made[made.index("--") + 1 :]
    assert made[0] == sys.executable and launcher == ["-n", "2"]
    run = [sys.executable, "-m", "hf_mlx.cli.main", "run"]
    assert process == [*run, script, "-n", "3", "--verbose", "--env", "x"]


def test_flags_of_the_launcher_and_of_run_go_where_they_belong(script, tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text("[]")
    flags = ["--hostfile", str(hosts), "--backend", "ring", "--env", "A=1", "--env", "B=2", "--python", "/py"]
    made = command(*flags, "--starting-port", "5000", "--strict", script)
    launcher, process = made[3 : made.index("--")], made[made.index("--") + 1 :]
    expected = ["--hostfile", str(hosts), "--backend", "ring", "--python", "/py", "--starting-port", "5000"]
    assert launcher == [*expected, "--env", "A=1", "--env", "B=2"]
    assert process == ["/py", "-m", "hf_mlx.cli.main", "run", "--strict", script]
    reported = command("-n", "2", "--report", "run.html", script)
    assert reported[-4:] == ["run", "--report", "run.html", script]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "2", "nowhere.py"], "a Python file"),
        (["{script}"], "hf-mlx launch -n 2 .*train.py, or hf-mlx run"),
        (["-n", "0", "{script}"], "at least one process"),
        (["--hostfile", "nowhere.json", "{script}"], "mlx.distributed_config"),
    ],
)
def test_what_is_missing_is_said_with_the_line_to_write(script, words, message):
    with pytest.raises(SettingError, match=message):
        command(*(word.format(script=script) for word in words))


def test_a_split_model_is_asked_for_in_the_environment_of_every_process(script):
    made = command("-n", "2", "--tensor-parallel", script, "--tensor-parallel", "7")
    launcher, process = made[3 : made.index("--")], made[made.index("--") + 1 :]
    assert launcher == ["-n", "2", "--env", "HF_MLX_TENSOR_PARALLEL=all"]
    assert process[-3:] == [script, "--tensor-parallel", "7"]


def test_run_becomes_the_launcher_of_a_split_model(script):
    options = build_parser("run").parse_args(["run", "--strict", "--tensor-parallel", "3", script, "-n", "5"])
    words = start_processes(options, options.tensor_parallel)
    launched = build_parser("launch").parse_args(words[words.index("launch") :])
    assert (launched.processes, launched.tensor_parallel, launched.strict) == (3, True, True)
    assert (str(launched.script), launched.arguments) == (script, ["-n", "5"])


def test_a_model_is_split_over_all_processes_or_none():
    assert not read_tensor_parallel(2, {}) and not read_tensor_parallel(1, {"HF_MLX_TENSOR_PARALLEL": "all"})
    assert read_tensor_parallel(2, {"HF_MLX_TENSOR_PARALLEL": "all"})
    assert read_tensor_parallel(4, {"HF_MLX_TENSOR_PARALLEL": "4"})
    with pytest.raises(SettingError, match="split over 2 processes, of which there are 4"):
        read_tensor_parallel(4, {"HF_MLX_TENSOR_PARALLEL": "2"})


START = [sys.executable, "-m", "hf_mlx.processes.starter", "-n", "2", "--backend", "ring", "--"]


@pytest.mark.parametrize(("failing", "status"), [("none", 0), ("0", 1), ("1", 1)])
def test_the_launcher_ends_as_its_processes_do(failing, status):
    code = "import os, sys; print('heard', input()); sys.exit(3 if os.environ['MLX_RANK'] == sys.argv[1] else 0)"
    done = subprocess.run(
        [*START, sys.executable, "-c", code, failing], input="a line\n", capture_output=True, text=True
    )
    # One that fails may end the other before it has read.
    assert done.returncode == status and "heard a line" in done.stdout, done.stdout + done.stderr


def test_ctrl_c_is_the_processes_to_answer():
    code = "import time\nprint('ready', flush=True)\ntry: time.sleep(30)\nexcept KeyboardInterrupt: print('saved')"
    started = subprocess.Popen(
        [*START, sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None
    assert [started.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    os.killpg(started.pid, signal.SIGINT)
    assert started.stdout.read().splitlines() == ["saved"] * 2 and started.wait(20) == 0


def test_the_launcher_rests_while_its_processes_work():
    began = time.monotonic()
    started = subprocess.Popen([*START, "sleep", "3"], stdin=subprocess.DEVNULL)
    _, status, used = os.wait4(started.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0 and time.monotonic() - began >= 3
    # Most of it is the import of MLX; mlx.launch itself takes a core all the time.
    assert used.ru_utime + used.ru_stime < 1.5
