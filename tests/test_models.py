import json
import multiprocessing
import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from kvarn import models
from kvarn.errors import ModelNotFound, Unsupported
from tiny_models import make_tiny

BYTES = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]  # printable ASCII, space and line end, as byte-level BPE spells
MERGES = ["Ġ Ġ", "Ċ Ċ", "a b", "Ġ ab", "1 2"]
TOKENS = ["<unk>", "<bos>", "<eos>", "<turn>", *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
SPECIAL, NORMAL, UNUSED = 3, 1, 5


def write_gguf(path: Path, model: PreTrainedModel, pre: str = "smollm") -> None:
    """Write a tiny Llama as its GGUF converter would: fp32, rows of Q and K in GGUF's rotary order."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = TOKENS + [f"<unused{i}>" for i in range(config.vocab_size - len(TOKENS))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([SPECIAL] * 4 + [NORMAL] * (len(TOKENS) - 4) + [UNUSED] * (len(tokens) - len(TOKENS)))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        array = weight.numpy()
        if heads := {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            key.split(".")[-2]
        ):
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("KVARN_CACHE", str(folder))
    return folder / "models"


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, make_tiny("llama"))
    return path


def converted(cache: Path) -> Path:
    """The one converted folder; there must be nothing else but locks."""
    (folder,) = [path for path in cache.iterdir() if path.suffix != ".lock"]
    return folder


# The built-in model


def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, prompt:]
    assert "Paris" in tokenizer.decode(output, skip_special_tokens=True)
    assert output[-1] == tokenizer.eos_token_id, "generation did not stop by itself"


def test_smollm2_is_as_its_model_card_says(smollm2):
    model, tokenizer = smollm2
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.max_position_embeddings == tokenizer.model_max_length == 8192
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_smollm2_tokenizer(smollm2):
    model, tokenizer = smollm2
    tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert tokens == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.padding_side == "left"
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.tokenize("\n\n1. and  42") == ["ĊĊ", "1", ".", "Ġand", "ĠĠ", "4", "2"]
    text = "Don't strip , this: naïve ½ 日本 ▁ 😀\n\n\t 3 !"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_smollm2_second_load_is_quick_and_identical(smollm2, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(models, "_convert", fail)
    start = time.perf_counter()
    again, _ = models.load("smollm2", device="cpu", dtype=torch.float32)
    assert time.perf_counter() - start < 20  # the conversion takes longer even on an idle machine
    for key, weight in smollm2[0].state_dict().items():
        assert torch.equal(weight, again.state_dict()[key]), key


def test_missing_package_says_how_to_get_it(cache, monkeypatch):
    built_in = models._BUILT_IN["smollm2"]
    absent = models._BuiltIn("kvarn-no-such-package", "1.0", built_in.file, built_in.sha256, "")
    monkeypatch.setitem(models._BUILT_IN, "smollm2", absent)
    with pytest.raises(ModelNotFound, match=r"pip install .*kvarn-no-such-package==1\.0"):
        models.load("smollm2")
    (info,) = models.available()
    assert info.path is None
    assert "pip install" in info.description


def test_missing_file_in_package(cache, monkeypatch):
    built_in = models._BUILT_IN["smollm2"]
    # pytest stands for a package that is there but lacks the file.
    monkeypatch.setitem(models._BUILT_IN, "smollm2", models._BuiltIn("pytest", "1.0", built_in.file, "", ""))
    with pytest.raises(ModelNotFound, match="has no file"):
        models.load("smollm2")


def test_damaged_package_file(cache, tiny_gguf, monkeypatch):
    monkeypatch.setattr(models, "_find_in_package", lambda _: tiny_gguf)
    with pytest.raises(ModelNotFound, match="SHA-256"):
        models.load("smollm2")
    assert not cache.exists()


# GGUF files


def test_gguf_gives_the_same_logits(cache, tiny_gguf):
    original = make_tiny("llama")
    model, _ = models.load(tiny_gguf, device="cpu")
    ids = torch.randint(4, 100, (2, 40))
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    assert model.generation_config.eos_token_id == [2, 3]


def test_gguf_tokenizer(cache, tiny_gguf):
    _, tokenizer = models.load(str(tiny_gguf), device="cpu")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<eos>")
    assert tokenizer.tokenize("\n\n12 ab  1") == ["ĊĊ", "1", "2", "Ġab", "ĠĠ", "1"]
    assert tokenizer.decode(tokenizer.encode("ab , 12 !")) == "ab , 12 !"


def test_gguf_is_converted_once_until_it_changes(cache, tiny_gguf, capsys):
    models.load(tiny_gguf)
    folder = converted(cache)
    assert "converting" in capsys.readouterr().err
    models.load(tiny_gguf)
    assert converted(cache) == folder
    assert "converting" not in capsys.readouterr().err
    write_gguf(tiny_gguf, make_tiny("llama", seed=1))
    model, _ = models.load(tiny_gguf, device="cpu")
    assert "converting" in capsys.readouterr().err
    assert torch.equal(model.lm_head.weight, make_tiny("llama", seed=1).lm_head.weight)


@pytest.mark.parametrize("damage", ["missing", "cut", "manifest"])
def test_damaged_cache_is_rebuilt(cache, tiny_gguf, damage):
    models.load(tiny_gguf)
    folder = converted(cache)
    if damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "cut":
        os.truncate(folder / "model.safetensors", 1000)
    else:
        (folder / "kvarn.json").write_text('{"files": ')
    model, tokenizer = models.load(tiny_gguf, device="cpu")
    assert torch.equal(model.lm_head.weight, make_tiny("llama").lm_head.weight)
    assert tokenizer.eos_token == "<eos>"


def test_interrupted_conversion_leaves_nothing(cache, tiny_gguf, monkeypatch):
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.load(tiny_gguf)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    # One that was killed could not tidy up; the next removes what it left.
    lock = next(cache.iterdir())
    (cache / f"{lock.stem}.partial-killed").mkdir()
    models.load(tiny_gguf)
    assert converted(cache).name == lock.stem


def _load_and_report(path: Path, start, results) -> None:
    conversions = 0
    convert = models._convert

    def slow(gguf: Path, folder: Path):
        nonlocal conversions
        conversions += 1
        time.sleep(1)  # the other process certainly arrives meanwhile
        return convert(gguf, folder)

    models._convert = slow
    start.wait()
    model, _ = models.load(path, device="cpu")
    results.put((conversions, model.lm_head.weight.sum().item()))


def test_two_processes_convert_once(cache, tiny_gguf, monkeypatch):
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(2, timeout=300), spawn.Queue()
    other = spawn.Process(target=_load_and_report, args=(tiny_gguf, start, results))
    other.start()
    monkeypatch.setattr(models, "_convert", models._convert)  # put back after the test
    _load_and_report(tiny_gguf, start, results)
    reports = [results.get(timeout=300) for _ in range(2)]
    other.join()
    assert sorted(conversions for conversions, _ in reports) == [0, 1]
    assert {total for _, total in reports} == {make_tiny("llama").lm_head.weight.sum().item()}
    converted(cache)


def test_available_lists_converted_files(cache, tiny_gguf):
    assert [info.name for info in models.available()] == ["smollm2"]
    models.load(tiny_gguf)
    _, info = models.available()
    assert (info.name, info.path) == (str(tiny_gguf), converted(cache))
    assert info.size == sum(file.stat().st_size for file in info.path.iterdir())
    assert "llama: 0.1M parameters" in info.description
    tiny_gguf.unlink()
    assert models.available()[1].name == str(info.path)
    models.load(models.available()[1].name)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all" * 100])
def test_no_gguf(cache, tmp_path, content):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelNotFound, match=r"wrong\.gguf: damaged"):
        models.load(path)


def test_cut_gguf(cache, tiny_gguf):
    os.truncate(tiny_gguf, tiny_gguf.stat().st_size // 2)
    with pytest.raises(ModelNotFound, match=r"tiny\.gguf: damaged"):
        models.load(tiny_gguf)


def test_gguf_of_unknown_architecture(cache, tmp_path):
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "kvarn-odd")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Unsupported, match="kvarn-odd"):
        models.load(path)


def test_gguf_with_unknown_splitting_rule(cache, tmp_path):
    path = tmp_path / "odd.gguf"
    write_gguf(path, make_tiny("llama"), pre="kvarn-odd")
    with pytest.raises(Unsupported, match=r"odd\.gguf.*kvarn-odd.*smollm"):
        models.load(path)


# Folders, hub ids and names


@pytest.fixture
def folder(tmp_path: Path, cache: Path, tiny_gguf: Path) -> Path:
    model, tokenizer = models.load(tiny_gguf, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_folder_round_trip(folder):
    model, tokenizer = models.load(folder, dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.device.type == "cpu"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model.lm_head.weight, make_tiny("llama").lm_head.weight.bfloat16())
    assert tokenizer.tokenize("ab") == ["ab"]


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="saved") as caught:
        models.load(folder)
    assert isinstance(caught.value.__cause__, OSError)


def test_folder_with_cut_weights(folder):
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(ModelNotFound, match="incomplete or damaged"):
        models.load(folder)


def test_folder_that_lacks_a_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFound, match=r"9 weights are missing, the first is model\.layers\.4\."):
        models.load(folder)


def test_folder_of_another_kind(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(Unsupported, match="causal language model"):
        models.load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2", 'did you mean "smollm2"'),
        ("SmolLM2", 'did you mean "smollm2"'),
        ("./absent", "no such folder"),
        ("/absent/model", "no such folder"),
        ("absent.gguf", "no such file"),
        (Path("absent"), "no such folder"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ModelNotFound, match=message):
        models.load(name)


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        models.load(tmp_path)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"neither a folder nor a \.gguf file"):
        models.load(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["kvarn/no-such-model", "not an id at all"])
def test_hub_id_out_of_reach(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="cannot be reached") as caught:
        models.load(name)
    assert caught.value.__cause__ is not None


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path / "mine"))
    assert models.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("KVARN_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "kvarn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / ".cache" / "kvarn"
