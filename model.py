"""GPT-2 (Radford et al. 2019) with its own parameter names; nothing of training, files or other workers.

Shapes: B batch, T tokens, C channels (n_embd), H heads, V vocabulary.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from config import ModelConfig


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: "ModelConfig") -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.dropout = cfg.dropout
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 of (B, H, T, C/H)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, C/H)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers around a GELU, (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: "ModelConfig") -> None:
        super().__init__()
        self.dropout = cfg.dropout
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's approximation, not the exact GELU
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """One pre-LN transformer layer, (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: "ModelConfig") -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 language model. The output layer is the token embedding wte: one parameter, which gets both gradients."""

    def __init__(self, cfg: "ModelConfig", context_length: int) -> None:
        super().__init__()
        self.context_length = context_length  # tokens, the largest T
        self.dropout = cfg.dropout
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(context_length, cfg.n_embd)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_f = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self._init_parameters_()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Return (logits, None) without targets, (None, loss) with them.

        idx and targets are (B, T) int64, logits (B, T, V). loss is the mean cross entropy in nats, a scalar.

        Raises:
            ValueError: T is above context_length.
        """
        x = self._hidden(idx)
        logits = F.linear(x, self.wte.weight)
        if targets is None:
            return logits, None
        # The compiler fuses the softmax and its gradient with the casts, and both overwrite the logits. So there is one
        # copy of the logits, in bfloat16 under autocast (2 V bytes per token, measured on the CPU), and none in fp32.
        # The chunked F.linear_cross_entropy is opaque to the compiler: it ignores autocast, or rounds the loss to bf16.
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _hidden(self, idx: Tensor) -> Tensor:
        """Input of the output layer, (B, T, C), for token ids (B, T)."""
        T = idx.shape[1]
        if T > self.context_length:
            raise ValueError(f"a sequence of {T} tokens does not fit context_length = {self.context_length}")
        x = self.wte(idx) + self.wpe.weight[:T]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return idx (B, T) continued by sampled tokens, (B, T + max_new_tokens). Call eval() first.

        Each token depends on the context_length tokens before it. temperature 0 takes the most likely token. top_k
        limits the choice to the k most likely tokens, vocab_size to the ids below it, if the model's own is padded.

        Raises:
            ValueError: temperature is negative, or top_k or vocab_size is below 1.
        """
        if temperature < 0:
            raise ValueError(f"temperature = {temperature} must not be negative")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k = {top_k} must be at least 1")
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"vocab_size = {vocab_size} must be at least 1")
        for _ in range(max_new_tokens):
            x = self._hidden(idx[:, -self.context_length :])
            logits = F.linear(x[:, -1], self.wte.weight[:vocab_size])  # (B, vocab_size)
            idx = torch.cat([idx, _sample(logits, temperature, top_k, generator)], dim=1)
        return idx

    def num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters. non_embedding excludes the positions wpe, but not wte, which is the output layer."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.wpe.weight.numel() if non_embedding else n

    def flops_per_token(self) -> int:
        """Floating point operations of forward and backward per token: 6N + 12 L H Q T.

        L layers, H heads, Q = C/H, T = context_length. Source: Chowdhery et al. 2022 (PaLM), appendix B.
        """
        L, HQ, T = len(self.h), self.wte.embedding_dim, self.context_length
        return 6 * self.num_params() + 12 * L * HQ * T

    def _init_parameters_(self) -> None:
        """Draw weights from Normal(0, 0.02) and set biases to zero.

        The projections into the residual stream are scaled by 1/sqrt(2 n_layers). So the variance of the stream does
        not grow with depth (Radford et al. 2019, section 2.3).
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim >= 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(self.h)) if residual else 0.02)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw one token id per row of logits (B, V), (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, num_samples=1, generator=generator)
