"""open_clip's names of pretrained weights, and the repositories that hold them."""

import difflib
from collections.abc import Sequence

from mlx_embeddings_backends.errors import UnsupportedModel
from mlx_embeddings_backends.torch.open_clip_library import open_clip


def pretrained_repository(model: str, tag: str) -> str:
    """The hub id of what open_clip calls by these names: its open_clip_config.json says how the weights are to be run.

    Raises `UnsupportedModel`.
    """
    name = model.replace("/", "-")  # OpenAI wrote ViT-B/32
    names = dict.fromkeys(name for name, _ in open_clip.list_pretrained())
    if name not in names:
        raise UnsupportedModel(f"open_clip has no pretrained {model!r}: {_near(name, list(names))}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    place = open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "")
    if not place:
        raise UnsupportedModel(f"open_clip has no weights {tag!r} for {name}: {_near(tag, tags)}")
    owner, repository = place.split("/")[:2]  # the name of a file may follow
    return f"{owner}/{repository}"


def _near(name: str, known: Sequence[str]) -> str:
    """Those that may be meant, or some."""
    lower = {each.lower(): each for each in known}
    near = [each for each in lower if name.lower() in each] or difflib.get_close_matches(name.lower(), lower, n=5)
    if near:
        return f"did you mean {', '.join(lower[each] for each in near[:5])}?"
    return f"known are {', '.join(known[:20])}" + (f" and {len(known) - 20} more" if len(known) > 20 else "")
