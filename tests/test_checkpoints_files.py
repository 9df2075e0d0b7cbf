"""Checkpoint folders appear whole, are kept and deleted by rule, and are read only when nothing is wrong with them."""

import errno
import json
import os
import re

import mlx.core as mx
import numpy as np
import pytest
from adapter_folders import make_llama

from hf_mlx.atomic import replaced
from hf_mlx.checkpoints.files import replaced_folder, tidy
from hf_mlx.checkpoints.folders import list_checkpoints, rotate
from hf_mlx.checkpoints.inspection import find_checkpoint
from hf_mlx.checkpoints.manifest import MANIFEST, find_damage, write_manifest
from hf_mlx.checkpoints.trees import read_tree, write_tree
from hf_mlx.errors import CheckpointError


def make(folder, **files):
    folder.mkdir(parents=True)
    for name, text in {"trainer_state.json": '{"global_step": 1}', **files}.items():
        (folder / name).write_text(text)
    write_manifest(folder)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_under_its_name_only_when_it_is_complete(tmp_path):
    with replaced_folder(tmp_path / "checkpoint-1") as temporary:
        (temporary / "a").write_text("1")
        assert names(tmp_path) == [".tmp-checkpoint-1"]
        assert list_checkpoints(tmp_path) == []
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_folder_that_exists_is_replaced_as_a_whole(tmp_path):
    make(tmp_path / "checkpoint-1", old="1")
    with replaced_folder(tmp_path / "checkpoint-1") as temporary:
        (temporary / "new").write_text("2")
    assert names(tmp_path) == ["checkpoint-1"]
    assert names(tmp_path / "checkpoint-1") == ["new"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("a fault"), OSError(errno.ENOSPC, "No space left")]
)
def test_a_failure_leaves_what_was_there(tmp_path, error):
    make(tmp_path / "checkpoint-1", old="1")
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), replaced_folder(tmp_path / "checkpoint-1") as temporary:
        (temporary / "new").write_text("2")
        raise error
    assert names(tmp_path) == ["checkpoint-1"]
    assert find_damage(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize("died", ["before the first rename", "between the renames", "after the second rename"])
def test_a_process_that_died_while_replacing_leaves_a_whole_folder(tmp_path, died):
    (tmp_path / ".tmp-checkpoint-1").mkdir()
    if died == "before the first rename":
        make(tmp_path / "checkpoint-1", kept="1")
    elif died == "between the renames":
        make(tmp_path / ".old-checkpoint-1", kept="1")
    else:
        make(tmp_path / ".old-checkpoint-1", old="1")
        make(tmp_path / "checkpoint-1", kept="1")
    folder, passed_over = find_checkpoint(tmp_path, True)
    assert (folder, passed_over) == (tmp_path / "checkpoint-1", [])
    assert (folder / "kept").exists()
    assert names(tmp_path) == ["checkpoint-1"]


def test_tidy_removes_what_was_half_written_and_nothing_else(tmp_path):
    for name in (".tmp-checkpoint-3", "..tmp-checkpoint-3.abc", "checkpoint-2", "runs", ".tmp-mine"):
        (tmp_path / name).mkdir()
    tidy(tmp_path)
    assert names(tmp_path) == [".tmp-mine", "checkpoint-2", "runs"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replaced(path) as temporary:
        temporary.write_text("ne")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with replaced(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_checkpoints_are_listed_by_number_and_by_their_exact_name(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", "checkpoint-8.bak", ".tmp-checkpoint-11"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, [5], [1, 2, 3, 4, 5]),
        (0, [5], [1, 2, 3, 4, 5]),
        (3, [5], [3, 4, 5]),
        (2, [5, 1], [1, 5]),
        (1, [5, 2], [2, 5]),
        (1, [5], [5]),
        (9, [5], [1, 2, 3, 4, 5]),
    ],
)
def test_rotation_deletes_the_oldest_but_what_is_to_be_kept(tmp_path, limit, keep, left):
    for step in range(1, 6):
        folder = make(tmp_path / f"checkpoint-{step}")
        os.utime(folder, (step, step))
    rotate(tmp_path, limit, keep=[tmp_path / f"checkpoint-{step}" for step in keep])
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_rotation_takes_a_higher_step_of_an_earlier_run_for_old(tmp_path):
    for time, step in enumerate((500, 10, 20)):
        os.utime(make(tmp_path / f"checkpoint-{step}"), (time, time))
    rotate(tmp_path, 2, keep=[tmp_path / "checkpoint-20"])
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]


@pytest.mark.parametrize("damage", ["cut", "longer", "edited", "missing", "manifest cut", "manifest missing"])
def test_every_kind_of_damage_is_found(tmp_path, damage):
    older = make(tmp_path / "checkpoint-1", **{"hf_mlx_state.json": "{}"})
    folder = make(tmp_path / "checkpoint-2", **{"hf_mlx_state.json": "{}", "notes.md": "some text"})
    path = folder / (MANIFEST if damage.startswith("manifest") else "notes.md")
    content = path.read_text()
    if damage.endswith("missing"):
        path.unlink()
    else:
        path.write_text(
            {"cut": content[:-3], "longer": content + "x"}.get(damage.split()[-1], content.replace("t", "T"))
        )
    found, passed_over = find_checkpoint(tmp_path, True)
    assert found == older
    assert len(passed_over) == 1 and str(folder) in passed_over[0] and path.name in passed_over[0]
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        find_checkpoint(tmp_path, folder)


def test_a_file_that_a_callback_added_before_the_manifest_is_known(tmp_path):
    make(tmp_path / "checkpoint-1", **{"hf_mlx_state.json": "{}", "mine.bin": "1"})
    assert find_checkpoint(tmp_path, True)[0] == tmp_path / "checkpoint-1"


def test_an_unknown_file_is_refused_by_name(tmp_path):
    folder = make(tmp_path / "checkpoint-1", **{"hf_mlx_state.json": "{}"})
    (folder / "surprise.bin").write_text("1")
    (folder / ".DS_Store").write_text("1")
    with pytest.raises(CheckpointError) as refused:
        find_checkpoint(tmp_path, True)
    assert "surprise.bin" in refused.value.received and "beside it" in refused.value.remedy


TREES = [
    {"a": 1, "b": [1.5, None, True, "x"], "c": (1, (2, 3))},
    {"state": {0: {"step": mx.array(3.0)}, 1: {"step": mx.array(4.0)}}, "inf": float("inf")},
    {"bf16": mx.array([1.0, 1 / 3], mx.bfloat16), "empty": mx.zeros((0, 4)), "half": mx.array([1 / 3], mx.float16)},
    ("MT19937", np.arange(624, dtype=np.uint32), 5, 0, 0.1 + 0.2),
    {"$odd": {"$array": "not one"}, "lists": [[], {}, ()]},
]


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_a_tree_comes_back_with_its_types_and_bits(tmp_path, tree):
    def equal(a, b):
        assert type(a) is type(b)
        if isinstance(a, mx.array):
            assert a.dtype == b.dtype and a.shape == b.shape
            # Compared as raw bits: no value may be rounded on the way.
            raw = mx.uint32 if a.dtype == mx.float32 else mx.uint16
            assert np.array_equal(np.array(a.view(raw)), np.array(b.view(raw)))
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                equal(a[key], b[key])
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                equal(x, y)
        else:
            assert a == b

    write_tree(tree, tmp_path, "state")
    equal(tree, read_tree(tmp_path, "state"))


def test_a_tree_of_something_else_is_refused_with_its_path(tmp_path):
    with pytest.raises(TypeError, match=r"a\.1: set"):
        write_tree({"a": [1, {2}]}, tmp_path, "state")
    with pytest.raises(TypeError, match="float64"):
        write_tree({"a": np.zeros(2)}, tmp_path, "state")


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_tree_that_was_cut_is_refused(tmp_path, name):
    write_tree({"a": mx.zeros((8, 8))}, tmp_path, "state")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="state"):
        read_tree(tmp_path, "state")


def test_the_manifest_lists_every_file(tmp_path):
    folder = make(tmp_path / "checkpoint-1", a="1", b="22")
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert {name: entry["size"] for name, entry in listed.items()} == {"a": 1, "b": 2, "trainer_state.json": 18}


def make_unknown(folder):
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    make_llama(folder)
    (folder / "data.db").write_text("mine")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "trainer_state.json is missing"),
        (lambda folder: make_llama(folder), "trainer_state.json is missing"),
        (make_unknown, "data.db, not known as a part of a checkpoint"),
    ],
    ids=["a folder of something else", "a base model", "a file of the user's"],
)
def test_a_folder_that_is_no_checkpoint_is_said_to_lack_something_and_never_to_be_deleted(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path, str(tmp_path))
    assert message in str(caught.value)
    assert not re.search(r"\b(rm|mv|delete|remove|rmdir)\b", str(caught.value))
