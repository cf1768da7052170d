"""Text to tokens and back, by Hugging Face's tokenizers, and the tokens that end a text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tunebench import stored
from tunebench.errors import TuneBenchError

NAME = "tokenizer.json"
CONFIGS = ("generation_config.json", "config.json")  # the first that names the tokens counts
CONFIG_BYTES = 16 << 20


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; a TuneBenchError where it has none that can be read."""
    path = folder / NAME
    if not path.is_file():
        raise TuneBenchError(f"no {NAME} in {folder}.", "Copy it there from where the weights came from.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise TuneBenchError(f"cannot read {path} ({error}).", "Copy it again.") from None


def end_tokens(folder: Path) -> set[int]:
    """The tokens after which a model says no more."""
    for name in CONFIGS:
        try:
            found = stored.decode(stored.read_bytes(folder / name, CONFIG_BYTES)).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if found is not None:
            return {token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)}
    return set()


def encode(tokenizer: Tokenizer, text: str, vocab_size: int) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before any text, and the text's tokens; a TuneBenchError where the model has not all."""
    before: list[int] = tokenizer.encode("").ids
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    beyond = max([*before, *tokens], default=0)
    if beyond >= vocab_size:
        raise TuneBenchError(
            f"the tokenizer says token {beyond}, and the model has {vocab_size} of them.",
            "Name this model's own files.",
        )
    return before, tokens


class Written:
    """The text of tokens that come one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """What a further token adds; nothing while a letter lacks bytes."""
        return self._stream.step(self._tokenizer, token) or ""
