"""A decoder-only transformer: GPT-2, Llama and Qwen3 as one network with switches.

| switch          | gpt2                   | llama          | qwen3                        |
|-----------------|------------------------|----------------|------------------------------|
| positions       | learned                | rotary         | rotary                       |
| norm            | LayerNorm              | RMSNorm        | RMSNorm, also on q and k     |
| feed-forward    | GELU                   | SwiGLU         | SwiGLU                       |
| biases          | yes                    | no             | no                           |
| keys and values | one head per query     | grouped        | grouped                      |

Shapes: B batch, T tokens, D n_embd, N n_head, K n_kv_head, H head width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptpipe.model.params import ModelParams


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of `hidden @ weight.T`, (R, D) and (V, D), with their gradients made in the same pass.

    The gradients, not the value, also hold `z_loss` times the sum of squared log normalizers.

    Only some rows of logits are there at a time, where a plain loss holds all (R, V) of them, their log softmax and the
    gradients of both (Wijmans et al., 2024, arXiv:2411.09009).
    """

    ROWS = 1024  # of logits at a time; a quarter of it saves memory, and costs an eighth of this pass's speed

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)
        total = hidden.new_zeros(())
        for start in range(0, len(hidden), LinearCrossEntropy.ROWS):
            rows = slice(start, start + LinearCrossEntropy.ROWS)
            target = targets[rows, None]  # (r, 1)
            logits = hidden[rows] @ weight.T  # (r, V)
            gradient = logits.softmax(-1)
            # The largest probability is 1 / sum(exp(logits - max)) and cannot underflow, as that of the target can.
            log_sum = logits.amax(-1) - gradient.amax(-1).log()
            total += log_sum.sum() - logits.gather(-1, target).sum()
            if z_loss:
                gradient *= (1 + 2 * z_loss * log_sum)[:, None]
            gradient.scatter_add_(-1, target, -gradient.new_ones(target.shape))
            torch.mm(gradient, weight, out=hidden_gradient[rows])
            weight_gradient.addmm_(gradient.T, hidden[rows], beta=float(start > 0))
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * gradients[0], weight_gradient * gradients[0], None, None


class TanhGELU(torch.autograd.Function):
    """GELU in GPT-2's tanh form (Hendrycks and Gimpel, 2016, arXiv:1606.08415), elementwise.

    0.5 x (1 + tanh(z / 2)) is x sigmoid(z), with z = sqrt(8 / pi) (x + 0.044715 x^3). On a CPU this takes 60% of the
    time of torch's kernel, whose tanh is slow, in parts that stay in the cache; its derivative is made with it.
    """

    LINEAR, CUBIC = math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi)
    PART = 1 << 18  # numbers

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        linear, y, derivative = x.new_tensor(TanhGELU.LINEAR), torch.empty_like(x), torch.empty_like(x)
        parts = (torch.split(tensor.view(-1), TanhGELU.PART) for tensor in (x, y, derivative))
        for some, value, slope in zip(*parts, strict=True):
            sigmoid = torch.addcmul(linear, some, some, value=TanhGELU.CUBIC).mul_(some).sigmoid_()
            torch.mul(some, sigmoid, out=value)
            dz_dx = torch.addcmul(linear, some, some, value=3 * TanhGELU.CUBIC)
            torch.addcmul(sigmoid, torch.addcmul(value, value, sigmoid, value=-1), dz_dx, out=slope)
        ctx.save_for_backward(derivative)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        derivative: Tensor = ctx.saved_tensors[0]
        return gradients[0] * derivative


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, K, capacity, H) per layer; `length` are used."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0


