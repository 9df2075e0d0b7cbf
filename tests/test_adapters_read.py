"""Adapters coming in: what is sound loads, anything else is refused by name and leaves the model alone."""

import json
import os
import struct

import mlx.core as mx
import numpy as np
import pytest
from adapter_folders import logits, make_llama, trained
from safetensors.numpy import load_file, save_file

from hf_mlx import export_adapter, import_adapter
from hf_mlx.adapters.read import read_adapter
from hf_mlx.errors import AdapterError
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import LoraPlan, ModelPlan

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
PLAN = LoraPlan(r=4, target_modules=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    loaded, adapter = trained(base, PLAN)
    return export_adapter(adapter, tmp_path_factory.mktemp("saved") / "adapter"), logits(loaded)


@pytest.fixture
def folder(saved, tmp_path):
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in saved[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        LoraPlan(r=4, use_dora=True, lora_dropout=0.2),
        LoraPlan(r=4, use_rslora=True, rank_pattern={"k_proj": 2}, target_modules=("q_proj", "k_proj")),
        LoraPlan(r=4, lora_bias=True, bias="all"),
        LoraPlan(r=4, target_modules=("embed_tokens", "lm_head")),
        LoraPlan(r=4, modules_to_save=("lm_head", "mlp")),
        LoraPlan(r=4, target_modules="all-linear", exclude_modules=r".*\.0\..*"),
        LoraPlan(r=4, target_modules=("q_proj",), layers_to_transform=(1,)),
    ],
)
def test_what_was_exported_comes_back(base, tmp_path, plan):
    loaded, adapter = trained(base, plan)
    export_adapter(adapter, tmp_path / "out")
    again = load_model(base, ModelPlan())
    read = read_adapter(tmp_path / "out", again)
    assert np.array_equal(logits(again), logits(loaded))
    ours, theirs = read.trainable(), adapter.trainable()
    assert list(ours) == list(theirs)
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)


def test_import_takes_a_folder_for_the_model(base, saved):
    assert np.array_equal(logits(import_adapter(saved[0], base).loaded), saved[1])
    with pytest.raises(AdapterError, match="model of type int"):
        import_adapter(saved[0], 3)


def test_a_pickle_of_tensors_is_read(base, folder, saved):
    torch = pytest.importorskip("torch", reason="a .bin needs torch's weights_only loader")
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    loaded = load_model(base, ModelPlan())
    read_adapter(folder, loaded)
    assert np.array_equal(logits(loaded), saved[1])


