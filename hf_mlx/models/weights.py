"""What lies in a model folder: its safetensors, read header by header before a byte of weight is loaded.

``mx.load`` maps a file lazily, so a truncated or edited file would only fail (or give garbage) at
the first use, deep inside a step. Every header is therefore checked against the file first.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..intake import LARGE, Intake, lies
from .config import FILES

# safetensors 0.8 dtype names and their width in bits; sub-byte types pack without padding.
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "C64": 64,
}  # fmt: skip
_MAX_SIZE = 2**31 - 1  # of one axis
_MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
_FILES = Intake(
    ModelError,
    "the download or copy was cut short, or the file was edited: fetch it again, or save the model again with "
    "model.save_pretrained(folder)",
)
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """One tensor as its header declares it."""

    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a folder: file names, and every tensor by its stored name.

    Attributes:
        files: Safetensors file names, sorted.
        tensors: Stored name to :class:`Tensor`.
        layout: ``"mlx"`` when mlx-lm wrote the files (names and layouts are MLX's), else ``"hf"``.
    """

    files: tuple[str, ...]
    tensors: dict[str, Tensor]
    layout: str


def inspect_checkpoint(folder: Path) -> Checkpoint:
    """Reads and checks every header of ``folder``'s ``model*.safetensors``.

    Raises:
        ModelError: No safetensors; a truncated, edited or unreadable file; an index that names files or
            tensors that are not there; one tensor name in two files.
    """
    files = sorted(folder.glob("model*.safetensors"))
    _check_index(folder, {f.name for f in files})
    if not files:
        raise _no_safetensors(folder)
    tensors: dict[str, Tensor] = {}
    formats = set()
    for file in files:
        header, metadata = read_header(file)
        formats.add(metadata.get("format"))
        for name, entry in header.items():
            if name in tensors:
                raise ModelError(
                    f"{folder}: tensor {name!r} is stored in {tensors[name].file} and again in {file.name}",
                    "each tensor stored once, so that it is clear which weights are meant",
                    "a folder with the files of one model: AutoModelForCausalLM.from_pretrained(original)"
                    '.save_pretrained("a-new-folder")',
                )
            tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), file.name)
    _check_weight_map(folder, tensors)
    return Checkpoint(tuple(f.name for f in files), tensors, "mlx" if formats == {"mlx"} else "hf")


def read_header(file: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Reads one safetensors header and proves it against the file's length.

    Returns:
        The entries by tensor name, and the ``__metadata__`` mapping.

    Raises:
        ModelError: The file is shorter or longer than its header says, or the header is not valid.
    """
    with _FILES.open(file) as (stream, size):
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise _broken(file, f"its first 8 bytes announce a header of {length} bytes in a file of {size}")
        text = stream.read(length)
    header = _FILES.parse(text, file, part="its header is ")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(file, "its __metadata__ is not an object of strings")
    spans = sorted(_span(file, name, entry) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise _broken(file, f"tensor {name!r} starts at byte {start}, where {end} is due")
        end = stop
    if size - 8 - length != end:
        raise _broken(file, f"{size - 8 - length} bytes of data where the header promises {end}")
    return header, metadata


def _span(file: Path, name: str, entry: object) -> tuple[int, int, str]:
    try:
        dtype, shape = entry["dtype"], entry["shape"]  # pyright: ignore[reportIndexIssue]
        start, stop = entry["data_offsets"]  # pyright: ignore[reportIndexIssue]
        bits = _BITS[dtype]
    except (KeyError, TypeError, ValueError):
        raise _broken(file, f"the header entry of {name!r} is not valid: {entry!r}"[:300]) from None
    sizes = [start, stop, *shape] if isinstance(shape, list) else [None]
    # JSON's true is an int in Python; MLX counts in 32 bits.
    if not all(type(n) is int and n >= 0 for n in sizes) or len(shape) > 16 or any(n > _MAX_SIZE for n in shape):
        raise _broken(file, f"the header entry of {name!r} is not valid: {entry!r}"[:300])
    expected = (math.prod(shape) * bits + 7) // 8
    if stop - start != expected:
        raise _broken(file, f"tensor {name!r} of {dtype} {tuple(shape)} takes {expected} bytes, not {stop - start}")
    return start, stop, name


def _broken(file: Path, what: str) -> ModelError:
    return ModelError(f"{file}: {what}", "a complete safetensors file", _FILES.remedy)


def _no_safetensors(folder: Path) -> ModelError:
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    gguf = sorted(folder.glob("*.gguf"))
    if pickles:
        found = f"only {', '.join(p.name for p in pickles[:3])}, which are pickles"
    elif gguf:
        found = f"only {gguf[0].name}"
    else:
        found = "no weight file"
    source = f'"{folder}", gguf_file="{gguf[0].name}"' if gguf and not pickles else f'"{folder}"'
    return ModelError(
        f"{folder}: {found}",
        "weights in model*.safetensors",
        f"convert once, where torch is installed: AutoModelForCausalLM.from_pretrained({source})"
        f'.save_pretrained("{folder}-safetensors")',
    )


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / _INDEX
    if not lies(path):
        return None
    weight_map = FILES.read_json(path, limit=LARGE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FILES.refuse(path, "not a readable index", 'a JSON object with a "weight_map" from tensors to files')
    return weight_map


def _check_index(folder: Path, present: set[str]) -> None:
    weight_map = _read_index(folder)
    if weight_map is None:
        return
    missing = sorted(set(weight_map.values()) - present)
    if missing:
        raise ModelError(
            f"{folder}: {_INDEX} names {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}, "
            f"{len(missing)} file(s) that are not there",
            "every shard that the index names",
            "download the missing shards into the folder (hf download MODEL --local-dir FOLDER)",
        )


def _check_weight_map(folder: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = _read_index(folder)
    if weight_map is None:
        return
    wrong = sorted(n for n, file in weight_map.items() if n not in tensors or tensors[n].file != file)
    if wrong:
        raise ModelError(
            f"{folder}: {_INDEX} places {wrong[0]!r} in {weight_map[wrong[0]]}, where it is not "
            f"({len(wrong)} such tensor(s))",
            "shards that hold the tensors the index lists",
            "the shards come from another version of the model: download the whole folder again",
        )