def rotary_tables(n_positions: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embeddings, (T, H) each (Su et al., 2021, arXiv:2104.09864, eq. 34)."""
    frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)  # (H/2,)
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float32), frequencies).repeat(1, 2)  # (T, H)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + H/2]) by its angle; x (B, N, T, H), tables (T, H)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def document_mask(tokens: Tensor, end_of_text: int) -> Tensor:
    """Which tokens (B, T) may look at which, (B, 1, T, T): those before them in the same document, and themselves.

    An end-of-text token closes its document. True: may look.
    """
    ends = (tokens == end_of_text).long()
    document = ends.cumsum(1) - ends  # (B, T)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()


def qkv_widths(params: ModelParams) -> list[int]:
    """Rows of queries, keys and values in the one matrix that makes them: one product is faster than three."""
    kv_width = params.n_kv_head * params.head_width
    return [params.n_head * params.head_width, kv_width, kv_width]


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al., 2023, arXiv:2305.13245)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_width = params.n_head, params.n_kv_head, params.head_width
        self.dropout = params.dropout
        bias = params.architecture == "gpt2"
        self.qkv_proj = nn.Linear(params.n_embd, sum(qkv_widths(params)), bias=bias)
        self.o_proj = nn.Linear(params.n_head * params.head_width, params.n_embd, bias=bias)
        self.normalises_qk = params.architecture == "qwen3"
        if self.normalises_qk:
            self.q_norm = nn.RMSNorm(params.head_width, eps=params.norm_eps)
            self.k_norm = nn.RMSNorm(params.head_width, eps=params.norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_width)  # (B, T, N + 2K, H)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)  # (B, T, N or K, H)
        if self.normalises_qk:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, N or K, T, H)
        if rotary is not None:
            q, k = rotate(q, *rotary).to(v.dtype), rotate(k, *rotary).to(v.dtype)
        if cache is not None:
            k, v, mask = _extend(cache, layer, k, v)
        if self.n_kv_head < self.n_head:
            group = self.n_head // self.n_kv_head
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, N, T, H)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, self.n_head * self.head_width)
        return F.dropout(self.o_proj(y), self.dropout, self.training)


def _extend(cache: KVCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append keys and values of T new tokens; returns all of them and the (T, length + T) mask that keeps it causal."""
    T, end = k.shape[2], cache.length + k.shape[2]
    cache.keys[layer][:, :, cache.length : end] = k
    cache.values[layer][:, :, cache.length : end] = v
    mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(cache.length)
    return cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end], mask


def gelu(x: Tensor) -> Tensor:
    """GPT-2's activation, by what is fastest for it here."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.requires_grad and not torch.compiler.is_compiling():
        y: Tensor = TanhGELU.apply(x)  # type: ignore[no-untyped-call]
        return y
    return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """GELU (GPT-2's tanh form), or SwiGLU (Shazeer, 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.gated = params.architecture != "gpt2"
        self.dropout = params.dropout
        if self.gated:
            self.gate_proj = nn.Linear(params.n_embd, params.n_inner, bias=False)
        self.up_proj = nn.Linear(params.n_embd, params.n_inner, bias=not self.gated)
        self.down_proj = nn.Linear(params.n_inner, params.n_embd, bias=not self.gated)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        h = F.silu(self.gate_proj(x)) * up if self.gated else gelu(up)
        return F.dropout(self.down_proj(h), self.dropout, self.training)


def _norm(params: ModelParams) -> nn.Module:
    if params.architecture == "gpt2":
        return nn.LayerNorm(params.n_embd, eps=params.norm_eps)
    return nn.RMSNorm(params.n_embd, eps=params.norm_eps)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.attention_norm, self.attention = _norm(params), Attention(params)
        self.feed_forward_norm, self.feed_forward = _norm(params), FeedForward(params)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache, layer)
        y: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return y


