"""Attention as people write it by hand, and what looks like it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HANDWRITTEN", "B", "E", "Model", "N"]

B, N, E, H, D = 3, 6, 8, 2, 4  # batch, positions, features, heads, features of a head
LOW = torch.finfo(torch.float32).min

Body = Callable[["Model", Tensor], Any]


class Model(nn.Module):
    """Weights that attention may have, and a forward that is given."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.q, self.v, self.out = (nn.Linear(E, E) for _ in range(3))
        self.k = nn.Linear(E, E, bias=False)  # a bias of keys changes no weight
        self.qkv = nn.Linear(E, 3 * E, bias=False)
        self.kv = nn.Linear(E, 2 * E, bias=False)
        self.one = nn.Linear(E, D, bias=False)
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(H, N, N))
        self.table = nn.Parameter(torch.randn(2 * N - 1, H))
        self.rel = nn.Parameter(torch.randn(2 * N - 1, D))
        self.sink = nn.Parameter(torch.randn(H))
        self.mix = nn.Parameter(torch.randn(H, H))
        self.null = nn.Parameter(torch.randn(2, H, 1, D))
        self.u, self.w = (nn.Parameter(torch.randn(H, 1, D)) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.memory = nn.Parameter(torch.randn(5, E))
        self.tril: Tensor
        self.index: Tensor
        self.register_buffer("tril", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))
        self.register_buffer("index", torch.arange(N)[:, None] - torch.arange(N)[None] + N - 1)
        self.body = body

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (B, H, N, D) each."""
        flat = (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.view(x.shape[0], -1, H, D).transpose(1, 2) for t in flat)
        return q, k, v

    def forward(self, x: Tensor) -> Any:
        """Whatever is tested."""
        return self.body(self, x)


# name: (forward, how many attentions it has, what is said of those that it nearly has)
HANDWRITTEN: dict[str, tuple[Body, int, list[str]]] = {}


NO_SOFTMAX = "no softmax stands between the product of queries and keys and that with v"


def attention(count: int = 1, *reasons: str) -> Callable[[Body], Body]:
    """Enter a forward into the table."""

    def enter(body: Body) -> Body:
        HANDWRITTEN[body.__name__] = body, count, list(reasons)
        return body

    return enter


def merge(x: Tensor) -> Tensor:
    """(B, H, n, D) as (B, n, E)."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, E)


