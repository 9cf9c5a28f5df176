"""The tokenizer of a GGUF file.

transformers reads one too, but gets much of it wrong: BOS for EOS and GPT-2's splitting rule in Llama-architecture
files, a Unigram model without chat tokens for Gemma, no BOS added. Other tokens than a model was trained on make every
measurement of it worthless, so kvarn builds the two common kinds itself, from what the file says.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvarn.errors import Unsupported

Fields = Mapping[str, Any]  # a GGUF file's metadata: field name → str, number, or list of these

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of `tokenizer.ggml.token_type`

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split_by(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# How byte-level BPE splits text into the pieces it merges within, by `tokenizer.ggml.pre`.
_SPLITS = {
    "default": [_GPT2],
    "gpt-2": [_GPT2],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _GPT2],
    "llama-bpe": _split_by(_LLAMA3),
    "qwen2": _split_by(_QWEN2),
    "deepseek-r1-qwen": _split_by(_QWEN2),
}


def build_tokenizer(fields: Fields) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file's metadata describes, with its chat template if there is one.

    Raises Unsupported for kinds other than byte-level BPE with a known splitting rule and SentencePiece BPE.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, adds_bos = _byte_level_bpe(fields)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece_bpe(fields), True
    else:
        raise Unsupported(f"its tokenizer is of kind {kind!r}; kvarn reads 'gpt2' and 'llama'")
    _add_special_tokens(backend, fields)

    named = {name: _token(fields, field) for name, field in _NAMED.items()}
    if fields.get("tokenizer.ggml.add_bos_token", adds_bos) and (bos := named["bos_token"]):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    named["pad_token"] = named["pad_token"] or named["eos_token"]  # a batch needs one, and padding is masked anyway
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def stop_tokens(fields: Fields) -> int | list[int] | None:
    """Ids that end generation: end of sequence and, where the file names one, end of turn."""
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot")]
    ids = sorted({fields[name] for name in names if name in fields})
    return ids if len(ids) > 1 else next(iter(ids), None)


_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _token(fields: Fields, name: str) -> str | None:
    token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
    return None if token_id is None else fields["tokenizer.ggml.tokens"][token_id]


def _byte_level_bpe(fields: Fields) -> tuple[Tokenizer, bool]:
    rule = fields.get("tokenizer.ggml.pre", "default")
    if rule not in _SPLITS:
        raise Unsupported(f"its tokenizer splits text by the rule {rule!r}; kvarn knows {', '.join(_SPLITS)}")
    llama3 = rule == "llama-bpe"
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=llama3))
    if "qwen" in rule:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[rule])
    backend.decoder = decoders.ByteLevel()
    return backend, llama3


def _sentencepiece_bpe(fields: Fields) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    backend = Tokenizer(
        BPE(vocabulary, _merges(fields), unk_token=_token(fields, "unknown"), fuse_unk=True, byte_fallback=True)
    )
    prefixed = fields.get("tokenizer.ggml.add_space_prefix", True)
    # Not normalizers: those would put the prefix after every special token too, not only at the start of the text.
    scheme = "first" if prefixed else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return backend


def _merges(fields: Fields) -> list[tuple[str, str]]:
    """SentencePiece keeps a score per token, not a list of merges: the pair whose union scores best merges first."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    score = {t: s for t, s, k in zip(tokens, scores, fields["tokenizer.ggml.token_type"], strict=True) if k == _NORMAL}
    return [
        (token[:cut], token[cut:])
        for token in sorted(score, key=lambda token: -score[token])
        for cut in range(1, len(token))
        if token[:cut] in score and token[cut:] in score
    ]


def _add_special_tokens(backend: Tokenizer, fields: Fields) -> None:
    """Make control and user-defined tokens match as a whole, before anything else does."""
    kinds = fields.get("tokenizer.ggml.token_type", [])
    control = [t for t, kind in zip(fields["tokenizer.ggml.tokens"], kinds, strict=False) if kind == _CONTROL]
    user = [t for t, kind in zip(fields["tokenizer.ggml.tokens"], kinds, strict=False) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user])
