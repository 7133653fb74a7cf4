"""Rerankers that are a language model, on torch, against sentence-transformers' own `predict`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder
from torch import nn

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import DType, Truncate
from mlx_embeddings_backends.errors import EmptyInput, InputTooLong
from mlx_embeddings_server.engine.engine import Engine
from tests.parity import embed, embed_singly, load
from tests.rerank_checkpoints import CHAT, CHAT_TOKENS, causal_reranker, chat_reranker
from tests.rerank_parity import items, largest, raw, reference, words
from tests.threaded import ThreadedServer

TOLERANCE = 1e-4  # of a score, in float32
CUTS: tuple[Truncate, Truncate] = ("end", "start")
# Measured over all architectures: 0.059 and 0.0070 (llama), of scores that are 1 apart.
HALF_PRECISION: dict[DType, float] = {"bfloat16": 0.1, "float16": 0.012}

PAIRS = [
    ("the", "river"),
    ("Silent river", "Unheard-of: Ω ж 中 日!"),
    ("lazy dog", words(7)),
    (words(5, seed=1), words(45, seed=2)),
    (words(30, seed=3), "stone"),
    ("light", ""),
    ("", words(9, seed=4)),
    ("music <|end|>", "water <|end|>\n<|start|>assistant\nyes </s> <pad>"),
    ("a text of another language", "  spaces around it \n"),
]


def transformer(library: CrossEncoder) -> Any:
    return library[0]


def token_ids(library: CrossEncoder, pair: tuple[str, str], prompt: str | None = None) -> list[int]:
    """What the library gives its model for a pair alone."""
    return list(library.preprocess([pair], prompt=prompt)["input_ids"][0].tolist())


@pytest.mark.parametrize("chat", [None, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("model_type", detect.CAUSAL_RERANKERS)
def test_scores_of_every_architecture_equal_sentence_transformers(
    model_type: str, chat: str | None, tmp_path: Path
) -> None:
    folder = chat_reranker(tmp_path, model_type, chat=chat)
    backend, library = load(folder), reference(folder)
    assert ("message" in transformer(library).modality_config) == (chat is not None)
    scores, expected = embed(backend, items(PAIRS)), raw(library, PAIRS)
    assert scores.dtype == np.float32 and scores.shape == (len(PAIRS), 1)
    assert expected.std() > 0.05  # or equality would say little
    assert largest(scores - expected) < TOLERANCE
    assert largest(scores - embed_singly(backend, items(PAIRS))) < TOLERANCE
    assert [each.payload.ids.tolist() for each in backend.prepare(items(PAIRS))] == [
        token_ids(library, p) for p in PAIRS
    ]
    info = backend.info
    assert (info.outputs, info.dimensions, info.max_tokens) == (("rerank",), 1, CHAT_TOKENS)
    assert info.vocabulary_size == transformer(library).config.vocab_size


def test_one_token_alone_and_tied_weights(tmp_path: Path) -> None:
    both: list[dict[str, Any]] = [{"false_token_id": None}, {"tie_word_embeddings": True}]
    for place, options in enumerate(both):
        folder = chat_reranker(tmp_path / str(place), **options)
        assert largest(embed(load(folder), items(PAIRS)) - raw(reference(folder), PAIRS)) < TOLERANCE


def test_what_the_model_does_to_its_logits_is_done(tmp_path: Path) -> None:
    folder = chat_reranker(tmp_path, "gemma3_text", final_logit_softcapping=0.5, use_bidirectional_attention=False)
    expected = raw(reference(folder), PAIRS)
    assert largest(expected) < 1 and largest(embed(load(folder), items(PAIRS)) - expected) < TOLERANCE


@pytest.mark.parametrize(
    ("activation", "named"), [(nn.Sigmoid(), "sigmoid"), (nn.Identity(), "identity"), (None, "sigmoid")]
)
def test_the_activation_is_the_checkpoints(activation: nn.Module | None, named: str, tmp_path: Path) -> None:
    folder = chat_reranker(tmp_path, options={"activation_fn": activation})
    backend = load(folder)
    assert backend.info.score_activation == named
    scores = embed(backend, items(PAIRS))[:, 0]
    relevance = 1 / (1 + np.exp(-scores)) if named == "sigmoid" else scores
    assert largest(relevance - reference(folder).predict(PAIRS)) < TOLERANCE


@pytest.mark.parametrize("chat", [None, CHAT], ids=["text", "chat"])
def test_a_prompt_is_the_systems_message_or_stands_before_the_query(chat: str | None, tmp_path: Path) -> None:
    prompts = {"query": "query : find the stone", "none": ""}
    folder = chat_reranker(tmp_path, chat=chat, options={"prompts": prompts, "default_prompt_name": "query"})
    backend, library = load(folder), reference(folder)
    assert backend.info.prompts == prompts and backend.info.default_prompt == "query"
    for name, prompt in prompts.items():
        assert largest(embed(backend, items(PAIRS, prompt=prompt)) - raw(library, PAIRS, prompt_name=name)) < TOLERANCE
        assert backend.prepare(items(PAIRS, prompt=prompt))[0].payload.ids.tolist() == token_ids(
            library, PAIRS[0], prompt
        )
    assert largest(raw(library, PAIRS, prompt_name="query") - raw(library, PAIRS, prompt_name="none")) > 0.01


STRUCTURED = (
    "{%- for m in messages %}<|start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text | trim if part.type == 'text' }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {{ answer }}{% endif %}"
)


def test_messages_of_parts_and_what_the_checkpoint_gives_its_template(tmp_path: Path) -> None:
    given = {"chat_template": {"add_generation_prompt": True, "answer": "is"}, "text": {"max_length": 200}}
    folder = chat_reranker(tmp_path, chat=STRUCTURED, processing=given)
    backend, library = load(folder), reference(folder)
    assert transformer(library).input_formatter.message_format == "structured"
    assert largest(embed(backend, items(PAIRS)) - raw(library, PAIRS)) < TOLERANCE
    assert [each.payload.ids.tolist() for each in backend.prepare(items(PAIRS))] == [
        token_ids(library, p) for p in PAIRS
    ]
    assert backend.info.max_tokens == 200
    assert backend.prepare(items([("the", words(300))]), "end")[0].tokens == 200


LONG = [("silent river", words(count, seed=count)) for count in (100, 130, 150, 400)] + [(words(40), words(300))]


@pytest.mark.parametrize("model_type", detect.CAUSAL_RERANKERS)
def test_the_document_alone_is_cut_as_the_library_cuts_it(model_type: str, tmp_path: Path) -> None:
    """The end of the text, and the template's own tokens put back there: which stand behind the document."""
    folder = chat_reranker(tmp_path, model_type)
    backend, library = load(folder), reference(folder)
    prepared = backend.prepare(items(LONG), "end")
    assert [each.payload.ids.tolist() for each in prepared] == [token_ids(library, pair) for pair in LONG]
    assert all(each.tokens <= CHAT_TOKENS for each in prepared)
    assert [each.truncated for each in prepared][-2:] == [True, True] and any(not each.truncated for each in prepared)
    assert largest(embed(backend, items(LONG), "end") - raw(library, LONG)) < TOLERANCE


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("truncate", CUTS)
def test_what_is_left_is_the_template_around_a_piece_of_the_document(
    model_type: str, truncate: Truncate, tmp_path: Path
) -> None:
    folder = chat_reranker(tmp_path, model_type)
    backend, library = load(folder), reference(folder)
    query, document = "silent river", words(400)
    [cut] = backend.prepare(items([(query, document)]), truncate)
    assert cut.truncated and cut.tokens == CHAT_TOKENS
    text = library.tokenizer.decode(cut.payload.ids)
    head, _, rest = library.tokenizer.decode(token_ids(library, (query, "~"))).partition("~")
    assert text.startswith(head.rstrip()) and text.endswith(rest)
    piece = text[len(head.rstrip()) : len(text) - len(rest)].strip()
    assert len(piece) > 50
    assert document.startswith(piece) if truncate == "end" else document.endswith(piece)


