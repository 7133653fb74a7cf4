"""The bare model beside the server of scripts/bench.py, in a process of its own.

A line on stdin asks for a load and for how long, a line on stdout answers. What is timed is the forward pass alone:
texts are tokenised, pages are decoded and scaled before.
`python bench_bare.py MODEL DEVICE DTYPE BACKEND KIND`
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, cast

from bench_loads import FRESH, LOADS, fresh_words, page_files, request_inputs

Forward = Callable[[int], None]  # runs the batch of this number, and waits for its end


class SentenceTransformersModel:
    """sentence-transformers' own forward pass, in the precision that the server chose."""

    def __init__(self, name: str, device: str, dtype: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        from mlx_embeddings_backends import hub

        options, where = {} if dtype == "auto" else {"dtype": dtype}, None if device == "auto" else device
        self.model = SentenceTransformer(str(hub.resolve(name).path), device=where, model_kwargs=options)
        kind, cpu, self.autocast = self.model.device.type, torch.cpu.get_capabilities(), False
        if kind == "cpu":
            self.model.float()
            self.autocast = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
        elif kind == "cuda" and dtype == "auto":
            self.model.to(torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)
        stored = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        gpu = torch.cuda.get_device_name() if kind == "cuda" else None
        precision = "bfloat16 autocast" if self.autocast else stored
        self.facts = {"device": kind, "gpu": gpu, "dtype": precision, "threads": torch.get_num_threads()}

    def batches(self, load: str) -> tuple[int, Forward]:
        """How many batches the load has, and what runs one."""
        import torch

        kind, size = self.model.device.type, LOADS[load].bare_batch
        texts = [
            text.replace(FRESH, fresh_words(0))
            for request in request_inputs(load)
            for text in cast("list[str]", request)
        ]
        batches = []
        for start in range(0, len(texts) - size + 1, size):
            features = self.model.preprocess(texts[start : start + size])
            batches.append({k: v.to(kind) if isinstance(v, torch.Tensor) else v for k, v in features.items()})

        @torch.inference_mode()
        def forward(number: int) -> None:
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.autocast):
                self.model(dict(batches[number]))["sentence_embedding"].cpu()  # .cpu() waits for a GPU

        return len(batches), forward


class OpenClipModel:
    """open_clip's own encoders, in the precision that the server chose."""

    def __init__(self, name: str, device: str, dtype: str) -> None:
        import open_clip
        import torch

        from mlx_embeddings_backends import checkpoints

        folder = checkpoints.find(name, pretrained=os.environ.get("MLX_EMBEDDINGS_PRETRAINED")).folder
        self.kind = "cpu" if device == "auto" else device
        # Weights and activations both narrow: autocast takes seven times as long for a batch on a CPU.
        precision = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}[dtype]
        self.model, self.preprocess = open_clip.create_model_from_pretrained(
            f"local-dir:{folder}", precision=precision, device=self.kind
        )
        self.model.eval()
        self.dtype = getattr(torch, dtype)
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.facts = {"device": self.kind, "dtype": precision, "threads": torch.get_num_threads()}

    def batches(self, load: str) -> tuple[int, Forward]:
        """How many batches the load has, and what runs one."""
        import torch
        from PIL import Image

        size = LOADS[load].bare_batch
        if LOADS[load].words is None:
            encode: Any = self.model.encode_image
            inputs = torch.stack([self.preprocess(Image.open(file).convert("RGB")) for file in page_files()])
            inputs = inputs.to(self.dtype)
        else:
            encode = self.model.encode_text
            inputs = self.tokenizer(
                [str(text).replace(FRESH, fresh_words(0)) for request in request_inputs(load) for text in request]
            )
        batches = [inputs[start : start + size].to(self.kind) for start in range(0, len(inputs) - size + 1, size)]

        @torch.inference_mode()
        def forward(number: int) -> None:
            encode(batches[number]).cpu()

        return len(batches), forward


class OwnBackend:
    """The server's backend without the server, where sentence-transformers does not give the reference's vectors."""

    def __init__(self, name: str, device: str, dtype: str, backend: str) -> None:
        from mlx_embeddings_backends import detect, hub
        from mlx_embeddings_backends.base import LoadOptions

        folder = hub.resolve(name).path
        most = os.environ.get("MLX_EMBEDDINGS_MAX_IMAGE_TOKENS")
        options = LoadOptions(device, cast("Any", dtype), max_image_tokens=int(most) if most else None)
        self.backend = detect.load(detect.choose(folder, backend), folder, options)
        self.facts = {"backend": backend, "device": self.backend.info.device, "dtype": self.backend.info.dtype}

    def batches(self, load: str) -> tuple[int, Forward]:
        """How many batches the load has, and what runs one."""
        from mlx_embeddings_backends.base import EncodedImage, Item

        if LOADS[load].words is None:
            items = [
                Item(EncodedImage(file.read_bytes(), f"{fresh_words(0)} Describe the image.")) for file in page_files()
            ]
        else:
            items = [
                Item(str(text).replace(FRESH, fresh_words(0))) for request in request_inputs(load) for text in request
            ]
        size = LOADS[load].bare_batch
        prepared = self.backend.prepare(items[: len(items) // size * size])
        batches = [self.backend.collate(prepared[start : start + size]) for start in range(0, len(prepared), size)]

        def forward(number: int) -> None:
            self.backend.run(batches[number])

        return len(batches), forward


def measure(
    model: SentenceTransformersModel | OpenClipModel | OwnBackend, load: str, seconds: float
) -> dict[str, float]:
    count, forward = model.batches(load)
    size, times = LOADS[load].bare_batch, list[float]()
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        started = time.perf_counter()
        forward(len(times) % count)
        times.append(time.perf_counter() - started)
    return {"bare_inputs_per_s": size * len(times) / sum(times), "bare_p50_ms": statistics.median(times) * 1000}


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the server has fetched the model already
    name, device, dtype, backend, kind = sys.argv[1:]
    model: SentenceTransformersModel | OpenClipModel | OwnBackend
    match kind:
        case "own":
            model = OwnBackend(name, device, dtype, backend)
        case "open_clip":
            model = OpenClipModel(name, device, dtype)
        case _:
            model = SentenceTransformersModel(name, device, dtype)
    print(json.dumps(model.facts), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
