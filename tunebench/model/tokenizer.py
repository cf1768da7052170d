"""Text to tokens and back, by Hugging Face's tokenizers, and the tokens that end a text."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tunebench import stored
from tunebench.errors import TuneBenchError
from tunebench.model.checkpoints import Checkpoint

GENERATION, GENERATION_BYTES = "generation_config.json", 1 << 20


def end_tokens(checkpoint: Checkpoint) -> set[int]:
    """The tokens after which a model says no more, by a folder's generation_config.json or else its config."""
    try:
        said = stored.decode(stored.read_bytes(checkpoint.path / GENERATION, GENERATION_BYTES))["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        said = checkpoint.config.get("eos_token_id")
    return {token for token in (said if isinstance(said, list) else [said]) if isinstance(token, int)}


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
