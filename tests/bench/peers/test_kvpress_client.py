"""The client against a worker that speaks the protocol, written here from its description, and knows no presses."""

import gc
import io
import sys
import weakref

import pytest
import torch

from kvarn.bench.peers import KvpressSubject, KvpressWorker
from kvarn.bench.peers.kvpress_worker import receive, send
from kvarn.errors import KvarnError
from tiny_models import make_tiny

FAKE = """
import json, os, struct, sys

def hear():
    start = sys.stdin.buffer.read(8)
    if not start:
        sys.exit()
    header = json.loads(sys.stdin.buffer.read(struct.unpack(">Q", start)[0]))
    tensor = header.get("tensor")
    count = 8 * tensor["shape"][0] * tensor["shape"][1] if tensor else 0
    return header, sys.stdin.buffer.read(count)

def say(header, raw=b""):
    text = json.dumps(header).encode()
    sys.stdout.buffer.write(struct.pack(">Q", len(text)) + text + raw)
    sys.stdout.buffer.flush()

source, dtype, device, threads = sys.argv[1:]
if source == "broken":
    print("first\\nno weights here", file=sys.stderr)
    sys.exit(3)
if source == "refused":
    say({"error": "ImportError: No module named 'kvpress'"})
    sys.exit()
say({"versions": {"kvpress": "0", "dtype": dtype, "device": device, "threads": threads}})
opened = 0
while True:
    request, raw = hear()
    if request["op"] in ("open", "fork"):
        if request.get("press") == "Unknown":
            say({"error": "ValueError: kvpress has no press 'Unknown'"})
            continue
        opened += 1
        say({"session": opened, "ratio": request.get("ratio")})
    elif request["op"] == "read":
        shape = request["tensor"]["shape"]
        if shape == [1, 1]:
            print("Killed by the test", file=sys.stderr)
            os._exit(9)
        # The tokens' own bytes, as float32.
        say({"seconds": 0.5, "tensor": {"dtype": "float32", "shape": [shape[0], 2 * shape[1]]}}, raw)
    elif request["op"] == "held":
        say({"bytes": 1000 + request["session"], "entries": [[7, 7]] * 4})
    else:
        say({})
"""


@pytest.fixture
def worker(tmp_path):
    worker = fake(tmp_path)
    yield worker
    worker.close()


def fake(folder, source="somewhere") -> KvpressWorker:
    script = folder / "fake_worker.py"
    script.write_text(FAKE)
    model = make_tiny("llama")
    model.name_or_path = source
    return KvpressWorker(model, sys.executable, script)


def test_sessions(worker):
    session = KvpressSubject(worker, "SnapKVPress()", 0.25).open()
    threads = str(torch.get_num_threads())
    assert worker.versions == {"kvpress": "0", "dtype": "float32", "device": "cpu", "threads": threads}
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(session.read(tokens), tokens.view(torch.float32))
    assert session.seconds == 0.5
    fork = session.fork()
    fork.read(tokens)
    held, of_fork = session.held(), fork.held()
    assert (held.bytes, of_fork.bytes) == (1001, 1002)
    assert (held.dense_bytes, of_fork.dense_bytes) == (2 * 6 * 1024, 2 * 12 * 1024)
    assert held.entries == [[7, 7]] * 4
    assert held.peak_bytes is None
    session.close()


def test_a_budget_is_one_less_the_ratio(worker, monkeypatch):
    asked = []
    call = worker.call
    monkeypatch.setattr(worker, "call", lambda op, *args, **given: asked.append(given) or call(op, *args, **given))
    for budget in (0.25, 1.0, None):
        KvpressSubject(worker, "KnormPress()", budget).open()
    assert [given["ratio"] for given in asked] == [0.75, 0.0, None]


def test_large_tensors(worker):
    session = KvpressSubject(worker, "KnormPress()").open()
    tokens = torch.randint(1 << 40, (3, 1 << 18))
    assert torch.equal(session.read(tokens).view(torch.int64), tokens)


def test_an_error_leaves_the_worker_as_it_is(worker):
    with pytest.raises(KvarnError, match="kvpress: ValueError: kvpress has no press 'Unknown'"):
        KvpressSubject(worker, "Unknown").open()
    KvpressSubject(worker, "KnormPress()").open()


def test_the_death_of_a_worker_says_its_last_words(worker):
    session = KvpressSubject(worker, "KnormPress()").open()
    with pytest.raises(KvarnError, match=r"died \(exit status 9\); its last words: Killed by the test"):
        session.read(torch.ones(1, 1, dtype=torch.int64))
    assert KvpressSubject(worker, "KnormPress()").open().number == 1  # of a new worker


@pytest.mark.parametrize(
    ("source", "message"),
    [("broken", r"exit status 3.*first \| no weights here"), ("refused", "No module named 'kvpress'")],
)
def test_a_worker_that_cannot_start(tmp_path, source, message):
    worker = fake(tmp_path, source)
    for _ in range(2):
        with pytest.raises(KvarnError, match=message):
            KvpressSubject(worker, "KnormPress()").open()


def test_the_worker_ends_with_the_client(tmp_path):
    worker = fake(tmp_path)
    KvpressSubject(worker, "KnormPress()").open()
    process = worker._process
    worker.close()
    assert process.returncode is not None
    KvpressSubject(worker, "KnormPress()").open()
    process, gone = worker._process, weakref.ref(worker)
    del worker
    gc.collect()
    assert gone() is None
    assert process.returncode is not None


def test_no_environment(tmp_path, monkeypatch):
    model = make_tiny("llama")
    monkeypatch.setenv("KVARN_PEERS_PYTHON", str(tmp_path / "python"))
    with pytest.raises(KvarnError, match=rf"{tmp_path}/python is not there: run `make peers`"):
        KvpressSubject(KvpressWorker(model), "KnormPress()").open()
    monkeypatch.delenv("KVARN_PEERS_PYTHON")
    monkeypatch.chdir(tmp_path)
    assert KvpressWorker(model).python == tmp_path / ".peers/bin/python"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.bool])
def test_messages_come_back_as_they_were_sent(dtype):
    stream, tensor = io.BytesIO(), torch.randn(3, 4, 5).to(dtype)
    send(stream, {"name": "Kiruna · 73915"}, tensor.transpose(0, 2))
    send(stream, {"empty": True})
    stream.seek(0)
    header, received = receive(stream)
    assert header == {"name": "Kiruna · 73915"}
    assert received.dtype == dtype
    assert torch.equal(received, tensor.transpose(0, 2))
    assert receive(stream) == ({"empty": True}, None)
    with pytest.raises(EOFError):
        receive(stream)
