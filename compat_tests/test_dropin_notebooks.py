"""``hf-mlx run`` with notebooks, and with scripts that were notebooks."""

import json

import pytest
from test_dropin_scripts import HF_MLX, _run

CELLS = [
    "%%capture\n%pip install -U \\\n  'transformers==4.49.0' \\\n  trl\n!pip install -q bitsandbytes",
    "!nvidia-smi\nimport os\nif True:\n    !mkdir -p made\nfiles = !ls {folder}\nprint(files)\n"
    "%env MINE=3\nprint(os.environ['MINE'])",
    's = """\n!not a command\n%nor this\n"""\nprint(len(s.splitlines()), 7 % 4)\nos.path.isdir("made")',
    "%%bash\necho from bash > made/file",
    "%%time\nanswer = 6 * 7\n",
    "%time print('timed', answer)\n?print\n%matplotlib inline\n%cd made\nprint(os.listdir('.'))",
    "%%writefile kept.txt\nkept\n",
    "print(open('kept.txt').read().strip(), get_ipython().__class__.__name__)\npip install something",
]  # fmt: skip
PRINTED = ["3", "3 3", "timed 42", "['file']", "kept Shell"]


def cells(folder):
    return [cell.replace("{folder}", str(folder)) for cell in CELLS]


def as_notebook(folder):
    code = [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells(folder)]
    path = folder / "train.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# !text"]}, *code]}))
    return path


def as_converted(folder):
    """What nbconvert makes of it."""
    magic = {
        "%%capture": "get_ipython().run_cell_magic('capture', '', \"get_ipython().system('pip install x')\\n\")",
        "%%bash": "get_ipython().run_cell_magic('bash', '', 'echo from bash > made/file')",
        "%%time": "get_ipython().run_cell_magic('time', '', 'answer = 6 * 7\\n')",
        "%%writefile": "get_ipython().run_cell_magic('writefile', 'kept.txt', 'kept\\n')",
    }
    lines = []
    for cell in cells(folder):
        head = cell.partition("\n")[0].partition(" ")[0]
        lines.append(magic.get(head, cell))
    path = folder / "train.py"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("make", [as_notebook, as_converted])
def test_a_notebook_runs_as_its_host_runs_it(make, tmp_path, monkeypatch):
    (tmp_path / "listed").mkdir()
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    done = _run([*HF_MLX, "run", path])
    printed = done.stdout.splitlines()
    assert printed[0].startswith("['listed', 'made', 'train.")
    assert printed[1:] == PRINTED
    said = [line for line in done.stderr.splitlines() if "not run: " in line]
    assert len(said) == len(set(said)) >= 4
    assert any("nvidia-smi" in line for line in said) and any("pip install something" in line for line in said)


def test_what_is_no_python_at_all_is_pythons_error(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("x = 1\nthis is no python\n!pip install x\n")
    done = _run([*HF_MLX, "run", script], status=1)
    assert "SyntaxError" in done.stderr and "broken.py" in done.stderr and "hf_mlx" not in done.stderr


def test_a_file_that_is_no_notebook(tmp_path):
    path = tmp_path / "train.ipynb"
    path.write_text("[]")
    done = _run([*HF_MLX, "run", path], status=2)
    assert "a Jupyter notebook" in done.stderr
