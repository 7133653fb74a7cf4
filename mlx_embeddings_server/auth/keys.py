"""One key for all who may call, and the files that keys and secrets are kept in."""

import hashlib
import logging
import os
import secrets
import stat

from mlx_embeddings_server.auth.caller import Caller, refused

log = logging.getLogger(__name__)

_MAX_FILE_BYTES = 64 * 1024
_USER = Caller("user", is_admin=True)


class KeyAccess:
    """Whoever has the key is the one user, and an admin."""

    takes_api_key = True

    def __init__(self, key: str) -> None:
        self._digest = _digest(key)

    async def identify(self, bearer: str | None, api_key: str | None) -> Caller:
        # Digests are of one length: how long the comparison takes says nothing of the key's own. Clients that know
        # neither which way is theirs send both.
        for given in (bearer, api_key):
            if given is not None and secrets.compare_digest(_digest(given), self._digest):
                return _USER
        about_token = "the key is wrong" if bearer is not None else None
        message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
        raise refused(message, "invalid_api_key", about_token=about_token)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def read_secret(path: str) -> str:
    """The file's text without the white space around it. Raises `ValueError`, without the text in the message."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:
        raise ValueError("is no path") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {_MAX_FILE_BYTES} bytes: it should hold the key alone")
    if os.name == "posix" and stat.S_ISREG(mode) and mode & stat.S_IROTH:
        log.warning("%s can be read by all users of this machine: chmod 600 keeps it from them", path)
    try:
        return content.decode().strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None