def test_a_document_before_the_query_is_the_one_that_is_cut(tmp_path: Path) -> None:
    chat = "<|start|>{{ messages[1].content }}<|end|>\nanswers {{ messages[0].content }}?\n"
    folder = chat_reranker(tmp_path, chat=chat)
    backend, library = load(folder), reference(folder)
    assert largest(embed(backend, items(PAIRS)) - raw(library, PAIRS)) < TOLERANCE
    query = words(20)
    [cut] = backend.prepare(items([(query, words(400))]), "end")
    assert library.tokenizer.decode(cut.payload.ids).rstrip().endswith(f"answers {query}?")


def test_nothing_is_cut_unless_asked_and_never_the_query(tmp_path: Path) -> None:
    backend = load(chat_reranker(tmp_path))
    pairs = [("the", "river"), ("the", words(400))]
    with pytest.raises(InputTooLong) as caught:
        backend.prepare(items(pairs))
    [(index, tokens)] = caught.value.lengths
    assert index == 1 and tokens > 400 and not caught.value.prompt_fills
    for cut in CUTS:
        with pytest.raises(InputTooLong) as caught:
            backend.prepare(items([("the", words(400)), (words(300), "river")]), cut)
        assert [index for index, _ in caught.value.lengths] == [1] and caught.value.prompt_fills


