"""Tiny rerankers with random weights: `*ForSequenceClassification`, language models; and as sentence-transformers saves
them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tokenizers import processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.checkpoints import CONFIGS, MAX_TOKENS, TOKENIZERS, shake, tokenizer

# What the tokenizers of published checkpoints put around a pair; and whether they tell the two texts apart by types.
_BERT = "[CLS] $A [SEP] $B:1 [SEP]:1"
_ROBERTA = "<s> $A </s> </s> $B </s>"
PAIRS: dict[str, tuple[str, bool]] = {
    **dict.fromkeys(("bert", "electra", "deberta-v2"), (_BERT, True)),
    "distilbert": (_BERT, False),
    "modernbert": ("[CLS] $A [SEP] $B [SEP]", False),
    **dict.fromkeys(("camembert", "mpnet", "roberta", "xlm-roberta"), (_ROBERTA, False)),
}


def pair_tokenizer(model_type: str, **options: Any) -> PreTrainedTokenizerFast:
    """That of `tests.checkpoints`, which joins pairs too."""
    template, has_types = PAIRS[model_type]
    names = ["input_ids", *(["token_type_ids"] if has_types else []), "attention_mask"]
    made = tokenizer(model_type, **{"model_input_names": names, **options})
    own, single = made.backend_tokenizer, TOKENIZERS[model_type][2]
    around = {name.partition(":")[0] for name in (single + " " + template).split() if not name.startswith("$")}
    own.post_processor = processors.TemplateProcessing(
        single=single, pair=template, special_tokens=[(name, own.token_to_id(name)) for name in sorted(around)]
    )
    return made


def reranker(
    folder: Path,
    model_type: str = "bert",
    *,
    labels: int = 1,
    tokenizer_options: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """config.json, model.safetensors, tokenizer.json in `folder`, as transformers saves them. Returns `folder`."""
    own = pair_tokenizer(model_type, **(tokenizer_options or {}))
    sizes = {"vocab_size": len(own), "pad_token_id": own.pad_token_id, **CONFIGS[model_type], **config}
    settings: Any = AutoConfig.for_model(model_type, num_labels=labels, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        of: Any = AutoModelForSequenceClassification.from_config  # which has no types
        model = of(settings)
        shake(model)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def cross_encoder(folder: Path, activation: nn.Module | None = None, **options: Any) -> Path:
    """A folder as sentence-transformers saves it, with modules.json. `options` are `CrossEncoder`'s."""
    bare = reranker(folder / "bare")
    model = CrossEncoder(str(bare), device="cpu", local_files_only=True, activation_fn=activation, **options)
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


# A template of the kind that rerankers are published with: roles of its own, an answer begun at its end.
CHAT = (
    "{%- set ns = namespace(task='Find what answers the query.') -%}"
    "{%- for m in messages if m.role == 'system' %}{% set ns.task = m.content %}{% endfor -%}"
    "<|start|>system\nSay yes or no.<|end|>\n<|start|>user\n<Task>: {{ ns.task }}\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<Document>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    "<|end|>\n<|start|>assistant\n"
)

CHAT_TOKENS = 256  # it takes some 150 of the tiny tokenizers' itself


def language_model(folder: Path, model_type: str = "qwen3", *, chat: str | None = None, **config: Any) -> Path:
    """A bare `*ForCausalLM` in `folder`, with a chat template or without. Returns `folder`."""
    own = tokenizer(model_type, model_max_length=config.get("max_position_embeddings", MAX_TOKENS))
    own.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    own.chat_template = chat
    sizes = {"vocab_size": len(own), "pad_token_id": own.pad_token_id, **CONFIGS[model_type], **config}
    settings: Any = AutoConfig.for_model(model_type, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        of: Any = AutoModelForCausalLM.from_config  # which has no types
        model = of(settings)
        shake(model)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def causal_reranker(
    folder: Path,
    model_type: str = "qwen3",
    *,
    chat: str | None = None,
    true_token_id: int = 40,
    false_token_id: int | None = 50,
    processing: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A language model and LogitScore, as sentence-transformers saves them. `options` are `CrossEncoder`'s."""
    bare = language_model(folder / "bare", model_type, chat=chat, **config)
    model = CrossEncoder(
        modules=[
            Transformer(str(bare), transformer_task="text-generation", processing_kwargs=processing or {}),
            LogitScore(true_token_id, false_token_id),
        ],
        device="cpu",
        **(options or {}),
    )
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


def chat_reranker(folder: Path, model_type: str = "qwen3", **options: Any) -> Path:
    """`causal_reranker` with CHAT and room for it."""
    return causal_reranker(folder, model_type, max_position_embeddings=CHAT_TOKENS, **{"chat": CHAT, **options})


def change(folder: Path, name: str, **values: object) -> Path:
    """Set keys of a JSON file; None takes a key out."""
    content = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder
