"""Broken files of every kind, drawn from a seed: of a base model, of an adapter, of a checkpoint."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Damage = Callable[[Path, random.Random], object]

# Values of each JSON type; the damage to a value is one of another type, or a number that no writer writes.
VALUES: dict[str, list[Any]] = {
    "null": [None],
    "bool": [True, False],
    "number": [-7, 3.5],
    "string": ["", "x", "y" * 10_000],
    "list": [[], [[]], ["a", 1, None]],
    "object": [{}, {"a": {"b": []}}],
}
ABSURD = [10**18, -(10**18), 10**400, float("nan"), float("inf"), float("-inf")]


class Code:
    """Would leave a file behind if it were ever unpickled."""

    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (self.proof,)


def kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "bool"
    kinds = {int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return kinds[type(value)]


# To any file.


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(max(len(content) - 1, 1))])


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def garbage(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.choice([1, 8, 9, 500, 5000])))


def fifo(path: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice(["/dev/zero", "/dev/null", "/dev/random"]))


def unix_socket(path: Path, draw: random.Random) -> None:
    path.unlink()
    before = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may not be long
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def dangling_link(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def link_loop(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def terabyte(path: Path, draw: random.Random) -> None:
    os.truncate(path, 1 << 40)


def unreadable(path: Path, draw: random.Random) -> None:
    path.chmod(0)


ANY: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (cut, empty, garbage, fifo, folder, device, unix_socket, dangling_link, link_loop, terabyte)
}
if os.geteuid():
    # Root may read everything.
    ANY["unreadable"] = unreadable


# To JSON.


def _leaves(value: Any, path: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    # The vocabulary's entries are one kind of thing, however many there are.
    return [path] * bool(path) + [leaf for key, item in list(inside)[:40] for leaf in _leaves(item, (*path, key))]


def _replace(content: Any, path: tuple, value: Any) -> Any:
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


def _get(content: Any, path: tuple) -> Any:
    for key in path:
        content = content[key]
    return content


def another_type(path: Path, draw: random.Random) -> str:
    content = json.loads(path.read_text())
    place = draw.choice([(key,) for key in content] if draw.random() < 0.6 else _leaves(content))
    kind = draw.choice([kind for kind in VALUES if kind != kind_of(_get(content, place))])
    value = draw.choice(VALUES[kind])
    path.write_text(json.dumps(_replace(content, place, value)))
    return f"{place} = {str(value)[:30]!r}"


def absurd_number(path: Path, draw: random.Random) -> str:
    content = json.loads(path.read_text())
    numbers = [place for place in _leaves(content) if kind_of(_get(content, place)) == "number"]
    place, value = draw.choice(numbers or _leaves(content)), draw.choice(ABSURD)
    path.write_text(json.dumps(_replace(content, place, value)))
    return f"{place} = {str(value)[:30]}"


def another_root(path: Path, draw: random.Random) -> None:
    path.write_text(draw.choice(["[]", "null", "5", '"x"', "{}", "[{}]", "true"]))


def deep(path: Path, draw: random.Random) -> None:
    depth = draw.choice([200, 5_000, 1_000_000])
    nested = "[" * depth + "]" * depth if draw.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
    text = path.read_text()
    path.write_text(nested if draw.random() < 0.3 else text.rstrip().removesuffix("}") + f', "extra": {nested}}}')


def not_utf8(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    place = draw.randrange(len(content))
    path.write_bytes(content[:place] + draw.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80"]) + content[place:])


JSON: dict[str, Damage] = {
    damage.__name__: damage for damage in (another_type, absurd_number, another_root, deep, not_utf8)
}


# To safetensors.


def _edit_header(change: Callable[[dict[str, Any], str, random.Random], object]) -> Damage:
    def damage(path: Path, draw: random.Random) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header, draw.choice([name for name in header if name != "__metadata__"]), draw)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return damage


def _offsets(header: dict, name: str, draw: random.Random) -> None:
    start, stop = header[name]["data_offsets"]
    header[name]["data_offsets"] = draw.choice(
        [[-start - 8, stop], [start + 4, stop + 4], [start, 1 << 62], [stop, start], [start], "x", [float("nan"), stop]]
    )


def _dtype(header: dict, name: str, draw: random.Random) -> None:
    header[name]["dtype"] = draw.choice(["F128", "", None, 5, "I32", "U32", "F16", "BF16", "I64", "f32", ["F32"]])


def _shape(header: dict, name: str, draw: random.Random) -> None:
    shape = header[name]["shape"]
    header[name]["shape"] = draw.choice(
        [[*shape[::-1], 1], [-1, *shape], [1 << 40], [], [float(n) for n in shape], "4", [True, *shape], [0], None]
    )


def _entry(header: dict, name: str, draw: random.Random) -> None:
    header[name] = draw.choice([None, [], {}, "x", 5, {"dtype": "F32"}])


def _metadata(header: dict, name: str, draw: random.Random) -> None:
    header["__metadata__"] = draw.choice([5, [], {"format": 5}, {"format": {}}, "x", True])


def _other_name(header: dict, name: str, draw: random.Random) -> None:
    header[draw.choice(["", "x", "\0", name + ".weight"])] = header.pop(name)


def header_length(path: Path, draw: random.Random) -> None:
    length = draw.choice([1 << 63, (1 << 64) - 1, 1 << 31, 99_999_999, 0, 1, 2])
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def deep_header(path: Path, draw: random.Random) -> None:
    text = b'{"a":' * 500_000 + b"1" + b"}" * 500_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def nan_values(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    # The last value of the last tensor, which every file that is drawn here has in fp32.
    content[-4:] = struct.pack("<f", draw.choice([float("nan"), float("inf")]))
    path.write_bytes(bytes(content))


SAFETENSORS: dict[str, Damage] = {
    "offsets": _edit_header(_offsets),
    "dtype": _edit_header(_dtype),
    "shape": _edit_header(_shape),
    "header_entry": _edit_header(_entry),
    "metadata": _edit_header(_metadata),
    "other_name": _edit_header(_other_name),
    "header_length": header_length,
    "deep_header": deep_header,
    "nan_values": nan_values,
}


# To torch's files.


def zip_bomb(path: Path, draw: random.Random) -> None:
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        for member in source.infolist():
            bomb.writestr(member.filename, source.read(member))
        with bomb.open(source.infolist()[0].filename.split("/")[0] + "/data/bomb", "w", force_zip64=True) as inner:
            for _ in range(300):
                inner.write(bytes(1 << 20))


def lying_sizes(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(bytes(content))


def code(path: Path, draw: random.Random) -> None:
    value = {"state": Code(str(path.parent / "executed")), "param_groups": []}
    if draw.random() < 0.5:
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path)


def laughs(path: Path, draw: random.Random) -> None:
    value: Any = ["ha"]
    for _ in range(50):
        value = [value, value]
    torch.save({"state": value, "param_groups": value, "lm_head": value}, path)


def endless(path: Path, draw: random.Random) -> None:
    value: list[Any] = []
    value.append(value)
    torch.save({"state": value, "a": value}, path)


def _load(path: Path) -> dict[Any, Any]:
    content = torch.load(path, weights_only=False)
    # training_args.bin holds an object of settings.
    return content if isinstance(content, dict) else vars(content)


def wide_tensor(path: Path, draw: random.Random) -> None:
    content = _load(path)
    wide = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save({key: wide for key in content} if draw.random() < 0.5 else {**content, "extra": wide}, path)


def another_value(path: Path, draw: random.Random) -> str:
    content = _load(path)
    place = draw.choice(_leaves(content))
    value = draw.choice([None, True, "x", [], {}, -3, float("nan"), 10**30, torch.tensor(float("nan")), torch.zeros(3)])
    try:
        torch.save(_replace(content, place, value), path)
    except TypeError:
        # Inside a tuple: the whole value then.
        torch.save({**content, place[0]: value}, path)
    return f"{place} = {value!r}"


def nan_tensor(path: Path, draw: random.Random) -> str:
    content = _load(path)
    tensors = [place for place in _leaves(content) if isinstance(_get(content, place), torch.Tensor)]
    if not tensors:
        return empty(path, draw) or "no tensor in it: emptied"
    place = draw.choice(tensors)
    value = _get(content, place)
    torch.save(_replace(content, place, torch.full(value.shape, float("nan"))), path)
    return str(place)


TORCH: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (zip_bomb, lying_sizes, code, laughs, endless, wide_tensor, another_value, nan_tensor)
}


def damages_of(name: str) -> dict[str, Damage]:
    """The damages that a file of this name can have."""
    own = {".json": JSON, ".safetensors": SAFETENSORS, ".pt": TORCH, ".pth": TORCH, ".bin": TORCH}.get(
        Path(name).suffix, {}
    )
    return ANY | own


def draw_case(draw: random.Random, kinds: dict[str, tuple[Path, tuple[str, ...]]]) -> tuple[str, str, str, str]:
    """Kind of folder, file in it, damage and verb."""
    kind = draw.choice(list(kinds))
    source, verbs = kinds[kind]
    name = draw.choice(sorted(path.name for path in source.iterdir()))
    every = damages_of(name)
    own = [damage for damage in every if damage not in ANY]
    # What is particular to a format comes up more often than what any file can have.
    damage = draw.choice(own if own and draw.random() < 0.65 else list(ANY))
    return kind, name, damage, draw.choice(verbs)


def damaged_copy(source: Path, target: Path, name: str, damage: str, seed: int) -> str:
    """Copy a folder, break one file of it; gives what was done, in words."""
    shutil.copytree(source, target)
    return str(damages_of(name)[damage](target / name, random.Random(seed)) or "")