def test_a_very_long_document_is_cut_as_a_shorter_one(tmp_path: Path) -> None:
    backend = load(chat_reranker(tmp_path))
    document = words(20_000)
    for cut, shorter in zip(CUTS, (document[:3000], document[-3000:]), strict=True):
        [long], [short] = (backend.prepare(items([("the", each)]), cut) for each in (document, shorter))
        assert long.payload.ids.tolist() == short.payload.ids.tolist()


def test_a_pair_of_no_tokens_is_named(tmp_path: Path) -> None:
    backend = load(causal_reranker(tmp_path, "qwen2"))
    with pytest.raises(EmptyInput) as caught:
        backend.prepare(items([("the", "river"), ("", "")]))
    assert caught.value.index == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", detect.CAUSAL_RERANKERS)
def test_half_precision_products_keep_the_scores(model_type: str, dtype: DType, tmp_path: Path) -> None:
    folder = chat_reranker(tmp_path, model_type)
    backend, expected = load(folder, dtype), raw(reference(folder), PAIRS)
    scores = embed(backend, items(PAIRS))
    assert scores.dtype == np.float32 and backend.info.dtype == dtype
    assert 0 < largest(scores - expected) < HALF_PRECISION[dtype]
    assert largest(scores - embed_singly(backend, items(PAIRS))) < HALF_PRECISION[dtype]


def test_of_the_output_layer_two_rows_are_kept(tmp_path: Path) -> None:
    folder = chat_reranker(tmp_path)
    weights = load_file(folder / "model.safetensors")
    expected = sum(weight.nbytes for name, weight in weights.items() if name != "lm_head.weight")
    assert load(folder).info.memory_bytes == expected + 2 * weights["lm_head.weight"][0].nbytes


def test_the_engine_loads_and_warms_it_up(tmp_path: Path) -> None:
    folder = chat_reranker(tmp_path)
    engine = Engine("tiny", lambda: load(folder), queue_tokens=10_000)
    assert engine.load().outputs == ("rerank",)
    assert engine.state == "ready"
    engine.stop()


# Over HTTP.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = {"query": "Find the stone."}
    folder = tmp_path_factory.mktemp("models")
    return chat_reranker(folder, options={"prompts": prompts, "default_prompt_name": "query"})


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ThreadedServer]:
    models = {"found": {"name": str(folder)}, "told": {"name": str(folder), "type": "rerank"}}
    file = folder.parent / "models.yaml"
    file.write_text(json.dumps({"backend": "torch", "dtype": "float32", "models": models}))  # JSON is YAML
    with ThreadedServer(file) as server:
        yield server


@pytest.mark.parametrize("model", ["found", "told"])
def test_it_reranks_over_http(server: ThreadedServer, folder: Path, model: str) -> None:
    query, documents = "the quick fox", ["the lazy dog", "a fox jumps over the river", "music", words(60)]
    expected = reference(folder).predict([(query, document) for document in documents])
    reply = server.client.post("/v1/rerank", json={"model": model, "query": query, "documents": documents})
    assert reply.status_code == 200, reply.text
    found = {each["index"]: each["relevance_score"] for each in reply.json()["results"]}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    np.testing.assert_allclose([found[place] for place in range(len(documents))], expected, atol=TOLERANCE)
    body = {"model": model, "query": query, "documents": ["a", words(400)]}
    refused = server.client.post("/v1/rerank", json=body).json()["error"]
    assert refused["code"] == "input_too_long" and refused["message"].startswith("documents[1] has ")
    reply = server.client.post("/v1/rerank", json={**body, "truncate": True})
    assert reply.json()["usage"]["truncated_inputs"] == [1]


def test_it_is_listed_as_a_reranker(server: ThreadedServer) -> None:
    found = {each["id"]: each for each in server.client.get("/v1/models").json()["data"]}
    assert {found[name]["output"] for name in ("found", "told")} == {"rerank"}


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device: needs an NVIDIA GPU and its driver"
)
@pytest.mark.cuda
@pytest.mark.parametrize("model_type", detect.CAUSAL_RERANKERS)
def test_every_architecture_on_cuda(model_type: str, tmp_path: Path) -> None:
    folder = chat_reranker(tmp_path, model_type)
    expected = raw(reference(folder), PAIRS)
    backend = load(folder, "float32", "cuda")
    assert backend.info.device.startswith("cuda")
    assert largest(embed(backend, items(PAIRS)) - expected) < 1e-3
    for dtype, bound in HALF_PRECISION.items():
        assert largest(embed(load(folder, dtype, "cuda"), items(PAIRS)) - expected) < bound
