"""What a Chroma server's client is told, and what is found out about the server before it is used."""

import json
from typing import Any, cast

import chromadb
import chromadb.errors
import httpx
from chromadb.api.client import Client
from chromadb.config import Settings

from mlx_embeddings_server.stores.base import InvalidValue, StoreUnavailable

NO_CHROMA = "what answers at the Chroma URL is no Chroma"
_CONNECT_SECONDS = 5.0


def client_settings() -> Settings:
    # Neither usage statistics, nor settings from an .env that happens to lie in the working folder.
    return Settings(_env_file=None, anonymized_telemetry=False)  # type: ignore[call-arg]


class ChromaServer:
    """Chroma's client waits for ever, and raises a bare Exception for what is no Chroma's answer: so there is `ask`
    to call first, and the client's sessions are told.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS))
        self._hooks = {"response": [_refuse_foreign_answers]}

    def ask(self) -> None:
        """Raises, where no Chroma answers."""
        with httpx.Client(timeout=self._timeout, headers=self._headers, event_hooks=self._hooks) as client:
            reply = client.get(f"{self._url}/api/v2/heartbeat")
        if reply.is_success and "heartbeat" not in reply.text:
            raise StoreUnavailable(NO_CHROMA)

    def connect(self) -> Client:
        client = cast("Client", chromadb.HttpClient(host=self._url, headers=self._headers, settings=client_settings()))
        for session in sessions_of(client):
            session.timeout = self._timeout
            session.event_hooks = self._hooks
        return client


def sessions_of(client: Client) -> list[httpx.Client]:
    """Of a Chroma server's client, and of the one in it that looks after databases."""
    servers = client._server, cast("Any", client._admin_client)._server
    return [session for server in servers if isinstance(session := getattr(server, "_session", None), httpx.Client)]


def _refuse_foreign_answers(response: httpx.Response) -> None:
    if response.is_success and "json" in response.headers.get("Content-Type", ""):
        return
    try:
        body = json.loads(response.read())
    except ValueError:
        body = None
    if 300 <= response.status_code < 400:
        raise StoreUnavailable("what answers at the Chroma URL sends elsewhere: give the URL that it sends to")
    if response.status_code in (401, 403):
        raise StoreUnavailable("Chroma refuses this server's key: check collections_api_key")
    if response.status_code == 413:
        raise InvalidValue("the documents are too large for the Chroma server: send fewer, or smaller ones")
    if not isinstance(body, dict) or body.get("error") not in chromadb.errors.error_types:
        raise StoreUnavailable(f"Chroma, or what stands before it, answers with status {response.status_code}")
