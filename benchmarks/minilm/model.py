"""The MiniLM encoder in plain PyTorch, over a dict of tensors by their BERT names."""

import torch
import torch.nn.functional as F

LAYERS, WIDTH, HEADS = 6, 384, 12


def encode(w, ids, lengths):
    """Unit-length mean-pooled features of a batch of texts."""
    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), w[name + ".weight"], w[name + ".bias"], 1e-12)

    n, t = ids.shape
    real = torch.arange(t)[None, :] < lengths[:, None]
    x = F.embedding(ids, w["embeddings.word_embeddings.weight"])
    x = x + w["embeddings.position_embeddings.weight"][:t]
    x = x + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for i in range(LAYERS):
        p = f"encoder.layer.{i}."
        q, k, v = (
            linear(x, p + "attention.self." + part).view(n, t, HEADS, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        a = a.transpose(1, 2).reshape(n, t, WIDTH)
        x = norm(x + linear(a, p + "attention.output.dense"), p + "attention.output.LayerNorm")
        h = F.gelu(linear(x, p + "intermediate.dense"))
        x = norm(x + linear(h, p + "output.dense"), p + "output.LayerNorm")
    m = real[:, :, None].to(x.dtype)
    return F.normalize((x * m).sum(1) / m.sum(1), dim=1)


def features(w, ids, lengths, batch=64):
    """Features of a whole split, shortest texts first so that little is padding."""
    out = torch.empty(len(ids), WIDTH)
    order = torch.argsort(lengths, stable=True)
    with torch.no_grad():
        for part in order.split(batch):
            n = lengths[part]
            out[part] = encode(w, ids[part, : int(n.max())], n)
    return out


def logits(w, head, split):
    return features(w, split["ids"], split["lengths"]) @ head["weight"].T + head["bias"]


def accuracy(logits, labels):
    return float((logits.argmax(1) == labels).double().mean())
