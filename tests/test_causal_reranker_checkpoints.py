"""Which rerankers that are a language model are taken, which are refused and in which words."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.torch import causal_reranker as module
from tests.parity import load
from tests.rerank_checkpoints import CHAT, change, chat_reranker, language_model


def test_another_architecture_has_to_be_asked_for(tmp_path: Path) -> None:
    folder = change(chat_reranker(tmp_path), "config.json", model_type="gpt_neox")
    with pytest.raises(UnsupportedModel, match="'gpt_neox causal_reranker': --allow-unverified"):
        detect.choose(folder)
    choice = detect.choose(folder, allow_unverified=True)
    assert (choice.target, choice.verified) == (detect.CAUSAL_RERANKER, False)


def test_its_type_is_rerank(tmp_path: Path) -> None:
    folder = chat_reranker(tmp_path)
    for kind in (None, "rerank"):
        choice = detect.choose(folder, kind=kind)
        assert (choice.target, choice.architecture, choice.verified) == (
            detect.CAUSAL_RERANKER,
            "causal_reranker",
            True,
        )
    with pytest.raises(UnsupportedModel, match="this is a reranker: its `type` is rerank, not embeddings"):
        detect.choose(folder, kind="embeddings")


def test_a_bare_language_model_is_told_what_it_lacks(tmp_path: Path) -> None:
    folder = language_model(tmp_path, chat=CHAT)
    with pytest.raises(UnsupportedModel, match=r"Qwen3ForCausalLM is a bare language model.*LogitScore\(true_token_id"):
        detect.choose(folder, kind="rerank")
    assert detect.choose(folder).architecture == "qwen3"  # an encoder of texts, as ever


def score(**values: object) -> Callable[[Path], object]:
    return lambda folder: change(folder, "1_LogitScore/config.json", **values)


def setting(**values: object) -> Callable[[Path], object]:
    return lambda folder: change(folder, "sentence_bert_config.json", **values)


def template(text: str | None) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        if text is not None:
            (folder / "chat_template.jinja").write_text(text)

    return write


def modules(change_list: Callable[[list[Any]], list[Any]]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        file = folder / "modules.json"
        file.write_text(json.dumps(change_list(json.loads(file.read_text()))))

    return write


def without_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in weights.items() if name != "lm_head.weight"}, folder / "model.safetensors")


FORWARD = {"method": "forward", "method_output_name": "logits"}
DOCUMENT = "{{ messages[1].content }}"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no token": (score(true_token_id=None), "gives the true_token_id None, which is no token id"),
    "negative token": (score(false_token_id=-1), "gives the false_token_id -1, which is no token id"),
    "token as a word": (score(true_token_id="yes"), "gives the true_token_id 'yes', which is no token id"),
    "token beyond": (score(false_token_id=5000), "looks at the token 5000, and the model's vocabulary has 461"),
    "other logits": (score(module_input_name="scores"), "LogitScore takes 'scores': only 'causal_logits' is known"),
    "no LogitScore": (lambda folder: shutil.rmtree(folder / "1_LogitScore"), "gives the true_token_id None"),
    "other order": (modules(lambda each: each[::-1]), "modules.json has LogitScore, Transformer: LogitScore is known"),
    "more modules": (modules(lambda each: [*each, each[1]]), "has Transformer, LogitScore, LogitScore: LogitScore is"),
    "foreign module": (modules(lambda each: [each[0], {**each[1], "type": "evil.LogitScore"}]), "'evil.LogitScore'"),
    "no CrossEncoder": (
        lambda folder: change(folder, "config_sentence_transformers.json", model_type=None),
        "gives the model_type None: sentence-transformers would put other modules in its place",
    ),
    "quantised": (lambda folder: change(folder, "config.json", quantization_config={"bits": 4}), "quantised"),
    "no head": (without_head, "the files lack 1 of the model's weights, such as lm_head.weight"),
    "long rope": (
        lambda folder: change(folder, "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "rope_type dynamic: a pair's score would change with the longest of its batch",
    ),
    "another task": (setting(transformer_task="feature-extraction"), "has the task 'feature-extraction' and gives"),
    "other output": (setting(modality_config={"text": {**FORWARD, "method_output_name": "loss"}}), "something else"),
    "images": (setting(modality_config={"text": FORWARD, "image": FORWARD}), "takes text, image: only texts and"),
    "tokenizer's options": (setting(processing_kwargs={"text": {"stride": 2}}), "processing_kwargs .* has stride"),
    "template's options": (setting(processing_kwargs={"chat_template": {"tokenize": False}}), "has tokenize: not"),
    "no options": (setting(processing_kwargs={"text": None}), "processing_kwargs .* is not an object of objects"),
    "options of images": (setting(processing_kwargs={"image": {"size": 2}}), "processing_kwargs .* has image: not"),
    "no template": (template(None), "the chat template fails on a query and a document: .*chat_template is not set"),
    "broken template": (template("{% if %}"), "the chat template fails on a query and a document: Expected"),
    "refusing template": (template("{{ raise_exception('user only') }}"), "fails on a query and a document: user only"),
    "for users alone": (template("{% for m in messages if m.role == 'user' %}{{ m }}{% endfor %}"), "role 'document'"),
    "document twice": (template("{{ messages[0].content }}" + DOCUMENT * 2), "role 'document' once, as it is"),
    "no query": (template("<|start|>" + DOCUMENT), "leaves out the message of the role 'query'"),
    "code": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "fails on a query and a document: .*unsafe"),
    "weights as a pickle": (lambda folder: _pickle(folder), "a pickle with more than tensors"),
}  # fmt: skip


def _pickle(folder: Path) -> None:
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "more": Path("no tensor")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_not_known_is_refused_in_one_line(how: str, tmp_path: Path) -> None:
    break_it, said = REFUSED[how]
    folder = chat_reranker(tmp_path)
    break_it(folder)
    with pytest.raises(ModelError, match=said) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_template_without_an_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TEMPLATE_SECONDS", 1.0)
    folder = chat_reranker(tmp_path)
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abcde") + "{% endfor %}" * 5
    template(loops + DOCUMENT)(folder)
    before = threading.active_count()
    with pytest.raises(UnsupportedModel, match="the chat template did not come to an end in 1 s"):
        load(folder)
    deadline = time.monotonic() + 20
    while threading.active_count() > before:  # or it would take a processor for as long as the server runs
        assert time.monotonic() < deadline
        time.sleep(0.05)
