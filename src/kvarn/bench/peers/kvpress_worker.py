"""Serves kvpress's presses on one model to a client in another process, because they need another transformers.

    python -I kvpress_worker.py MODEL DTYPE DEVICE THREADS

Stand-alone: it must not import kvarn. Messages come on stdin and go to stdout: the length of a header (8 bytes, big
endian), the header (JSON), and where it has ``tensor`` (``dtype``, ``shape``) the raw bytes of a tensor. The worker
says first that it is ready; then every request has one answer, ``{"error": …}`` where it failed. Requests:

``open``   ``press``, ``ratio`` (null: as the press says) -> ``session``
``read``   ``session``, tokens int64 [B, q] -> ``seconds``, logits float32 [B, vocabulary]
``fork``   ``session`` -> ``session``
``held``   ``session`` -> ``bytes``, ``entries`` (of each layer's KV heads)
``keys``   ``session``, ``layer`` -> keys [B, K, n, D]
``close``  ``session``

The worker ends when its stdin does.
"""

import ast
import contextlib
import copy
import json
import os
import struct
import sys
import time
from dataclasses import dataclass, fields
from types import FunctionType, ModuleType
from typing import Any, BinaryIO

import torch
from torch import Tensor

# What the client shares with the worker.


def send(stream: BinaryIO, header: dict[str, Any], tensor: Tensor | None = None) -> None:
    """Writes one message."""
    if tensor is not None:
        tensor = tensor.detach().cpu().contiguous()
        header = {**header, "tensor": {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}}
    encoded = json.dumps(header).encode()
    stream.write(struct.pack(">Q", len(encoded)) + encoded)
    if tensor is not None:
        stream.write(tensor.flatten().view(torch.uint8).numpy().data)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], Tensor | None]:
    """Reads one message; raises EOFError where the stream ends before it does."""
    header = json.loads(_exactly(stream, struct.unpack(">Q", _exactly(stream, 8))[0]))
    if "tensor" not in header:
        return header, None
    like = header.pop("tensor")
    tensor = torch.empty(like["shape"], dtype=getattr(torch, like["dtype"]))
    return header, torch.frombuffer(_exactly(stream, tensor.nbytes), dtype=tensor.dtype).view(tensor.shape)


def held_bytes(root: Any, device: torch.device) -> int:
    """Bytes on ``device`` of all tensors that can be reached from ``root`` through attributes, containers and the
    parts of tensor subclasses. A storage counts whole and once, however many tensors are views of it."""
    storages: dict[int, int] = {}
    seen: dict[int, Any] = {}  # holds what it has seen: an id is not given twice while its owner lives
    left = [root]
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType, FunctionType)):
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            if hasattr(item, "__tensor_flatten__"):  # a wrapper of tensors, which has no storage of its own
                left += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
            elif item.device == device:
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            left += item
        elif hasattr(item, "__dict__"):
            left += vars(item).values()
    return sum(storages.values())


