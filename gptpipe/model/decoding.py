"""One new token for each of several sequences: the network of gpt.py in fewer and larger operations.

For a single token, the arithmetic of a small network takes less time than starting its operations does. So
this does the same with a third of them. Queries and keys are normalised and rotated together, a residual is
added by the matrix product before it, and an RMSNorm takes four operations instead of torch's seven.

Shapes as in gpt.py, and G for the query heads of one key head.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptpipe.model.gpt import GPT, Block, CacheUpdate, KVCache

# Networks of fewer weights get a copy of their matrices in the order that is fastest on a CPU. In larger ones
# the time is in reading the weights, and a copy would take much memory.
_COPIED_BELOW = 50_000_000


class Decoder:
    """A network without dropout. Make a new one if its weights change: small ones are copied."""

    def __init__(self, model: GPT) -> None:
        self._copies = model.head.weight.device.type == "cpu" and model.n_parameters() < _COPIED_BELOW
        self._embedding = model.embedding.weight
        self._positions: Tensor | None = None
        self._rotary: tuple[Tensor, Tensor] | None = None
        if model.params.architecture == "gpt2":
            self._positions = model.position_embedding.weight
        else:
            self._rotary = _signed_tables(model.get_buffer("rotary_cos"), model.get_buffer("rotary_sin"))
        self._layers = [_Layer(block, self._matrix) for block in model.blocks if isinstance(block, Block)]
        self._final_norm = _Norm(model.final_norm)
        self._head = self._matrix(model.head)

    def _matrix(self, linear: nn.Module) -> Tensor:
        """The weights (in, out) of a linear layer."""
        assert isinstance(linear, nn.Linear)
        transposed = linear.weight.detach().t()
        return transposed.contiguous() if self._copies else transposed

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: KVCache, rows: Sequence[int]) -> Tensor:
        """Logits (B, V) after tokens (B,), which continue these rows of the cache."""
        update = CacheUpdate(cache, rows, 1)
        positions = update.positions[..., 0]  # (B,), or () if all are the same
        x = self._embedding[tokens]  # (B, D)
        rotary = None
        if self._positions is not None:
            x = x + self._positions[positions]
        else:
            assert self._rotary is not None
            cos, sin = self._rotary
            rotary = (cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2))  # (B, 1, H), or (1, H)
        for number, layer in enumerate(self._layers):
            x = layer.attend(x, rotary, update, number)
            x = layer.feed_forward(x)
        for row in rows:
            cache.lengths[row] += 1
        return torch.mm(self._final_norm(x), self._head)


class _Layer:
    """A block of gpt.py."""

    def __init__(self, block: Block, matrix: Callable[[nn.Module], Tensor]) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self._n_head, self._n_kv_head = attention.n_head, attention.n_kv_head
        self._head_dim = attention.head_dim
        self._attention_norm, self._feed_forward_norm = (
            _Norm(block.attention_norm),
            _Norm(block.feed_forward_norm),
        )
        self._qkv, self._qkv_bias = matrix(attention.qkv_proj), attention.qkv_proj.bias
        self._qk_norm = None
        if attention.normalises_qk:
            self._qk_norm = _Norm(attention.q_norm)
            weights = [attention.q_norm.weight] * self._n_head + [attention.k_norm.weight] * self._n_kv_head
            self._qk_norm.weight = torch.stack([weight.detach() for weight in weights]) * math.sqrt(
                self._head_dim
            )
        self._o, self._o_bias = matrix(attention.o_proj), attention.o_proj.bias
        self._gate = matrix(feed_forward.gate_proj) if feed_forward.is_gated else None
        self._up, self._up_bias = matrix(feed_forward.up_proj), feed_forward.up_proj.bias
        self._down, self._down_bias = matrix(feed_forward.down_proj), feed_forward.down_proj.bias

    def attend(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, update: CacheUpdate, number: int
    ) -> Tensor:
        """x (B, D) plus the attention of layer `number`."""
        n_qk = self._n_head + self._n_kv_head
        qkv = _product(self._attention_norm(x), self._qkv, self._qkv_bias)
        qkv = qkv.view(len(x), -1, self._head_dim)  # (B, N + 2K, H)
        qk, v = qkv[:, :n_qk], qkv[:, n_qk:]
        if self._qk_norm is not None:
            qk = self._qk_norm(qk)
        if rotary is not None:
            cos, sin = rotary
            qk = torch.addcmul(qk * cos, qk.roll(self._head_dim // 2, dims=-1), sin)
        keys, values = update.append(number, qk[:, None, self._n_head :], v[:, None])  # (B, places, K, H)
        q = qk[:, : self._n_head].reshape(len(x), self._n_kv_head, -1, self._head_dim)  # (B, K, G, H)
        y = F.scaled_dot_product_attention(
            q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=update.mask
        )  # (B, K, G, H): the queries of a group see the same keys, as positions would
        return _product_plus(x, y.reshape(len(x), -1), self._o, self._o_bias)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x (B, D) plus the result of the feed-forward layer."""
        normed = self._feed_forward_norm(x)
        h = _product(normed, self._up, self._up_bias)
        if self._gate is None:
            h = F.gelu(h, approximate="tanh")
        else:
            h = h.mul_(F.silu(torch.mm(normed, self._gate), inplace=True))
        return _product_plus(x, h, self._down, self._down_bias)


class _Norm:
    """LayerNorm or RMSNorm over the last dimension."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        assert norm.eps is not None
        self._is_rms = isinstance(norm, nn.RMSNorm)
        self._eps = norm.eps
        width = norm.normalized_shape[0]
        self._shape = (width,)
        self.weight = norm.weight.detach() * (math.sqrt(width) if self._is_rms else 1.0)
        self._bias = None if isinstance(norm, nn.RMSNorm) else norm.bias
        self._floor = self.weight.new_tensor(math.sqrt(width * norm.eps))

    def __call__(self, x: Tensor) -> Tensor:
        if not self._is_rms:
            return F.layer_norm(x, self._shape, self.weight, self._bias, self._eps)
        # sqrt(mean square + eps) is hypot(length, sqrt(width * eps)) / sqrt(width).
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        normed: Tensor = x * (self.weight / length.hypot_(self._floor))
        return normed


def _signed_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables for `x * cos + roll(x) * sin`, which is `rotate`: the first half of the sines is negative."""
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)


def _product_plus(residual: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.addmm(residual, x, matrix)
    return y if bias is None else y.add_(bias)
