"""Tiny checkpoints with random weights, in the formats that real ones have: files of a few kilobytes, made in a moment.

All weights are seeded, biases and norms among them, and large enough that nothing of the forward pass is lost in noise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModel, MT5EncoderModel, PreTrainedTokenizerFast, T5EncoderModel

HIDDEN = 32
MAX_TOKENS = 64

# Each is one token of every tokenizer below; any other text falls apart into letters.
_WORDS = (
    "a the of and to in is it for on with as was are this that be by at from river stone light house water green small "
    "quick brown fox jumps over lazy dog winter summer moon sun star road mountain sea ship king queen letter book "
    "table music silent broken golden iron query document search passage represent sentence retrieval :"
)
WORDS = _WORDS.split()
SUBWORDS = ("s", "ed", "ing", "er", "ly", "un", "re", "th", "an", "en", "on", "ar", "al", "ion", "est", "ness")
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)] + list("àçéñöüßΩжї中日語")

_BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_ROBERTA = {
    "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>",
    "sep_token": "</s>", "mask_token": "<mask>",
}  # fmt: skip
_T5 = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_LLAMA = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
_GPT2 = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}

# model_type -> (kind of tokenizer, its special tokens, what it puts around a text)
TOKENIZERS: dict[str, tuple[Literal["wordpiece", "bytes", "unigram"], dict[str, str], str]] = {
    **dict.fromkeys(("bert", "distilbert", "electra", "ernie", "nomic_bert"), ("wordpiece", _BERT, "[CLS] $A [SEP]")),
    "mpnet": ("wordpiece", _ROBERTA, "<s> $A </s>"),
    **dict.fromkeys(("roberta", "longformer"), ("bytes", _ROBERTA, "<s> $A </s>")),
    "modernbert": ("bytes", _BERT, "[CLS] $A [SEP]"),
    "gpt2": ("bytes", _GPT2, "$A"),
    "qwen2": ("bytes", _GPT2, "$A"),
    "qwen3": ("bytes", _GPT2, "$A <|endoftext|>"),
    "llama": ("bytes", _LLAMA, "<s> $A"),
    "mistral": ("bytes", _LLAMA, "<s> $A </s>"),
    **dict.fromkeys(("albert", "deberta-v2"), ("unigram", _BERT, "[CLS] $A [SEP]")),
    **dict.fromkeys(("xlm-roberta", "camembert"), ("unigram", _ROBERTA, "<s> $A </s>")),
    **dict.fromkeys(("t5", "mt5"), ("unigram", _T5, "$A </s>")),
    "gemma3_text": ("unigram", _GEMMA, "<bos> $A <eos>"),
}

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": MAX_TOKENS}
_BERT_SIZES: dict[str, Any] = {**_SIZES, "max_position_embeddings": MAX_TOKENS}
# Positions start behind padding_idx, which is 1 here as in the published checkpoints.
_ROBERTA_SIZES: dict[str, Any] = {**_SIZES, "max_position_embeddings": MAX_TOKENS + 2, "pad_token_id": 1}
_T5_SIZES: dict[str, Any] = {
    "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "ernie"), _BERT_SIZES),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), _ROBERTA_SIZES),
    "electra": {**_BERT_SIZES, "embedding_size": 16},
    "albert": {**_BERT_SIZES, "embedding_size": 16},
    "deberta-v2": {
        **_BERT_SIZES, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
        "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0, "position_biased_input": False,
    },
    "distilbert": {
        "dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": MAX_TOKENS,
    },
    "nomic_bert": {**_BERT_SIZES, "head_dim": 8},
    "longformer": {**_ROBERTA_SIZES, "attention_window": [8, 8]},
    "modernbert": {
        **_BERT_SIZES, "num_hidden_layers": 3, "global_attn_every_n_layers": 3, "local_attention": 8,
        "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3,
    },
    "gpt2": {
        "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": MAX_TOKENS, "bos_token_id": 0, "eos_token_id": 0,
    },
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": 8},
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma3_text": {
        **_DECODER, "sliding_window": 8, "use_bidirectional_attention": True, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "t5": _T5_SIZES,
    "mt5": {**_T5_SIZES, "feed_forward_proj": "gated-gelu"},
}  # fmt: skip


def tokenizer(model_type: str = "bert", **options: Any) -> PreTrainedTokenizerFast:
    """The kind of tokenizer that checkpoints of this architecture have. `options` are the class's own."""
    kind, specials, template = TOKENIZERS[model_type]
    # In the order given, and each once: RoBERTa's <pad> must be 1, BERT's [PAD] 0.
    names = list(dict.fromkeys(specials.values()))
    made = {"wordpiece": _wordpiece, "bytes": _byte_level, "unigram": _unigram}[kind](names)
    made.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, made.token_to_id(name)) for name in names if name in template]
    )
    of: Any = PreTrainedTokenizerFast  # its __init__ has no types
    wrapped: PreTrainedTokenizerFast = of(
        tokenizer_object=made, **{"model_max_length": MAX_TOKENS, **specials, **options}
    )
    return wrapped


