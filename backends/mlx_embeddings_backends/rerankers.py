"""What the files of a reranker must say, whatever its architecture. All raise `UnsupportedModel`."""

from pathlib import Path
from typing import Any

from mlx_embeddings_backends.errors import UnsupportedModel
from mlx_embeddings_backends.files import read_optional_object


def check_one_label(config: dict[str, Any], name: str) -> None:
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)  # as transformers counts them
    if count != 1:
        raise UnsupportedModel(f"{name} has {count} labels, it is a classifier: a reranker gives a pair one score")
    check_original(config)


def check_original(config: dict[str, Any]) -> None:
    if config.get("quantization_config"):
        raise UnsupportedModel("the weights are quantised, by quantization_config in config.json: use the original")


def check_logit_score(config: dict[str, Any]) -> None:
    true_id, false_id = config.get("true_token_id"), config.get("false_token_id")
    for name, token_id in (("true_token_id", true_id), ("false_token_id", false_id)):
        missing = token_id is None and name == "false_token_id"
        if not missing and (not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0):
            raise UnsupportedModel(f"LogitScore's config.json gives the {name} {token_id!r}, which is no token id")
    source = config.get("module_input_name", "causal_logits")
    if source != "causal_logits":
        raise UnsupportedModel(f"LogitScore takes {source!r}: only 'causal_logits' is known")


def check_answers(config_file: Path) -> None:
    """A language model that is to rerank must say how it answers: its vectors would rank by something else."""
    listed = read_optional_object(config_file).get("architectures")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    if name := next((name for name in names if name.endswith("ForCausalLM")), None):
        raise UnsupportedModel(
            f"{name} is a bare language model, which does not say by which of its tokens it answers yes and no: save "
            "it with sentence-transformers' CrossEncoder, made of Transformer(..., transformer_task='text-generation') "
            "and LogitScore(true_token_id=..., false_token_id=...), and serve that folder"
        )