class GPT(nn.Module):
    """Token ids (B, T) in, logits (B, T, V) out. Draws its initial weights from torch's global generator."""

    def __init__(self, params: ModelParams, vocab_size: int) -> None:
        super().__init__()
        self.params, self.vocab_size = params, vocab_size
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(vocab_size, params.n_embd)
        if params.architecture == "gpt2":
            self.position_embedding = nn.Embedding(params.context_length, params.n_embd)
        else:
            cos, sin = rotary_tables(params.context_length, params.head_width, params.rope_theta)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.n_layer))
        self.final_norm = _norm(params)
        self.head = nn.Linear(params.n_embd, vocab_size, bias=False)
        if params.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's normal weights; residual outputs smaller with depth (Radford et al., 2019, section 2.3).

        A rotary model with a head of its own starts from embeddings as large as what the norms make of them, and from
        even odds for all tokens: its head is zero (Yang et al., 2022, arXiv:2203.03466, appendix D.2).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                is_residual_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.params.n_layer if is_residual_output else 1))
        if self.params.architecture != "gpt2" and not self.params.tie_embeddings:
            nn.init.normal_(self.embedding.weight)
            nn.init.zeros_(self.head.weight)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, D) of tokens (B, T). With a cache, tokens continue what it holds.

        `mask` (B, 1, T, T) says what may look at what, in place of all that came before.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        x = self.embedding(tokens)  # (B, T, D)
        rotary = None
        if self.params.architecture == "gpt2":
            x = x + self.position_embedding.weight[start:end]
            x = F.dropout(x, self.params.dropout, self.training)
        else:
            rotary = (self.get_buffer("rotary_cos")[start:end], self.get_buffer("rotary_sin")[start:end])
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rotary, mask, cache, layer, use_reentrant=False)
            else:
                x = block(x, rotary, mask, cache, layer)
        if cache is not None:
            cache.length = end
        normed: Tensor = self.final_norm(x)
        return normed

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V): position t scores the token at t + 1."""
        logits: Tensor = self.head(self.hidden(tokens, cache))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor, *, z_loss: float = 0.0, end_of_text: int | None = None) -> Tensor:
        """Mean cross entropy in nats per token of targets (B, T) given tokens (B, T), in float32.

        Its gradient is also that of `z_loss` times the mean squared log normalizer (Chowdhery et al., 2022,
        arXiv:2204.02311, section 5). With `end_of_text`, attention stays inside documents.
        """
        mask = None if end_of_text is None else document_mask(tokens, end_of_text)
        hidden, wanted = self.hidden(tokens, mask=mask).flatten(0, 1), targets.flatten()
        by_eager_cpu = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
        if by_eager_cpu and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            total: Tensor = LinearCrossEntropy.apply(hidden, self.head.weight, wanted, z_loss)  # type: ignore[no-untyped-call]
            return total / targets.numel()
        logits = self.head(hidden).float()
        cross_entropy = F.cross_entropy(logits, wanted)
        if z_loss:
            penalty = z_loss * logits.logsumexp(-1).square().mean()
            cross_entropy = cross_entropy + penalty - penalty.detach()
        return cross_entropy

    def new_cache(self, batch_size: int, n_tokens: int) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `n_tokens` tokens, or as many as the context holds."""
        length = min(n_tokens, self.params.context_length)
        shape = (batch_size, self.params.n_kv_head, length, self.params.head_width)
        like = self.embedding.weight
        return KVCache([like.new_zeros(shape) for _ in self.blocks], [like.new_zeros(shape) for _ in self.blocks])

    def n_parameters(self) -> int:
        """Trained numbers, tied weights once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def n_multiplied(self) -> int:
        """Parameters of the matrices that every token is multiplied with: tables are only looked up."""
        tables = [] if self.params.tie_embeddings else [self.embedding]
        if self.params.architecture == "gpt2":
            tables.append(self.position_embedding)
        matrices = sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)
        return matrices - sum(table.weight.numel() for table in tables)

    def flops_per_token(self) -> float:
        """Of a forward and a backward pass at full context, as for model FLOPs utilisation.

        Chowdhery et al., 2022, arXiv:2204.02311, appendix B: attention over the whole context, nothing recomputed.
        """
        params = self.params
        attention = params.n_layer * params.n_head * params.head_width * params.context_length
        return 6 * self.n_multiplied() + 12 * attention