def rotated(t: Tensor) -> Tensor:
    """Half of the features negated and put last."""
    return torch.cat([-t[..., D // 2 :], t[..., : D // 2]], -1)


def upper(n: int) -> Tensor:
    """What causality drops."""
    return torch.ones(n, n, dtype=torch.bool).triu(1)


@attention()
def nano_gpt(m: Model, x: Tensor) -> Any:
    b, t, c = x.size()
    q, k, v = m.qkv(x).split(E, dim=2)
    k = k.view(b, t, H, c // H).transpose(1, 2)
    q = q.view(b, t, H, c // H).transpose(1, 2)
    v = v.view(b, t, H, c // H).transpose(1, 2)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(m.tril[:, :, :t, :t] == 0, float("-inf"))
    att = F.softmax(att, dim=-1)
    att = F.dropout(att, 0.1, m.training)
    y = att @ v
    y = y.transpose(1, 2).contiguous().view(b, t, c)
    return m.out(y)


@attention()
def annotated(m: Model, x: Tensor) -> Any:
    mask = (x[..., 0] > -9)[:, None, :] & ~upper(x.size(1))
    mask = mask.unsqueeze(1)
    q, k, v = (layer(x).view(x.size(0), -1, H, D).transpose(1, 2) for layer in (m.q, m.k, m.v))
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(mask == 0, -1e9)
    p = scores.softmax(dim=-1)
    y = torch.matmul(p, v)
    return m.out(y.transpose(1, 2).contiguous().view(x.size(0), -1, E)), p


@attention()
def x_transformers(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * D**-0.5
    sim = sim + m.bias
    i, j = sim.shape[-2:]
    r = torch.arange(i)
    causal = r[:, None] < torch.arange(j)[None]
    sim = sim.masked_fill(causal, -torch.finfo(sim.dtype).max)
    sim = sim - sim.amax(dim=-1, keepdim=True).detach()
    attn = sim.softmax(dim=-1, dtype=torch.float32).type(x.dtype)
    return m.out(merge(torch.einsum("b h i j, b h j d -> b h i d", attn, v)))


@attention()
def qkv_indexed(m: Model, x: Tensor) -> Any:
    b, n, c = x.shape
    qkv = m.qkv(x).reshape(b, n, 3, H, D)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[..., 2, :, :]
    a = torch.einsum("bthd,bshd->bhts", q, k * D**-0.5)
    return torch.einsum("bhts,bshd->bthd", torch.softmax(a, -1), v).reshape(b, n, c)


def windowed(m: Model, x: Tensor, mask: Tensor) -> Tensor:
    b = x.shape[0]
    y = x.repeat(1, 6, 1)[:, :16].view(b, 4, 4, E)
    y = torch.roll(y, (-1, -1), (1, 2))
    win = y.view(b, 2, 2, 2, 2, E).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, E)
    nb = win.shape[0]
    q, k, v = m.qkv(win).reshape(nb, 4, 3, H, D).permute(2, 0, 3, 1, 4)
    attn = (q * D**-0.5) @ k.transpose(-2, -1)
    bias = m.table[m.index[:4, :4].reshape(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
    attn = attn + bias.unsqueeze(0)
    if mask is not None:
        nw = mask.shape[0]
        attn = attn.view(nb // nw, nw, H, 4, 4) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, H, 4, 4)
    out = (attn.softmax(-1) @ v).transpose(1, 2).reshape(nb, 4, E)
    out = out.view(b, 2, 2, 2, 2, E).permute(0, 1, 3, 2, 4, 5).reshape(b, 4, 4, E)
    return torch.roll(out, (1, 1), (1, 2))


@attention()
def swin_shifted(m: Model, x: Tensor) -> Any:
    img = torch.zeros(1, 4, 4, 1)
    part = 0
    for h in (slice(0, -2), slice(-2, -1), slice(-1, None)):
        for w in (slice(0, -2), slice(-2, -1), slice(-1, None)):
            img[:, h, w] = part
            part += 1
    parts = img.view(1, 2, 2, 2, 2, 1).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4)
    mask = parts.unsqueeze(1) - parts.unsqueeze(2)
    mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
    return windowed(m, x, mask)


def rel_shift(x: Tensor) -> Tensor:
    b, h, n, p = x.shape
    x = F.pad(x, (1, 0)).view(b, h, p + 1, n)
    return x[:, :, 1:].view(b, h, n, p)[..., :n]


@attention()
def transformer_xl(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    pos = m.rel[None, None].expand(B, H, -1, -1)
    ac = torch.einsum("bhid,bhjd->bhij", q + m.u, k)
    bd = rel_shift(torch.einsum("bhid,bhjd->bhij", q + m.w, pos))
    s = (ac + bd) * D**-0.5
    s = s.masked_fill(upper(N)[None, None], float("-inf"))
    return merge(torch.einsum("bhij,bhjd->bhid", F.softmax(s, 3), v))


@attention()
def transformer_xl_ijbn(m: Model, x: Tensor) -> Any:
    # (i, j, b, n) as in the original
    y = x.transpose(0, 1)
    q, k, v = (t.view(N, B, H, D) for t in m.qkv(y).chunk(3, -1))
    r = m.rel[:N].unsqueeze(1).expand(-1, H, -1)
    ac = torch.einsum("ibnd,jbnd->ijbn", q + m.u[:, 0], k)
    bd = torch.einsum("ibnd,jnd->ijbn", q + m.w[:, 0], r)
    z = torch.zeros(N, 1, B, H)
    bd = torch.cat([z, bd], 1).view(N + 1, N, B, H)[1:].view_as(bd)
    s = (ac + bd).mul_(D**-0.5)
    s = s.float().masked_fill(upper(N)[:, :, None, None], -float("inf")).type_as(s)
    p = F.softmax(s, dim=1)
    o = torch.einsum("ijbn,jbnd->ibnd", p, v)
    return m.out(o.contiguous().view(N, B, E)).transpose(0, 1)


@attention()
def deberta(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    scale = math.sqrt(D * 3)
    s = torch.matmul(q, k.transpose(-1, -2) / scale)
    c2p = torch.matmul(q, m.rel.t())
    s = s + torch.gather(c2p, -1, m.index.expand(B, H, N, N)) / scale
    p2c = torch.matmul(k, m.rel.t())
    s = s + torch.gather(p2c, -1, m.index.t().expand(B, H, N, N)).transpose(-1, -2) / scale
    rmask = ~(x[:, None, None, :, 0] > -9).to(torch.bool)
    s = s.masked_fill(rmask, torch.finfo(s.dtype).min)
    p = torch.softmax(s, -1)
    p = p.masked_fill(rmask, 0)
    return merge(p @ v)


@attention()
def sew_d_padded(m: Model, x: Tensor) -> Any:
    keep = x[..., 0] > x[..., 0].mean(1, keepdim=True)
    mask = keep[:, None, None, :] & keep[:, None, :, None]
    q, k, v = m.heads(x)
    s = (q @ k.mT) / 2
    s = s.masked_fill(~mask, torch.finfo(s.dtype).min)
    p = torch.softmax(s, -1)
    p = p.masked_fill(~mask, 0)
    return merge(p @ v)


@attention()
def cpm_mask_compared_with_a_tensor(m: Model, x: Tensor) -> Any:
    keep = x[..., 0] > x[..., 0].mean(1, keepdim=True)
    mask = keep[:, None, None, :] & keep[:, None, :, None]
    q, k, v = m.heads(x)
    s = (q @ k.mT) / 2
    s = torch.masked_fill(s, mask == torch.tensor(False), torch.tensor(-torch.inf))
    p = torch.softmax(s, -1)
    p = torch.masked_fill(p, mask == torch.tensor(False), torch.tensor(0.0))
    return merge(p @ v)


@attention()
def xsoftmax_one_mask(m: Model, x: Tensor) -> Any:
    keep = (x[..., 0] > x[..., 0].mean(1, keepdim=True))[:, None, None, :]
    q, k, v = m.heads(x)
    s = (q @ k.mT).masked_fill(~keep, float("-inf"))
    p = torch.where(keep, s.softmax(-1), 0.0)
    return p @ v


@attention()
def mul_after_softmax(m: Model, x: Tensor) -> Any:
    keep = upper(N).logical_not()
    q, k, v = m.heads(x)
    s = (q @ k.mT).masked_fill(~keep, float("-inf"))
    return (s.softmax(-1) * keep) @ v


@attention()
def nan_to_num_after(m: Model, x: Tensor) -> Any:
    keep = (x[..., 0] > -9)[:, None, None, :]
    q, k, v = m.heads(x)
    s = (q @ k.mT).masked_fill(~keep, float("-inf"))
    return torch.nan_to_num(s.softmax(-1), 0.0) @ v


@attention()
def t5(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    scores = torch.matmul(q, k.transpose(3, 2))
    ctx, mem = torch.arange(N)[:, None], torch.arange(N)[None]
    rp = mem - ctx
    buckets = (rp > 0).long() * 4
    n = rp.abs()
    large = 2 + (torch.log(n.float().clamp(min=1) / 2) / math.log(4) * 2).long()
    buckets = buckets + torch.where(n < 2, n, torch.min(large, torch.full_like(large, 3)))
    bias = F.embedding(buckets, m.table).permute([2, 0, 1]).unsqueeze(0)
    bias = bias + (1.0 - (x[:, None, None, :, 0] > -9).float()) * LOW
    scores += bias
    w = F.softmax(scores.float(), dim=-1).type_as(scores)
    return merge(w @ v)


@attention()
def bloom_baddbmm(m: Model, x: Tensor) -> Any:
    q, k, v = (t.reshape(B * H, N, D) for t in m.heads(x))
    slopes = torch.tensor([0.5, 0.25], dtype=x.dtype)
    al = (slopes[:, None] * torch.arange(N)[None]).repeat(B, 1)[:, None, :]
    s = torch.baddbmm(al, q, k.transpose(1, 2), beta=1.0, alpha=D**-0.5)
    s = s.view(B, H, N, N)
    s = torch.masked_fill(s, upper(N), torch.finfo(s.dtype).min)
    p = F.softmax(s, -1, dtype=torch.float32).to(x.dtype).view(B * H, N, N)
    return torch.bmm(p, v).view(B, H, N, D)


@attention()
def bigcode_merged(m: Model, x: Tensor) -> Any:
    b = x.shape[0]
    # q (b, N*H, D) against one key head
    q = m.q(x).view(b, N * H, D)
    k, v = m.one(x), m.one(x + 1)
    s = torch.baddbmm(
        torch.empty(b, N * H, N, dtype=x.dtype), q, k.transpose(1, 2), beta=0, alpha=D**-0.5
    ).view(b, N, H, N)
    mask = (~upper(N))[None, :, None, :]
    s = torch.where(mask, s, torch.full([], LOW))
    p = s.softmax(-1)
    return torch.bmm(p.view(b, N * H, N), v).view(b, N, E)


@attention()
def gqa_einsum(m: Model, x: Tensor) -> Any:
    q = m.qkv(x).view(B, N, 2, 3, D)  # 2 groups of 3
    k, v = (p(x).view(B, N, 2, D) for p in (m.k, m.v))
    s = torch.einsum("bngid,bmgd->bginm", q, k)
    s = s.masked_fill(upper(N), LOW)
    return torch.einsum("bginm,bmgd->bngid", s.softmax(-1), v).reshape(B, N, -1)


@attention()
def einops_like(m: Model, x: Tensor) -> Any:
    q, k, v = (
        t.reshape(B, N, H, D).permute(0, 2, 1, 3).reshape(B * H, N, D)
        for t in m.qkv(x).chunk(3, dim=-1)
    )
    sim = torch.einsum("b i d, b j d -> b i j", q, k) * D**-0.5
    mask = (x[..., 0] > -9).reshape(B, 1, N).repeat_interleave(H, 0)
    sim.masked_fill_(~mask, -torch.finfo(sim.dtype).max)
    out = torch.einsum("b i j, b j d -> b i d", sim.softmax(-1), v)
    return out.reshape(B, H, N, D).permute(0, 2, 1, 3).reshape(B, N, E)


@attention()
def softmax_dim1_keys_first(m: Model, x: Tensor) -> Any:
    q, k, v = (p(x) for p in (m.q, m.k, m.v))
    s = k @ q.mT  # (B, Nk, Nq)
    p = F.softmax(s, dim=1)
    return p.transpose(1, 2) @ v


@attention()
def nonlocal_block(m: Model, x: Tensor) -> Any:
    # self-attention GAN: channels first
    y = x.mT.reshape(B, E, 2, 3)
    f, g, h = (
        F.conv2d(y, layer.weight[..., None, None]).view(B, E, -1) for layer in (m.q, m.k, m.v)
    )
    beta = F.softmax(torch.bmm(f.transpose(1, 2), g), -1)
    o = torch.bmm(h, beta.transpose(1, 2))
    return m.scale * o.view(B, E, 2, 3) + y


@attention()
def nonlocal_dim1(m: Model, x: Tensor) -> Any:
    # fastai: softmax over dim=1 of f^T g, h @ beta
    y = x.mT
    f, g, h = (F.conv1d(y, layer.weight[..., None]) for layer in (m.q, m.k, m.v))
    beta = F.softmax(torch.bmm(f.transpose(1, 2), g), dim=1)
    return torch.bmm(h, beta)


@attention()
def openai_unet_legacy(m: Model, x: Tensor) -> Any:
    qkv = m.qkv(x).mT
    bs, width, length = qkv.shape
    ch = width // (3 * H)
    q, k, v = qkv.reshape(bs * H, ch * 3, length).split(ch, dim=1)
    scale = 1 / math.sqrt(math.sqrt(ch))
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    a = torch.einsum("bts,bcs->bct", weight, v)
    return a.reshape(bs, -1, length)


@attention()
def superglue(m: Model, x: Tensor) -> Any:
    q, k, v = (layer(x).mT.view(B, D, H, -1) for layer in (m.q, m.k, m.v))
    s = torch.einsum("bdhn,bdhm->bhnm", q, k) / D**0.5
    p = F.softmax(s, dim=-1)
    return torch.einsum("bhnm,bdhm->bdhn", p, v).contiguous().view(B, E, -1)


@attention(3)
def chunked_queries(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    outs = []
    for i in range(0, N, 2):
        s = q[:, :, i : i + 2] @ k.mT * D**-0.5 + m.bias[:, i : i + 2]
        outs.append(s.softmax(-1) @ v)
    return torch.cat(outs, 2)


@attention(2)
def heads_in_a_loop(m: Model, x: Tensor) -> Any:
    outs = []
    for h in range(H):
        q, k, v = (F.linear(x, layer.weight[h * D : (h + 1) * D]) for layer in (m.q, m.k, m.v))
        w = q @ k.transpose(-2, -1) * D**-0.5
        w = w.masked_fill(m.tril[0, 0, :N, :N] == 0, float("-inf"))
        outs.append(F.softmax(w, dim=-1) @ v)
    return torch.cat(outs, -1)


@attention(3)
def batch_in_a_loop(m: Model, x: Tensor) -> Any:
    outs = []
    for i in range(B):
        q, k, v = m.q(x[i]), m.k(x[i]), m.v(x[i])
        outs.append(torch.softmax(torch.mm(q, k.t()), 1).mm(v))
    return torch.stack(outs)


@attention()
def float_mask_padding(m: Model, x: Tensor) -> Any:
    keep = (x[..., 0] > -9).float()
    q, k, v = m.heads(x)
    s = q @ k.mT
    mask = keep[:, None, None, :] * keep[:, None, :, None]
    s = s * mask - 1e30 * (1 - mask)
    return s.softmax(-1) @ v


@attention()
def gpt2_old(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    w = q @ k.mT
    b = m.tril[:, :, :N, :N]
    w = w * b + -1e9 * (1 - b)
    return w.softmax(-1) @ v


@attention()
def log_mask(m: Model, x: Tensor) -> Any:
    keep = (x[..., 0] > -9).float()[:, None, None]
    q, k, v = m.heads(x)
    return (q @ k.mT + (keep + 1e-45).log()).softmax(-1) @ v


@attention()
def null_kv(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    nk, nv = (t.expand(B, -1, -1, -1) for t in m.null)
    k, v = torch.cat([nk, k], -2), torch.cat([nv, v], -2)
    mask = F.pad((x[..., 0] > -9)[:, None, None], (1, 0), value=True)
    return (q @ k.mT).masked_fill(~mask, LOW).softmax(-1) @ v


@attention()
def cross(m: Model, x: Tensor) -> Any:
    mem = m.memory.expand(B, -1, -1)
    q = m.q(x).view(B, N, H, D).transpose(1, 2)
    k, v = m.kv(mem).view(B, 5, 2, H, D).permute(2, 0, 3, 1, 4)
    return merge((q @ k.mT * 0.5).softmax(-1) @ v)


@attention()
def adjoint(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return torch.softmax(q @ k.adjoint(), -1) @ v


@attention()
def swapaxes(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return q.matmul(k.swapaxes(-1, -2)).div(2.0).softmax(-1).matmul(v)


@attention()
def rope(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    t = torch.arange(N)[:, None] * 10000 ** (-torch.arange(0, D, 2) / D)
    cos, sin = torch.cat([t, t], -1).cos(), torch.cat([t, t], -1).sin()
    q, k = q * cos + rotated(q) * sin, k * cos + rotated(k) * sin
    return (q @ k.mT / 2).softmax(-1) @ v


@attention()
def softmax_by_hand_late_division(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = q @ k.mT
    e = torch.exp(s - s.max(-1, True).values)
    return (e @ v) / e.sum(-1, keepdim=True)


@attention()
def softmax_unsqueezed_sum(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    e = torch.exp(q @ k.mT)
    return (e / e.sum(-1).unsqueeze(-1)) @ v


@attention()
def masked_exp(m: Model, x: Tensor) -> Any:
    # exp(s) * mask / sum(exp(s) * mask)
    q, k, v = m.heads(x)
    keep = (~upper(N)).float()
    s = q @ k.mT
    e = torch.exp(s - s.amax(-1, keepdim=True)) * keep
    return (e / e.sum(-1, keepdim=True)) @ v


@attention()
def masked_exp_where(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    e = torch.exp(q @ k.mT).masked_fill(upper(N), 0)
    return (e / e.sum(-1, keepdim=True)) @ v


@attention()
def powers_of_two(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = q @ k.mT * (D**-0.5 / math.log(2))
    e = torch.exp2(s - s.amax(-1, keepdim=True)) * (~upper(N)).float()
    return (e * e.sum(-1, keepdim=True).pow(-1)) @ v


@attention()
def powers_of_e(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    e = math.e ** (q @ k.mT)
    return torch.einsum("bhij,bhjd->bhid", e, v) / e.sum(-1, keepdim=True)


@attention()
def added_by_parts(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = torch.sub(m.bias, torch.add(m.bias.cos(), q @ k.mT, alpha=0.25), alpha=-2)
    return s.softmax(-1) @ v


@attention()
def mapped_over_batch_and_heads(m: Model, x: Tensor) -> Any:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.T / 2, -1) @ v

    return torch.vmap(torch.vmap(one))(*m.heads(x))


@attention()
def late_masked(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = (q @ k.mT / 2).masked_fill(upper(N), -torch.inf)
    e = torch.exp(s - s.max(-1, True).values)
    return torch.matmul(e, v) / (e.sum(-1)[..., None])


@attention(0, "something is added to the sum of a hand-written softmax")
def masked_exp_eps(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    e = torch.exp(q @ k.mT) * (x[:, None, None, :, 0] > 0)
    return (e / (e.sum(-1, keepdim=True) + 1e-8)) @ v


@attention(0, "exponentials are changed before they are summed")
def exp_gated(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    e = torch.exp(q @ k.mT) * (x[:, None, None, :, 0])
    return (e / e.sum(-1, keepdim=True)) @ v


@attention()
def broadcast_multiply_scores(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)
    return s.softmax(-1) @ v


@attention()
def broadcast_multiply_all(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = (q[..., None, :].expand(B, H, N, N, D) * k[..., None, :, :] / 2).sum(-1)
    return (s.softmax(-1)[..., None] * v[:, :, None]).sum(-2)


@attention()
def broadcast_multiply_shared(m: Model, x: Tensor) -> Any:
    # heads share their keys; the mean of products is a scale
    q, k, v = m.heads(x)[0], m.one(x), m.one(x).tanh()
    s = (q[:, :, :, None] * k[:, None, None]).mean(-1)
    return (s.softmax(-1)[..., None] * v[:, None, None]).sum(3)


@attention()
def broadcast_multiply_one_query(m: Model, x: Tensor) -> Any:
    q, k, v = m.q(x[:, -1:]), m.k(x), m.v(x)
    w = torch.softmax((q * k).sum(-1, keepdim=True) / E**0.5, 1)
    return (w * v).sum(1)


@attention(0)
def broadcast_multiply_experts(m: Model, x: Tensor) -> Any:
    gate = m.q(x)[..., :2].softmax(-1)
    return (gate[..., None] * torch.stack([m.k(x), m.v(x)], -2)).sum(-2)


@attention()
def bahdanau_dot(m: Model, x: Tensor) -> Any:
    # Luong dot attention: bmm of decoder state
    enc = m.k(x)
    dec = m.q(x[:, -1])
    s = torch.bmm(enc, dec.unsqueeze(2)).squeeze(2)
    w = F.softmax(s, dim=1)
    return torch.bmm(w.unsqueeze(1), enc).squeeze(1)


@attention()
def luong_einsum(m: Model, x: Tensor) -> Any:
    enc, dec = m.k(x), m.q(x[:, -1])
    w = torch.einsum("be,bte->bt", dec, enc).softmax(-1)
    return torch.einsum("bt,bte->be", w, enc)


@attention()
def keys_vector_first(m: Model, x: Tensor) -> Any:
    enc, dec = m.k(x), m.q(x[:, -1])
    w = torch.einsum("bte,be->tb", enc, dec).softmax(0)
    return torch.einsum("bte,tb->eb", enc, w)


@attention()
def last_query_heads(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    q = q[:, :, -1]
    w = torch.einsum("bhd,bhtd->bht", q, k) * 0.5 + m.bias[:, 0]
    w = w.masked_fill((x[:, None, :, 0] < -9), LOW).softmax(-1)
    return torch.einsum("bht,bhtd->bhd", w, v)


@attention()
def last_query_matmul(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = (k @ q[:, :, -1].unsqueeze(-1)).squeeze(-1) / m.temperature[:, 0]
    return (s.softmax(-1).unsqueeze(-2) @ v).squeeze(-2)


@attention()
def memory_matmul(m: Model, x: Tensor) -> Any:
    # queries shared by the batch: no batch dimension
    s = m.memory @ m.k(x).mT
    return s.softmax(-1) @ m.v(x)


@attention()
def relative_keys_bert(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = q @ k.mT
    pos = F.embedding(m.index, m.rel)
    s = s + torch.einsum("bhld,lrd->bhlr", q, pos) + torch.einsum("bhrd,lrd->bhlr", k, pos)
    return (s / 2).softmax(-1) @ v


@attention()
def vitdet_rel(m: Model, x: Tensor) -> Any:
    b = x.shape[0]
    q, k, v = (t.reshape(b * H, N, D) for t in m.heads(x))
    a = (q * D**-0.5) @ k.mT
    rq = q.reshape(b * H, 2, 3, D)
    rh = torch.einsum("bhwc,hkc->bhwk", rq, m.rel[:4].view(2, 2, D))
    rw = torch.einsum("bhwc,wkc->bhwk", rq, m.rel[:9].view(3, 3, D))
    a = (a.view(-1, 2, 3, 2, 3) + rh[:, :, :, :, None] + rw[:, :, :, None, :]).view(-1, N, N)
    return (a.softmax(-1) @ v).view(b, H, N, D)


@attention()
def local_look_back(m: Model, x: Tensor) -> Any:
    # lucidrains local attention: every block sees the one before
    q, k, v = (t.reshape(B * H, 3, 2, D) for t in m.heads(x))
    k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :3], t], 2) for t in (k, v))
    s = torch.einsum("bhie,bhje->bhij", q, k) * D**-0.5
    seq = torch.arange(N).view(1, 3, 2)
    bk = torch.cat([F.pad(seq, (0, 0, 1, 0), value=-1)[:, :3], seq], 2)
    s = s.masked_fill(seq[..., :, None] < bk[..., None, :], LOW)
    s = s.masked_fill(bk[..., None, :] == -1, LOW)
    return torch.einsum("bhij,bhje->bhie", s.softmax(-1), v).reshape(B, H, N, D)


@attention()
def axial(m: Model, x: Tensor) -> Any:
    y = x.view(B, 2, 3, E)
    q, k, v = (layer(y).view(B, 2, 3, H, D) for layer in (m.q, m.k, m.v))
    s = torch.einsum("bxyhd,bzyhd->byhxz", q, k)
    return torch.einsum("byhxz,bzyhd->bxyhd", s.softmax(-1), v).reshape(B, 2, 3, E)


@attention()
def xca(m: Model, x: Tensor) -> Any:
    # cross-covariance attention: over channels of features, a softmax of a product with a product
    b, n, c = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, H, D).permute(2, 0, 3, 4, 1)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    a = (q @ k.transpose(-2, -1)) * m.temperature
    return (a.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, c)


@attention()
def negative_distance(m: Model, x: Tensor) -> Any:
    # -|q-k|^2 = 2qk - |q|^2 - |k|^2
    q, k, v = m.heads(x)
    d = q.square().sum(-1, keepdim=True) - 2 * q @ k.mT + k.square().sum(-1).unsqueeze(-2)
    return (-d).softmax(-1) @ v


@attention(0, "softmax is not of a product of queries and keys, but of aten.min.other")
def threshold_min(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = torch.min(q @ k.mT, torch.where(upper(N), -torch.inf, torch.inf))
    return s.softmax(-1) @ v


@attention()
def in_place(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = q @ k.mT
    s *= D**-0.5
    s[:, :, upper(N)] = -torch.inf
    return s.softmax(-1) @ v


@attention()
def tril_log(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return (q @ k.mT + torch.tril(torch.ones(N, N)).log()).softmax(-1) @ v


@attention()
def where_broadcast_scores(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    keep = (x[..., 0] > -9)[:, None, None]
    low = torch.full_like(q @ k.mT, LOW)
    return torch.where(keep, q @ k.mT, low).softmax(-1) @ v


@attention(0, "probabilities are changed between softmax and the product with v")
def differential(m: Model, x: Tensor) -> Any:
    q1, k1, v = m.heads(x)
    q2, k2, _ = m.heads(x.flip(1))
    a1 = (q1 @ k1.mT).softmax(-1)
    a2 = (q2 @ k2.mT).softmax(-1)
    return (a1 - m.scale * a2) @ v


@attention()
def query_gate_after(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return (q @ k.mT).softmax(-1) * x[:, None, :, :1].sigmoid() @ v


@attention()
def head_mask(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    p = (q @ k.mT).softmax(-1)
    p = p * m.mix[0].view(1, -1, 1, 1)
    return p @ v


@attention()
def tensordot_values(m: Model, x: Tensor) -> Any:
    q, k, v = m.q(x[0]), m.k(x[0]), m.v(x[0])
    return torch.tensordot(torch.tensordot(q, k, ([1], [1])).softmax(-1), v, 1)


@attention()
def inner_values(m: Model, x: Tensor) -> Any:
    q, k, v = m.q(x[0]), m.k(x[0]), m.v(x[0])
    return torch.inner(torch.inner(q, k).softmax(-1), v.T)


@attention()
def f_linear_scores(m: Model, x: Tensor) -> Any:
    q, k, v = m.q(x[0]), m.k(x[0]), m.v(x[0])
    return torch.mm(F.linear(q, k).softmax(-1), v)


@attention()
def addmm_scores(m: Model, x: Tensor) -> Any:
    q, k, v = m.q(x[0]), m.k(x[0]), m.v(x[0])
    return torch.addmm(m.bias[0], q, k.t(), alpha=0.5).softmax(-1) @ v


@attention()
def addbmm_value_bias(m: Model, x: Tensor) -> Any:
    q, k, v = (t.reshape(B * H, N, D) for t in m.heads(x))
    p = torch.bmm(q, k.mT).softmax(-1)
    return torch.baddbmm(m.u.repeat(B, 1, 1), p, v)


@attention()
def pair_bias_evoformer(m: Model, x: Tensor) -> Any:
    # AlphaFold-like: bias from a pair representation, gate after
    q, k, v = (p(x).view(B, N, H, D) for p in (m.q, m.k, m.v))
    pair = x[:, :, None] * x[:, None]
    b = F.linear(pair, m.out.weight[:H]).permute(0, 3, 1, 2)
    mask_bias = 1e9 * ((x[..., 0] > -9).float() - 1)[:, None, None, :]
    a = torch.einsum("bqhc,bkhc->bhqk", q * D**-0.5, k) + b + mask_bias
    o = torch.einsum("bhqk,bkhc->bqhc", a.softmax(-1), v)
    return m.out((o * torch.sigmoid(m.v(x)).view(B, N, H, D)).reshape(B, N, E))


@attention()
def graph_attention_adj(m: Model, x: Tensor) -> Any:
    # graph transformer with dense adjacency where()
    q, k, v = m.heads(x)
    adj = (x @ x.mT) > -99
    e = q @ k.mT / 2
    zero = -9e15 * torch.ones_like(e)
    a = torch.where(adj[:, None] > 0, e, zero)
    return F.softmax(a, dim=-1) @ v


@attention()
def megatron(m: Model, x: Tensor) -> Any:
    y = x.transpose(0, 1)
    mixed = m.qkv(y).view(N, B, H, 3 * D)
    q, k, v = torch.split(mixed, D, dim=-1)
    q, k = q.reshape(N, B * H, D), k.reshape(N, B * H, D)
    s = torch.baddbmm(
        torch.zeros(B * H, N, N, dtype=x.dtype),
        q.transpose(0, 1),
        k.transpose(0, 1).transpose(1, 2),
        beta=0.0,
        alpha=0.5,
    )
    s = s.view(B, H, N, N).masked_fill(upper(N), -10000.0)
    p = torch.softmax(s, -1).view(B * H, N, N)
    v = v.reshape(N, B * H, D)
    c = torch.bmm(p, v.transpose(0, 1)).view(B, H, N, D)
    return c.permute(2, 0, 1, 3).contiguous().view(N, B, E)


@attention()
def fairseq(m: Model, x: Tensor) -> Any:
    y = x.transpose(0, 1)
    q = m.q(y) * D**-0.5
    k, v = m.k(y), m.v(y)
    q, k, v = (t.contiguous().view(N, B * H, D).transpose(0, 1) for t in (q, k, v))
    s = torch.bmm(q, k.transpose(1, 2))
    mask = torch.triu(torch.full((N, N), float("-inf")), 1)
    s += mask.unsqueeze(0)
    s = s.view(B, H, N, N)
    s = s.masked_fill((x[..., 0] < -9).unsqueeze(1).unsqueeze(2), float("-inf"))
    s = s.view(B * H, N, N)
    f = F.softmax(s, dim=-1, dtype=torch.float32)
    p = f.type_as(s)
    a = torch.bmm(F.dropout(p, 0.1, False), v)
    a = a.transpose(0, 1).contiguous().view(N, B, E)
    return m.out(a), f.view(B, H, N, N).transpose(1, 0).mean(0)


@attention()
def topk_sparse(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = q @ k.mT
    kth = s.topk(3, dim=-1).values[..., -1:]
    return s.masked_fill(s < kth, -torch.inf).softmax(-1) @ v


@attention(0, "the softmax has columns that no value belongs to (sinks)")
def sinks(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = q @ k.mT
    s = torch.cat([s, m.sink.view(1, H, 1, 1).expand(B, -1, N, -1)], -1)
    return s.softmax(-1)[..., :-1] @ v


@attention(0, "a soft cap (tanh) stands between scores and softmax")
def softcap(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = q @ k.mT / 50
    return (torch.tanh(s) * 50).masked_fill(upper(N), LOW).softmax(-1) @ v


@attention(0, "heads are mixed between scores and softmax")
def talking_before(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = torch.einsum("bhij,hg->bgij", q @ k.mT, m.mix)
    return s.softmax(-1) @ v


@attention(0, "heads are mixed between softmax and the product with v")
def talking_after(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), m.mix)
    return s @ v


@attention(0, "heads are mixed between scores and softmax")
def talking_conv(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return F.conv2d((q @ k.mT), m.mix[..., None, None]).softmax(-1) @ v


@attention(0, "softmax is taken over the queries, not over the keys")
def over_queries(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return (q @ k.mT).softmax(-2) @ v


@attention(0, "probabilities are changed between softmax and the product with v")
def slot_attention(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    p = (k @ q.mT).softmax(-1) + 1e-8
    return (p / p.sum(-2, keepdim=True)).mT @ v


@attention(
    0,
    "softmax is not of a product of queries and keys, but of aten.view",
    "keys and values are multiplied first, without a softmax (linear attention)",
)
def linear_attention(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    q, k = q.softmax(-1), k.softmax(-2)
    return q @ (k.mT @ v)


@attention(0, "probabilities are changed between softmax and the product with v")
def renormalized(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    p = (q @ k.mT).softmax(-1) * (x[:, None, None, :, 0] > 0)
    return (p / p.sum(-1, keepdim=True).clamp(min=1e-6)) @ v


@attention()
def fill_after_other_mask(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    a, b = (x[:, None, None, :, 0] > 0), (x[:, None, None, :, 1] > 0)
    return (q @ k.mT).masked_fill(a, LOW).softmax(-1).masked_fill(b, 0.0) @ v


@attention(0, "probabilities are changed between softmax and the product with v")
def fill_after_no_mask(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return (q @ k.mT).softmax(-1).masked_fill(upper(N), 0.0) @ v


@attention(0)
def experts(m: Model, x: Tensor) -> Any:
    g = m.q(x).softmax(-1)
    e = torch.stack([m.k(x)] * E, 2)
    return torch.einsum("bte,bted->btd", g, e)


@attention(0, "keys are a weight of the model")
def experts_of_product(m: Model, x: Tensor) -> Any:
    g = (x @ m.q.weight).softmax(-1)
    return g @ m.memory.repeat(2, 1)[:E]


@attention(0)
def experts_gated_inside(m: Model, x: Tensor) -> Any:
    # the gate stands before the last weights: what is multiplied by them is no probability
    gate = m.q(x)[..., :2].softmax(-1).view(1, -1, 2).permute(2, 1, 0)
    inner = x.reshape(1, -1, E).expand(2, -1, -1) @ m.qkv.weight.view(3, E, E)[:2]
    return ((inner.relu() * gate) @ m.qkv.weight.view(3, E, E)[:2].mT).sum(0)


@attention(0, NO_SOFTMAX)
def data_decides_the_length(m: Model, x: Tensor) -> Any:
    y = x[x[..., 0] > x[..., 1]]
    return m.q(y) @ m.k(y).mT @ m.v(y)


@attention(0)
def channel_gate(m: Model, x: Tensor) -> Any:
    return x * m.q(x.mean(1)).softmax(-1)[:, None]


@attention(0, "keys are a weight of the model")
def vocabulary(m: Model, x: Tensor) -> Any:
    return (m.q(x) @ m.memory.t()).softmax(-1) @ m.memory


@attention(0, NO_SOFTMAX)
def sigmoid_attention(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return (q @ k.mT).sigmoid() @ v


@attention(0, NO_SOFTMAX)
def relu_attention(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return F.relu(q @ k.mT).square() @ v


@attention()
def attention_pool_weight(m: Model, x: Tensor) -> Any:
    w = torch.softmax(m.q(x).tanh() @ m.q.weight[:1].t(), 1)
    return w.mT @ x


@attention(0, "softmax is not of a product of queries and keys, but of aten.sum.dim_IntList")
def additive_bahdanau(m: Model, x: Tensor) -> Any:
    q, k = m.q(x)[:, :, None], m.k(x)[:, None]
    return m.one(torch.tanh(q + k)).sum(-1).softmax(-1) @ m.v(x)


@attention(0, "probabilities are changed between softmax and the product with v")
def entmax_like(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    p = (q @ k.mT).softmax(-1).square()
    return (p / p.sum(-1, keepdim=True)) @ v


@attention(0, "probabilities are changed between softmax and the product with v")
def cumulative(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return (q @ k.mT).softmax(-1).cumsum(-1) @ v


@attention(0, "masked scores are filled with more than minus infinity")
def fill_not_low_bias(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = (q @ k.mT).masked_fill(upper(N), -1e4) + m.bias * 1e6
    return s.softmax(-1) @ v


@attention(0, "scores are scaled by a tensor that differs by query and key")
def mask_multiply_only(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    return (q @ k.mT * (~upper(N)).float()).softmax(-1) @ v


@attention()
def float_soft_mask(m: Model, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    soft = x[:, None, None, :, 0].sigmoid()
    return (q @ k.mT * soft + (1 - soft) * -3).softmax(-1) @ v