def replica(cache: Any) -> Any:
    """A second transformers cache with the same contents. It shares tensors, which these caches replace but never
    write to; copy.deepcopy would copy them all, and cannot copy quanto's."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def _exactly(stream: BinaryIO, count: int) -> bytearray:
    buffer = bytearray(count)
    rest = memoryview(buffer)
    while rest:
        got = stream.readinto(rest)  # type: ignore[attr-defined]
        if not got:
            raise EOFError("the stream ended within a message")
        rest = rest[got:]
    return buffer


# The worker.


@dataclass
class _Session:
    press: Any
    cache: Any
    attention: str
    masked: list[Any]  # for each layer, the entries that a press such as AdaKV's has masked, not removed
    position: int = 0  # of the next token; the cache is shorter after compression


class _Server:
    """The model and its sessions; its public methods are the requests."""

    def __init__(self, model: Any):
        self._model = model
        decoder = getattr(model.model, "language_model", model.model)
        self._attentions = [layer.self_attn for layer in decoder.layers]
        self._sessions: dict[int, _Session] = {}
        self._opened = 0

    def open(self, press: str, ratio: float | None) -> dict[str, Any]:
        from transformers import DynamicCache

        made = _press(press)
        if ratio is not None:
            _set_ratio(made, ratio)
        attention = "eager" if _observes_attention(made) else "sdpa"
        return self._add(_Session(made, DynamicCache(), attention, [None] * len(self._attentions)))

    @torch.no_grad()
    def read(self, session: int, tensor: Tensor) -> tuple[dict[str, Any], Tensor]:
        state = self._sessions[session]
        self._model.set_attn_implementation(state.attention)
        for module, masked in zip(self._attentions, state.masked, strict=True):
            module.masked_key_indices = masked
        tokens = tensor.to(self._model.device)
        count = tokens.shape[1]
        positions = torch.arange(state.position, state.position + count, device=tokens.device).expand(len(tokens), -1)
        is_prompt = state.position == 0 and count > 1
        start = self._now()
        with state.press(self._model) if is_prompt else contextlib.nullcontext():
            output = self._model(tokens, position_ids=positions, past_key_values=state.cache, logits_to_keep=1)
        seconds = self._now() - start
        state.masked = [getattr(module, "masked_key_indices", None) for module in self._attentions]
        state.position += count
        if is_prompt and _renumbers(state.press):
            state.position = state.cache.get_seq_length()
        return {"seconds": seconds}, output.logits[:, -1].float()

    def fork(self, session: int) -> dict[str, Any]:
        state = copy.copy(self._sessions[session])
        state.cache = replica(state.cache)
        return self._add(state)

    def held(self, session: int) -> dict[str, Any]:
        state = self._sessions[session]
        entries = [[layer.keys.shape[2]] * layer.keys.shape[1] for layer in state.cache.layers]
        return {"bytes": held_bytes([state.cache, state.masked], self._model.device), "entries": entries}

    def keys(self, session: int, layer: int) -> tuple[dict[str, Any], Tensor]:
        return {}, self._sessions[session].cache.layers[layer].keys

    def close(self, session: int) -> dict[str, Any]:
        del self._sessions[session]
        return {}

    def _add(self, state: _Session) -> dict[str, Any]:
        self._opened += 1
        self._sessions[self._opened] = state
        return {"session": self._opened}

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter()


def _press(text: str) -> Any:
    """A press from ``"Name(parameter=value, …)"``, where values are literals, presses, or lists of these."""
    import kvpress

    made = _built(ast.parse(text.strip(), mode="eval").body)
    if not isinstance(made, kvpress.BasePress):
        raise ValueError(f"{text!r} is not a press")
    steps = (kvpress.DecodingPress, kvpress.PrefillDecodingPress)
    if isinstance(made, steps) or getattr(made, "decoding", False):
        raise ValueError(
            f"{type(made).__name__} acts between decoding steps; only presses that act on prompts run here"
        )
    return made


def _built(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        node = ast.Call(node, [], [])
    if isinstance(node, ast.List):
        return [_built(element) for element in node.elts]
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    if not isinstance(node.func, ast.Name):
        raise ValueError(f"{ast.unparse(node)!r} is not the name of a press")
    press = _class(node.func.id)
    takes = [field.name for field in fields(press) if field.init]
    for keyword in node.keywords:
        if keyword.arg not in takes:
            raise ValueError(
                f"{press.__name__} has no parameter {keyword.arg!r}; it takes {', '.join(takes) or 'none'}"
            )
    return press(*map(_built, node.args), **{str(k.arg): _built(k.value) for k in node.keywords})


def _class(name: str) -> type:
    import kvpress

    presses = {n: c for n in kvpress.__all__ if issubclass(c := getattr(kvpress, n), kvpress.BasePress)}
    if name not in presses:
        raise ValueError(f"kvpress has no press {name!r}; it has {', '.join(sorted(presses))}")
    return presses[name]


def _set_ratio(press: Any, ratio: float) -> None:
    name = type(press).__name__
    with contextlib.suppress(AttributeError):  # of those that compute their ratio
        if hasattr(type(press), "compression_ratio"):
            press.compression_ratio = ratio
            return
    raise ValueError(f"{name} takes no compression ratio, so no budget; name its own parameters instead")


def _observes_attention(press: Any) -> bool:
    """Whether the press, or one inside it, needs the attention weights, which only "eager" computes."""
    import kvpress

    if isinstance(press, list):
        return any(map(_observes_attention, press))
    if not isinstance(press, kvpress.BasePress):
        return False
    return isinstance(press, kvpress.ObservedAttentionPress) or any(map(_observes_attention, vars(press).values()))


def _renumbers(press: Any) -> bool:
    """Whether what the press keeps gets positions from 0 on, as kvpress's pipeline tells."""
    import kvpress

    renumbering = isinstance(press, (kvpress.KeyRerotationPress, kvpress.RestoreKVPress))
    return renumbering or (isinstance(press, kvpress.FinchPress) and press.rerotate_keys)


def _load(source: str, dtype: str, device: str, threads: str) -> tuple[_Server, dict[str, Any]]:
    from importlib import metadata

    import kvpress  # noqa: F401 (patches transformers' attention, so it comes before the model)
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).to(device).eval()
    versions = {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    return _Server(model.requires_grad_(False)), versions


def _answer(server: _Server, request: dict[str, Any], tensor: Tensor | None) -> tuple[dict[str, Any], Tensor | None]:
    given = {name: value for name, value in request.items() if name != "op"}
    result = getattr(server, request["op"])(**given, **({} if tensor is None else {"tensor": tensor}))
    return result if isinstance(result, tuple) else (result, None)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between messages
    try:
        server, versions = _load(*sys.argv[1:])
    except Exception as error:
        send(answers, {"error": _in_words(error)})
        return
    send(answers, {"versions": versions})
    while True:
        try:
            request, tensor = receive(requests)
        except EOFError:
            return
        try:
            answer = _answer(server, request, tensor)
        except Exception as error:
            answer = {"error": _in_words(error)}, None
        send(answers, *answer)


if __name__ == "__main__":
    main()
