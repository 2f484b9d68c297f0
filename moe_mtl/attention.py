"""A transformer block on sets of vectors, whose queries and keys may come from different sets."""

import torch.nn.functional as F
from torch import Tensor, nn


class AttentionBlock(nn.Module):
    """x + attention(norm(x), norm(read)), then x + MLP(norm(x)); GELU.

    Args:
        dim: width d of the vectors.
        heads: attention heads; they divide d.
        hidden: units of the MLP.
        dropout: share of attention weights, of its outputs and of the MLP's units dropped in training.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: {heads} do not divide the width {dim}; choose a divisor")
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, read: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Vectors [b, n, d] to vectors of the same shape.

        Args:
            x: what is updated, [b, n, d].
            read: what it attends to, [b, r, d]; `x` itself when None.
            mask: which of the r each of the n may attend to, bool [n, r]; all when None.
        """
        own = self.norm1(x)
        query = self._split(self.query(own))
        key, value = map(self._split, self.key_value(own if read is None else self.norm1(read)).chunk(2, dim=-1))
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=drop)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), drop)
        return x + self.fc2(F.dropout(F.gelu(self.fc1(self.norm2(x))), drop))

    def _split(self, x: Tensor) -> Tensor:
        """[b, n, d] to [b, heads, n, d / heads]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