def bare_encoder(
    folder: Path, model_type: str = "bert", *, tokenizer_options: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A plain transformers checkpoint in `folder`: config.json, model.safetensors, tokenizer.json. Returns `folder`."""
    own = tokenizer(model_type, **(tokenizer_options or {}))
    sizes = {"vocab_size": len(own), "pad_token_id": own.pad_token_id, **CONFIGS[model_type], **config}
    settings: Any = AutoConfig.for_model(model_type, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder: Any = {"t5": T5EncoderModel, "mt5": MT5EncoderModel}.get(model_type, AutoModel.from_config)
        model = encoder(settings)
        shake(model)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def sentence_transformer(
    folder: Path,
    model_type: str = "bert",
    *,
    pooling: str | tuple[str, ...] = "mean",
    include_prompt: bool = True,
    before: Sequence[nn.Module] = (),
    after: Sequence[nn.Module] = (),
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    max_seq_length: int | None = None,
    do_lower_case: bool = False,
    truncate_dim: int | None = None,
    tokenizer_options: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A folder as sentence-transformers saves it: Transformer, Pooling, the modules `before` and `after` the latter.

    These are the library's own, such as `Normalize()`, or `dense(32, 16)` below. Returns the folder of the model.
    """
    bare = bare_encoder(folder / "bare", model_type, tokenizer_options=tokenizer_options, **config)
    modules = [
        Transformer(str(bare), max_seq_length=max_seq_length, do_lower_case=do_lower_case),
        *before,
        Pooling(HIDDEN, pooling, include_prompt=include_prompt),
        *after,
    ]
    model = SentenceTransformer(
        modules=modules,
        device="cpu",
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        truncate_dim=truncate_dim,
    )
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


def dense(in_features: int, out_features: int, activation: nn.Module | None = None, *, bias: bool = True) -> Dense:
    """A Dense module with seeded weights; without `activation` it has Tanh, the library's own default."""
    module = Dense(in_features, out_features, bias=bias, activation_function=activation or nn.Tanh())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shake(module)
    return module


def shake(model: nn.Module) -> None:
    """Move every parameter away from where initialisation leaves it (biases 0, norms 1, matrices small)."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else parameter + noise * 0.1)


def _wordpiece(specials: Sequence[str]) -> Tokenizer:
    pieces = [*specials, *WORDS, *LETTERS, *("##" + piece for piece in (*LETTERS, *SUBWORDS))]
    unknown = "[UNK]" if "[UNK]" in specials else "<unk>"
    made = Tokenizer(models.WordPiece(_numbered(pieces), unk_token=unknown))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def _byte_level(specials: Sequence[str]) -> Tokenizer:
    """Byte-level BPE, whose merges build each word, with the space before it, letter by letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = dict.fromkeys(
        (spelled[:end], spelled[end]) for word in WORDS for spelled in ("Ġ" + word,) for end in range(1, len(spelled))
    )
    made = Tokenizer(models.BPE(_numbered([*specials, *letters, *(left + right for left, right in merges)]), [*merges]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    return made


def _unigram(specials: Sequence[str]) -> Tokenizer:
    pieces = dict.fromkeys([*specials, "▁", *("▁" + word for word in WORDS), *SUBWORDS, *LETTERS])
    unknown = next(place for place, name in enumerate(pieces) if name in ("[UNK]", "<unk>"))
    made = Tokenizer(models.Unigram([(piece, -10.0 + len(piece)) for piece in pieces], unk_id=unknown))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def _numbered(pieces: Sequence[str]) -> dict[str, int]:
    return {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
