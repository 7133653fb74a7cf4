"""A stand-in for the Hugging Face Hub: what a download asks of it, for a few repositories."""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def blank(*names: str) -> dict[str, bytes]:
    return {name: json.dumps(name).encode() for name in names}


def modules(**kinds: str) -> dict[str, bytes]:
    listed = [{"path": path.replace("root", ""), "type": f"models.{kind}"} for path, kind in kinds.items()]
    return {"modules.json": json.dumps(listed).encode()}


def index(*shards: str) -> dict[str, bytes]:
    return {"model.safetensors.index.json": json.dumps({"weight_map": dict(enumerate(shards))}).encode()}


ST = {"root": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
TINY = {
    **blank("config.json", "1_Pooling/config.json", "tokenizer.json", "vocab.txt", "templates/chat [1].jinja"),
    **modules(**ST),
    "model.safetensors": bytes(range(256)) * 400,
}
UNWANTED = {
    "README.md", "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.bin", "modeling_evil.py",
    "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.gguf", "training_args.bin", "optimizer.pt",
    "trainer_state.json", "runs/events.json", ".hidden/config.json", "checkpoint-500/model.safetensors",
}  # fmt: skip
ROUTE = re.compile(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)()|/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)")
SHUT = {"acme/gated": "GatedRepo", "acme/closed": ""}
BROKEN = {"acme/down": (503, b""), "acme/portal": (200, b"<html>Please log in</html>"), "acme/slow": (500, b"")}


class Hub(ThreadingHTTPServer):
    """The part of the Hub's API that a download uses, for a few repositories."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {"acme/tiny": TINY | blank(*UNWANTED)}  # by repository
        self.requests: list[str] = []
        self.cut: dict[str, int] = {}  # the next GET of this file breaks off after so many bytes
        self.failing: set[str] = set()  # files that cannot be had now
        self.held: dict[str, threading.Event] = {}  # files that come when the event is set
        self.tells_sizes = True


class HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        route = ROUTE.fullmatch(unquote(urlsplit(self.path).path))
        query = "blobs=" in urlsplit(self.path).query
        if route is None:  # huggingface_hub also asks for things that are not about models
            return self.send(404)
        name, kind, revision, file = (part for part in route.groups() if part is not None)
        self.server.requests.append(f"{self.command} {file or kind} {self.headers.get('Range', '')}".strip())
        if name == "acme/slow":
            time.sleep(1.5)
        if name in BROKEN:
            self.send(*BROKEN[name])
        elif name not in self.server.files:
            self.send(404, X_Error_Code="RepoNotFound")
        elif revision not in (COMMIT, "main", "v1"):
            self.send(404, X_Error_Code="RevisionNotFound")
        elif kind == "revision":
            files = self.server.files[name]
            # The Hub tells sizes to who asks for them.
            sized = query and self.server.tells_sizes
            told = [{"rfilename": file} | ({"size": len(files[file])} if sized else {}) for file in files]
            self.send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": told}).encode())
        elif name in SHUT and self.headers.get("Authorization") != "Bearer hf_letmein":
            self.send(403, X_Error_Code=SHUT[name])
        elif kind == "tree":
            tree = [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in self.server.files[name]]
            self.send(200, json.dumps(tree).encode())
        elif file in self.server.failing - set(self.server.cut) and self.command == "GET":
            self.send(500)
        else:
            cut = self.server.cut.pop(file, None) if self.command == "GET" else None
            if self.command == "GET" and file in self.server.held:
                self.server.held[file].wait(30)
            self.send_file(self.server.files[name][file], cut)

    do_HEAD = do_GET

    def send_file(self, body: bytes, cut: int | None) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        part = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}", "Content_Length": str(len(body) - start)}
        file = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
        self.send(206 if start else 200, body[start:cut], **part, **file)

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
