"""What a text encoder's JSON files say, read as sentence-transformers reads them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_embeddings_backends.errors import UnsupportedModel
from mlx_embeddings_backends.files import read_json, read_optional_object

# Where sentence-transformers looks for the Transformer module's own settings, of the names that concern us.
_SETTINGS = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json")
# What newer ones say of a Transformer that turns text into token embeddings. Older ones know nothing else.
_TEXT_ONLY: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
# Arguments that would change what config.json says, or how texts are read.
_OVERRIDES = ("config_args", "config_kwargs", "processing_kwargs")


@dataclass(frozen=True, slots=True)
class Part:
    """A module behind the transformer: its class name, its folder, and its config.json."""

    kind: str
    folder: Path
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TextCheckpoint:
    """A folder of sentence-transformers, or a bare transformer."""

    transformer: Path  # the folder of its config.json, weights and tokenizer
    config: dict[str, Any]
    parts: list[Part]
    lower_case: bool = False
    max_seq_length: float | None = None
    truncate_dim: int | None = None
    prompts: dict[str, str] = field(default_factory=lambda: {"query": "", "document": ""})
    default_prompt: str | None = None


def read_text_checkpoint(folder: Path, *, has_adapters: bool = False) -> TextCheckpoint:
    """`detect.choose` has looked at modules.json before: its types are known, and its paths lie in the folder.

    AdapterHub's adapters are trained to give their vector in place of [CLS], where no modules.json says otherwise.
    """
    if not (folder / "modules.json").exists():
        config = read_optional_object(folder / "config.json")
        limit = read_optional_object(folder / "tokenizer_config.json").get("model_max_length")
        pooling = Part("Pooling", folder, {"pooling_mode": "cls" if has_adapters else _mode_of_bare(config)})
        return TextCheckpoint(folder, config, [pooling], max_seq_length=limit)
    modules = read_json(folder / "modules.json")
    transformer, *parts = [
        (str(module["type"]).rpartition(".")[2], folder / module.get("path", "")) for module in modules
    ]
    settings = _settings(transformer[1])
    ours = read_optional_object(folder / "config_sentence_transformers.json")
    prompts = {"query": "", "document": ""} | {name: text or "" for name, text in (ours.get("prompts") or {}).items()}
    default_prompt = ours.get("default_prompt_name")
    if default_prompt is not None and default_prompt not in prompts:
        raise UnsupportedModel(f"the default prompt {default_prompt!r} is none of the checkpoint's prompts")
    return TextCheckpoint(
        transformer[1],
        read_optional_object(transformer[1] / "config.json"),
        [Part(kind, path, read_optional_object(path / "config.json")) for kind, path in parts],
        lower_case=bool(settings.get("do_lower_case")),
        max_seq_length=settings["max_seq_length"],
        truncate_dim=ours.get("truncate_dim"),
        prompts=prompts,
        default_prompt=default_prompt,
    )


def _mode_of_bare(config: dict[str, Any]) -> str:
    """What sentence-transformers would use: the last token of a language model, the mean of anything else."""
    architecture = str((config.get("architectures") or [""])[0])
    return "lasttoken" if architecture.endswith("ForCausalLM") else "mean"


def _settings(transformer: Path) -> dict[str, Any]:
    """Of the Transformer module, with `max_seq_length` filled in from the tokenizer's."""
    found = (read_optional_object(transformer / name) for name in _SETTINGS)
    settings = next((each for each in found if each), {})
    for name, expected in _TEXT_ONLY.items():
        if settings.get(name, expected) != expected:
            raise UnsupportedModel(f"{name} {settings[name]!r} of the checkpoint is not known: only text is")
    if given := [name for name in _OVERRIDES if settings.get(name)]:
        raise UnsupportedModel(f"{given[0]} {sorted(settings[given[0]])} of the checkpoint are not known")
    tokenizer = read_optional_object(transformer / "tokenizer_config.json")
    tokenizer |= settings.get("tokenizer_args") or settings.get("processor_kwargs") or {}
    return {"max_seq_length": tokenizer.get("model_max_length")} | {
        name: value for name, value in settings.items() if value is not None
    }
