"""Token ids of a tiktoken encoding back to text, for clients that send those instead of the model's own (LangChain)."""

import threading
from collections.abc import Sequence

import tiktoken

from mlx_embeddings_server.errors import InvalidInput, Unavailable


class TokenDecoder:
    """Decodes ids of one encoding. Its vocabulary is fetched and kept by tiktoken when it is first needed."""

    def __init__(self, encoding_name: str) -> None:
        self.encoding_name = encoding_name
        self._encoding: tiktoken.Encoding | None = None
        self._loading = threading.Lock()

    def decode(self, ids: Sequence[int], where: str) -> str:
        """May block on the network the first time: call it off the event loop."""
        encoding = self._load()
        try:
            text = encoding.decode(list(ids), errors="replace")
        except (KeyError, OverflowError) as error:
            raise InvalidInput(
                where,
                f"has an id that {self.encoding_name} does not know ({error}): see --token-encoding",
                code="invalid_token_id",
            ) from error
        if not text:
            raise InvalidInput(where, "decodes to an empty text", code="empty_input")
        return text

    def _load(self) -> tiktoken.Encoding:
        with self._loading:
            if self._encoding is None:
                try:
                    self._encoding = tiktoken.get_encoding(self.encoding_name)
                except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
                    raise Unavailable(
                        f"the vocabulary of {self.encoding_name} cannot be had: the server needs network access once, "
                        "or TIKTOKEN_CACHE_DIR set to a folder that has it; or send texts instead of token ids",
                        code="token_encoding_unavailable",
                    ) from error
            return self._encoding


def is_known_encoding(name: str) -> bool:
    return name in tiktoken.list_encoding_names()


def known_encodings() -> list[str]:
    return sorted(tiktoken.list_encoding_names())
