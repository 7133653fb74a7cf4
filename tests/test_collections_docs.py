"""docs/collections.md's commands, as they stand."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from mlx_embeddings_backends import detect
from tests.server import MINILM
from tests.threaded import ThreadedServer

DOCS = Path(__file__).parents[1] / "docs" / "collections.md"


def test_the_commands_of_the_documentation_do_what_it_says(tmp_path: Path) -> None:
    commands, *_ = re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert "http://localhost:8888/" in commands
    file = tmp_path / "settings.yaml"
    file.write_text(
        json.dumps({"model": [MINILM], "collections": "chroma", "collections_path": str(tmp_path / "kept")})
    )
    with ThreadedServer(file, detect.load) as server:
        script = commands.replace("http://localhost:8888", str(server.client.base_url).rstrip("/")).replace(
            "curl ", "curl --noproxy '*' -sSf -w '\\n' "
        )
        ended = subprocess.run(["sh", "-e", "-c", script], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        made, put, found, listed, counted, read, filtered, deleted, gone = map(_parsed, ended.stdout.split("\n")[:9])
        assert server.client.get("/v1/collections").json() == []
    facts = {"provider": "local", "embedding_model": MINILM, "embedding_dimension": 384}
    assert made == {"name": "news", "metadata": {"domain": "news"} | facts} and listed == [made]
    assert put["count"] == 3 and put["ids"][:2] == ["rain", "final"]
    assert [each["id"] for each in found["results"]] == ["final", "rain"]
    assert counted == made | {"count": 3, "embedding_dimension": 384}
    assert [each["id"] for each in read["documents"]] == ["rain", "final"]
    assert filtered == {"documents": [{"id": "final", "text": "The home team won the final."}]}
    assert (deleted, gone) == ({"deleted": 1}, None)


def _parsed(line: str) -> Any:
    return json.loads(line) if line else None
