"""ColQwen2.5's configs and weight names, in every layout that is about, and in some that must be refused."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import Qwen2_5_VLConfig

from mlx_embeddings_backends.colqwen.checkpoint import canonical_name, canonical_names, read_config
from mlx_embeddings_backends.errors import UnsupportedModel
from tests.colqwen_checkpoints import CHECKPOINT, CONFIGS, NAMINGS, Config, config_of, variant

CONFIG = read_config(CHECKPOINT)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_layout_of_the_config_is_the_same_model(tmp_path: Path, config: Config) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(config)))
    assert read_config(tmp_path) == CONFIG


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_of_the_weights_is_the_same(tmp_path: Path, naming: str) -> None:
    with safe_open(CHECKPOINT / "model.safetensors", framework="numpy") as file:
        expected = {name.removeprefix("vlm.model.") for name in file.keys()}  # noqa: SIM118
    with safe_open(variant(tmp_path, naming=naming) / "model.safetensors", framework="numpy") as file:
        assert set(canonical_names(file.keys()).values()) == expected


def test_transformers_reads_what_we_write_of_a_config() -> None:
    made = Qwen2_5_VLConfig(**CONFIG.as_transformers())
    published = Qwen2_5_VLConfig(**config_of("both")["vlm_config"])
    ignored = {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tokens_per_second",
        "max_window_layers",
        "architectures",
    }
    for part in ("text_config", "vision_config"):
        ours, theirs = getattr(made, part).to_dict(), getattr(published, part).to_dict()
        differing = {key for key in ours if key not in ignored and ours[key] != theirs.get(key)}
        assert not differing - {"rope_parameters"}
        assert ours["rope_parameters"].items() <= theirs["rope_parameters"].items()
    assert (made.image_token_id, made.vision_start_token_id) == (352, 349)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("vlm.model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("vlm.vision_tower.merger.mlp.2.scales", "visual.merger.mlp.2.scales"),
        ("vlm.language_model.model.embed_tokens.biases", "language_model.embed_tokens.biases"),
        ("vlm.language_model.norm.weight", "language_model.norm.weight"),
        ("model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("base_model.model.model.norm.weight", "language_model.norm.weight"),
        ("base_model.model.custom_text_proj.weight", "embedding_proj_layer.weight"),
        ("base_model.model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("lm_head.weight", None),
        ("vlm.lm_head.weight", None),
        ("vlm.language_model.lm_head.scales", None),
    ],
)
def test_a_weight_has_one_name(name: str, canonical: str | None) -> None:
    assert canonical_name(name) == canonical


def test_the_same_weight_twice_or_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="same one twice"):
        canonical_names(["visual.merger.ln_q.weight", "vlm.vision_tower.merger.ln_q.weight"])
    with pytest.raises(UnsupportedModel, match="audio_tower"):
        canonical_name("audio_tower.layers.0.weight")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 10**12),
        ("hidden_size", "64"),
        ("hidden_act", "gelu"),
        ("num_attention_heads", 5),
        ("num_key_value_heads", 0),
        ("num_hidden_layers", 100_000),
        ("rms_norm_eps", None),
        ("rms_norm_eps", float("nan")),
        ("rope_scaling", None),
        ("rope_scaling", {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}),
        ("rope_scaling.mrope_section", None),
        ("rope_scaling.mrope_section", [16, 24, 24]),
        ("use_sliding_window", True),
        ("vision_config", None),
        ("vision_config.depth", 10**9),
        ("vision_config.out_hidden_size", 32),
        ("vision_config.fullatt_block_indexes", [3]),
        ("vision_config.hidden_act", "gelu"),
        ("vision_config.hidden_size", None),
        ("vision_config.in_chans", 4),
        ("vision_config.num_heads", 3),
        ("vision_config.patch_size", 14.5),
        ("vision_config.window_size", 100),
    ],
)
def test_a_config_that_is_not_known_is_refused_by_its_key(tmp_path: Path, path: str, value: object) -> None:
    config = config_of("colpali") | {"sliding_window": 8, "max_window_layers": 1}
    *parents, key = path.split(".")
    part = config
    for parent in parents:
        part = part[parent]
    part[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=key):
        read_config(tmp_path)
    if value is None:  # absent is the same
        del part[key]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModel, match=key):
            read_config(tmp_path)


def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    config = config_of("both")
    config["vlm_config"]["text_config"]["num_attention_heads"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="num_attention_heads is 4, and 8 in text_config"):
        read_config(tmp_path)
