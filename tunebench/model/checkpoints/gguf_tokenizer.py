"""The tokenizer that a GGUF file carries, as one of the package tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunebench.errors import TuneBenchError, brief
from tunebench.model.checkpoints import COPY

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}"
_QWEN2 = rf"{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEGIN = r"[^\r\n\p{L}\p{N}]?"
_GPT4O = (
    rf"{_BEGIN}{_UPPER}*{_LOWER}+{_ENDING}?|{_BEGIN}{_UPPER}+{_LOWER}*{_ENDING}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "qwen2": _QWEN2, "gpt-4o": _GPT4O}
"""How text is cut before pairs are merged, by GGUF's name of it."""
DIGITS = ("smollm", "refact", "command-r", "starcoder")
"""Those that cut as GPT-2 does, each digit apart."""
PLAIN = ("gpt-2", "default", "olmo", "dolly", "gptneox", "mpt", "stablelm2")
"""Those that cut as GPT-2 does."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


def read_tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file's metadata; a TuneBenchError where there is none, or none of a kind that is read."""
    kind = fields.get("tokenizer.ggml.model")
    makers = {"gpt2": _bpe, "llama": _sentencepiece}
    if kind not in makers:
        raise TuneBenchError(f"{path} has a tokenizer of kind {str(kind)[:40]!r}, which is not read.")
    try:
        tokenizer = makers[kind]({key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()})
        tokenizer.add_special_tokens(list(_special(fields)))
    except TuneBenchError:
        raise
    except Exception as error:  # of Rust, or of metadata that do not fit to each other
        raise TuneBenchError(f"the tokenizer in {path} cannot be read ({brief(error)}).", COPY) from None
    return tokenizer


def _special(fields: Mapping[str, Any]) -> Iterator[Any]:
    from tokenizers import AddedToken

    kinds = fields.get("tokenizer.ggml.token_type", [])
    for text, kind in zip(fields["tokenizer.ggml.tokens"], kinds, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            yield AddedToken(text, normalized=False, special=kind == CONTROL)


def _bpe(said: Mapping[str, Any]) -> Tokenizer:
    """Pairs of bytes, written as GPT-2 writes them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {text: i for i, text in enumerate(said["tokens"])}
    merges = [tuple(pair.split(" ", 1)) for pair in said["merges"]]
    cut = said.get("pre", "default")
    first: list[Any] = []
    whole = cut in ("llama-bpe", "llama3", "gpt-4o")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
    if cut in SPLITS:
        first = [pre_tokenizers.Split(Regex(SPLITS[cut]), "isolated")]
    elif cut in DIGITS:
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif cut not in PLAIN:
        raise TuneBenchError(f"a tokenizer that cuts text as {cut[:40]!r} is not read.")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut not in SPLITS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    tokenizer.decoder = decoders.ByteLevel()
    _begin(tokenizer, said)
    return tokenizer


def _sentencepiece(said: Mapping[str, Any]) -> Tokenizer:
    """Pairs of pieces: of two that lie side by side, those whose whole has the best score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = said["tokens"], said["scores"]
    vocab = {text: i for i, text in enumerate(tokens)}
    merges = [pair for _, pair in sorted(_pairs(vocab, scores), key=lambda each: -each[0])]
    unknown = tokens[said.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = said.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _begin(tokenizer, said, default=True)
    return tokenizer


def _pairs(vocab: Mapping[str, int], scores: list[float]) -> Iterator[tuple[float, tuple[str, str]]]:
    """Every way to make a token of two others, with its score."""
    for text, i in vocab.items():
        for cut in range(1, len(text)):
            if text[:cut] in vocab and text[cut:] in vocab:
                yield scores[i], (text[:cut], text[cut:])


def _begin(tokenizer: Tokenizer, said: Mapping[str, Any], default: bool = False) -> None:
    """Put the token of the beginning first, where the file says so."""
    from tokenizers import processors

    place = said.get("bos_token_id")
    if said.get("add_bos_token", default) and place is not None:
        text = said["tokens"][place]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A $B", special_tokens=[(text, place)]
        )