def change_tensors(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def change_config(**values):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def change_bytes(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def grow_header(data):
    return struct.pack("<Q", 2**40) + data[8:]


def edit_header(old, new):
    def change(data):
        (length,) = struct.unpack("<Q", data[:8])
        header = data[8 : 8 + length].replace(old, new)
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    return change_bytes(change)


def link_out(name):
    def damage(folder):
        outside = folder.parent / f"elsewhere-{name}"
        os.rename(folder / name, outside)
        os.symlink(outside, folder / name)

    return damage


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def pickle_only(folder):
    import pickle

    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({KEY: Evil()}))


def rename_key(tensors):
    tensors[KEY.replace("lora_A", "lora_C")] = tensors.pop(KEY)


def transpose_key(tensors):
    tensors[KEY] = np.ascontiguousarray(tensors[KEY].T)


def poison(value):
    def change(tensors):
        tensors[KEY][1, 2] = value

    return change_tensors(change)


def as_integers(tensors):
    tensors[KEY] = tensors[KEY].astype(np.int32)


def without_prefix(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


BROKEN = {
    "no folder": (lambda f: os.rename(f, f.parent / "moved"), "no such folder"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "weights in mlx-lm's format": (
        lambda f: os.rename(f / "adapter_model.safetensors", f / "adapters.safetensors"),
        "mlx-lm's own format",
    ),
    "a config that is not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "a config that is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "another method": (change_config(peft_type="IA3"), "peft_type='IA3'"),
    "a feature not supported": (change_config(use_qalora=True), "use_qalora=True"),
    "parameters as targets": (change_config(target_parameters=["mlp.weight"]), "target_parameters"),
    "trainable tokens that are not there": (change_config(trainable_token_indices=[1, 2]), "token_adapter"),
    "trainable tokens beyond the table": (change_config(trainable_token_indices=[1, 128]), "ids from 0 to 127"),
    "trainable tokens by name": (change_config(trainable_token_indices=["a"]), "trainable_token_indices=['a']"),
    "a start that changed the base": (change_config(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "a rank of the wrong type": (change_config(r="4"), "r='4'"),
    "a rank that is true": (change_config(r=True), "r=True"),
    "a rank of zero": (change_config(r=0), "r=0"),
    "a rank without end": (change_config(r=10**400), "r=1000"),
    "an alpha that is NaN": (change_config(lora_alpha=float("nan")), "lora_alpha=nan"),
    "an infinite alpha": (change_config(lora_alpha=float("-inf")), "lora_alpha=-inf"),
    "an absurd alpha": (change_config(lora_alpha=1e30), "lora_alpha=1e+30"),
    "an alpha without end": (change_config(lora_alpha=10**400), "lora_alpha=1000"),
    "an alpha of zero": (change_config(lora_alpha=0), "lora_alpha=0"),
    "a NaN among the alphas": (change_config(alpha_pattern={"q_proj": float("nan")}), "alpha_pattern={'q_proj': nan}"),
    "a rank of a half": (change_config(rank_pattern={"q_proj": 0.5}), "rank_pattern={'q_proj': 0.5}"),
    "a negative rank": (change_config(rank_pattern={"q_proj": -4}), "rank_pattern={'q_proj': -4}"),
    "a pattern that does not compile": (change_config(rank_pattern={"q_(proj": 4}), "rank_pattern={'q_(proj'"),
    "another rank in a pattern": (change_config(rank_pattern={"q_proj": 8}), "shape (8, 64)"),
    "a dropout of five": (change_config(lora_dropout=5), "lora_dropout=5"),
    "a dropout of one": (change_config(lora_dropout=1.0), "lora_dropout=1.0"),
    "a negative dropout": (change_config(lora_dropout=-0.1), "lora_dropout=-0.1"),
    "a dropout that is NaN": (change_config(lora_dropout=float("nan")), "lora_dropout=nan"),
    "targets that do not compile": (change_config(target_modules="(q_proj"), "target_modules='(q_proj'"),
    "targets that are numbers": (change_config(target_modules=[1, 2]), "target_modules=[1, 2]"),
    "a negative layer": (change_config(layers_to_transform=[-1]), "layers_to_transform=[-1]"),
    "layers that are names": (change_config(layers_to_transform=["0"]), "layers_to_transform=['0']"),
    "a base that is a number": (change_config(base_model_name_or_path=5), "base_model_name_or_path=5"),
    "an unknown bias": (change_config(bias="some"), "bias='some'"),
    "another rank": (change_config(r=8), "shape (8, 64)"),
    "more targets than weights": (change_config(target_modules=["q_proj", "v_proj", "k_proj"]), "4 key(s) missing"),
    "fewer targets than weights": (change_config(target_modules=["q_proj"]), "4 key(s) unexpected"),
    "targets that match nothing": (change_config(target_modules=["query"]), "match no module"),
    "DoRA without magnitudes": (change_config(use_dora=True), "lora_magnitude_vector"),
    "a missing key": (change_tensors(lambda t: t.pop(KEY)), f"1 key(s) missing, first {KEY}"),
    "a key too many": (change_tensors(lambda t: t.update(extra=np.ones(3, np.float32))), "unexpected, first extra"),
    "a renamed key": (change_tensors(rename_key), "1 key(s) missing"),
    "keys without PEFT's prefix": (change_tensors(without_prefix), "8 key(s) missing"),
    "a transposed tensor": (change_tensors(transpose_key), "shape (64, 4)"),
    "a NaN": (poison(np.nan), f"{KEY} holds NaN"),
    "an infinity": (poison(np.inf), f"{KEY} holds NaN or infinite"),
    "integers": (change_tensors(as_integers), "dtype I32"),
    "a truncated file": (change_bytes(lambda data: data[:-100]), "bytes of data where the header promises"),
    "an empty file": (change_bytes(lambda _: b""), "header"),
    "bytes appended": (change_bytes(lambda data: data + b"\0" * 64), "bytes of data where the header promises"),
    "an endless header": (change_bytes(grow_header), "announce a header"),
    "a header that is not JSON": (edit_header(b'{"', b'["'), "header is not readable as JSON"),
    "a header with an edited shape": (edit_header(b"[4,64]", b"[4,63]"), "bytes, not"),
    "a header with overlapping tensors": (edit_header(b"[0,1024]", b"[4,1028]"), "starts at byte"),
    "a pickle that runs code": (pickle_only, "adapter_model.bin"),
    "weights linked from outside": (link_out("adapter_model.safetensors"), "a link to"),
    "a config linked from outside": (link_out("adapter_config.json"), "a link to"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_by_name(base, folder, name, monkeypatch, tmp_path):
    damage, message = BROKEN[name]
    monkeypatch.chdir(tmp_path)
    damage(folder)
    loaded = load_model(base, ModelPlan())
    before = logits(loaded)
    with pytest.raises((AdapterError, ImportError)) as caught:
        read_adapter(folder, loaded)
    assert message in str(caught.value)
    assert "remedy:" in str(caught.value)
    assert np.array_equal(logits(loaded), before)
    assert not (tmp_path / "pwned").exists()


def test_enough_ways_to_break_an_adapter_were_tried():
    assert len(BROKEN) >= 55


@pytest.mark.parametrize("change", ["sizes", "layers"])
def test_another_base_is_refused(base, folder, tmp_path, change, monkeypatch):
    import adapter_folders

    with monkeypatch.context() as patch:
        if change == "sizes":
            patch.setattr(adapter_folders, "HIDDEN", 32)
        else:
            patch.setattr(adapter_folders, "LAYERS", 1)
        other = make_llama(tmp_path / "other")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "head_dim": config["hidden_size"] // 4}))
    with pytest.raises(AdapterError, match=r"the base it was trained on"):
        read_adapter(folder, load_model(other, ModelPlan()))


def test_a_link_inside_the_hub_cache_is_followed(base, folder, saved, tmp_path):
    repository = tmp_path / "models--acme--adapter"
    snapshot, blobs = repository / "snapshots" / ("1" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        (blobs / f"sha-{file.name}").write_bytes(file.read_bytes())
        os.symlink(f"../../blobs/sha-{file.name}", snapshot / file.name)
    loaded = load_model(base, ModelPlan())
    read_adapter(snapshot, loaded)
    assert np.array_equal(logits(loaded), saved[1])
