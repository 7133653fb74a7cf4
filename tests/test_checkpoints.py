"""What may be named by --model beside a folder and a hub's id: open_clip's names, and short ones."""

import huggingface_hub.constants
import pytest

from mlx_embeddings_backends import checkpoints, hub
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.models import Models
from mlx_embeddings_server.settings import SettingsError, load_settings


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def refused(model: str, pretrained: str | None = None) -> str:
    """What is said of a model that is not here: nothing is downloaded."""
    with pytest.raises(ModelError) as caught:
        checkpoints.find(model, pretrained=pretrained)
    return str(caught.value)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B/32"])
@pytest.mark.parametrize(
    ("tag", "repository"),
    [
        ("laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("openai", "timm/vit_base_patch32_clip_224.openai"),
    ],
)
def test_open_clips_names_lead_to_the_repository_of_the_weights(name: str, tag: str, repository: str) -> None:
    assert f"no complete copy of '{repository}'" in refused(name, tag)


def test_open_clips_prefix_of_ids_is_known() -> None:
    assert "no complete copy of 'laion/CLIP'" in refused("hf-hub:laion/CLIP")


def test_weights_that_open_clip_does_not_have() -> None:
    said = refused("ViT-B-32", "laion2b")
    assert "did you mean" in said and "laion2b_s34b_b79k" in said
    assert "did you mean ViT-B-32" in refused("ViT-B-31", "openai")


def test_an_architecture_without_weights_is_told_how_to_name_them() -> None:
    assert "--model ViT-B-32 --pretrained laion2b_s34b_b79k" in refused("ViT-L-14")


@pytest.mark.parametrize("flag", [{"pretrained": "openai"}, {"adapter": ["a=b"]}])
def test_weights_and_adapters_belong_to_one_model(flag: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="belong to one model"):
        Models(load_settings({"model": ["one", "two"], **flag}), Metrics())


def test_short_names_lead_to_ids() -> None:
    assert "no complete copy of 'allenai/specter2'" in refused("specter2")
    assert all("/" in name for name in hub.ALIASES.values())
