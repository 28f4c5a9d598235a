"""Tensor names and shapes: the architectures of arXiv 2405.07813, trained and frozen, and Llamas.

The paper counts P trained and F frozen parameters. These tensors add up to its P and F exactly:

- CLIP (OpenCLIP's names, as the published code saves its image encoder): trained is the whole
  visual tower; frozen is what remains of the text tower once the published code has deleted the
  text transformer's blocks: token and positional embedding, last norm, projection, logit scale.
- T5-large is T5 1.1 large (gated feed-forward layers, an output projection of its own). Its two
  matrices of 32,128 · 1,024 are equal in shape, and F is exactly one of them. Which one is
  an assumption: here the input embedding is frozen and the output projection trained. No
  size depends on it.
"""

from typing import NamedTuple

Shapes = dict[str, tuple[int, ...]]

_VOCABULARY = 49408  # CLIP's byte pairs
_CONTEXT = 77  # tokens of a caption


class Architecture(NamedTuple):
    """Shapes by tensor name; all float32. P and F are the elements of the two dicts."""

    trained: Shapes
    frozen: Shapes


def vit(width: int, layers: int, patch: int, embedding: int) -> Architecture:
    """OpenCLIP's vision transformer for images of 224 × 224 pixels."""
    tokens = (224 // patch) ** 2 + 1
    visual: Shapes = {
        "class_embedding": (width,),
        "positional_embedding": (tokens, width),
        "proj": (width, embedding),
        "conv1.weight": (width, 3, patch, patch),
        **_norm("ln_pre", width),
        **_norm("ln_post", width),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        visual |= {
            **_norm(f"{block}.ln_1", width),
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            **_linear(f"{block}.attn.out_proj", width, width),
            **_norm(f"{block}.ln_2", width),
            **_linear(f"{block}.mlp.c_fc", 4 * width, width),
            **_linear(f"{block}.mlp.c_proj", width, 4 * width),
        }
    text_width = embedding  # true of the three models here
    text: Shapes = {
        "positional_embedding": (_CONTEXT, text_width),
        "text_projection": (text_width, embedding),
        "logit_scale": (),
        "token_embedding.weight": (_VOCABULARY, text_width),
        **_norm("ln_final", text_width),
    }
    return Architecture(
        {f"model.visual.{name}": shape for name, shape in visual.items()},
        {f"model.{name}": shape for name, shape in text.items()},
    )


def t5(width: int, layers: int, feed_forward: int, heads: int, vocabulary: int) -> Architecture:
    """T5 1.1: as many layers in the encoder as in the decoder, heads of 64, 32 position buckets."""
    inner = 64 * heads
    trained: Shapes = {"lm_head.weight": (vocabulary, width)}
    for stack, attentions in (
        ("encoder", ["SelfAttention"]),
        ("decoder", ["SelfAttention", "EncDecAttention"]),
    ):
        for i in range(layers):
            block = f"{stack}.block.{i}.layer"
            for k, attention in enumerate(attentions):
                trained |= {f"{block}.{k}.{attention}.{p}.weight": (inner, width) for p in "qkv"}
                trained[f"{block}.{k}.{attention}.o.weight"] = (width, inner)
                trained[f"{block}.{k}.layer_norm.weight"] = (width,)
            last = f"{block}.{len(attentions)}"
            trained |= {
                f"{last}.DenseReluDense.wi_0.weight": (feed_forward, width),
                f"{last}.DenseReluDense.wi_1.weight": (feed_forward, width),
                f"{last}.DenseReluDense.wo.weight": (width, feed_forward),
                f"{last}.layer_norm.weight": (width,),
            }
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        trained |= {bias: (32, heads), f"{stack}.final_layer_norm.weight": (width,)}
    return Architecture(trained, {"shared.weight": (vocabulary, width)})


def llama(
    width: int, layers: int, vocabulary: int, feed_forward: int = 0, groups: int = 4,
    tied: bool = True,
) -> Shapes:  # fmt: skip
    """A Llama in which so many ``groups`` of queries share keys and values. Its feed-forward layers
    are in proportion to its width, where their size is not given."""
    feed_forward = feed_forward or 11 * width // 4
    keys = width // groups
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        block = f"model.layers.{i}"
        for part, into in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            shapes[f"{block}.self_attn.{part}_proj.weight"] = (into, width)
        shapes |= {
            f"{block}.mlp.gate_proj.weight": (feed_forward, width),
            f"{block}.mlp.up_proj.weight": (feed_forward, width),
            f"{block}.mlp.down_proj.weight": (width, feed_forward),
            f"{block}.input_layernorm.weight": (width,),
            f"{block}.post_attention_layernorm.weight": (width,),
        }
    shapes["model.norm.weight"] = (width,)
    return shapes if tied else shapes | {"lm_head.weight": (vocabulary, width)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


LLAMA_2_7B = llama(4096, 32, 32000, feed_forward=11008, groups=1, tied=False)

ARCHITECTURES = {
    "ViT-B-32": vit(768, 12, 32, 512),
    "ViT-B-16": vit(768, 12, 16, 512),
    "ViT-L-14": vit(1024, 24, 14, 768),
    "T5-large": t5(1024, 24, 2816, 16, 32128),
}
