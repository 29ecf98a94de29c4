"""What random blocks are made of: steps that change `h`, and ends that carry it on."""

from __future__ import annotations

from dataclasses import dataclass

#: Weights by name: what they are, and their size.
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "matrix": ("parameter", (8, 8)),
    "wide": ("parameter", (24, 8)),
    "time": ("parameter", (4, 4)),
    "vector": ("parameter", (8,)),
    "twin": ("parameter", (8,)),
    "cast": ("parameter", (8,)),
    "cache": ("buffer", (6, 8)),
    "table": ("buffer", (8,)),
    "mean": ("buffer", (8,)),
    "var": ("positive", (8,)),
    "count": ("count", ()),
}


@dataclass(frozen=True)
class Step:
    feature: str
    text: str
    training: bool = False
    reads_x: bool = False


@dataclass(frozen=True)
class End:
    feature: str
    text: str
    weight: float = 1.0
    in_place: bool = False


#: A line with a difference in it, or a weight, holds one call: whatever that line says, differs.
STEPS = [
    Step("linear", "h = h.float()\nh = F.linear(h, {matrix}, {vector})"),
    Step("activation", "h = F.gelu(h)\nh = h * <<constant:0.5|0.25>>"),
    Step("activation", "h = <<constant:torch.tanh|torch.sigmoid>>(h)"),
    Step("norm", "h = h.float()\nh = F.layer_norm(h, (8,), {vector}, {vector}, <<constant:1e-5|1e-4>>)"),
    Step("norm", "h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)\nh = h * {vector}"),
    Step("group norm", "h = F.group_norm(h.float().transpose(1, 2), 2).transpose(1, 2)\nh = h + <<type:1|1.0>>"),
    Step(
        "batch norm statistics",
        "h = h.float().reshape(-1, 8)\n"
        "h = F.batch_norm(h, {mean}, {var}, None, None, self.training, <<constant:0.1|0.2>>)\n"
        "h = h.view(-1, 4, 8)",
    ),
    Step(
        "attention",
        "h = h.float()\n"
        "h = F.linear(h, {wide})\n"
        "q, k, v = h.chunk(3, -1)\n"
        "q, k = q.view(h.shape[0], 4, 2, 4).transpose(1, 2), k.view(h.shape[0], 4, 2, 4).transpose(1, 2)\n"
        "v = v.view(h.shape[0], 4, 2, 4).transpose(1, 2)\n"
        "h = F.scaled_dot_product_attention(q, k, v, is_causal=<<constant:True|False>>)\n"
        "h = h.transpose(1, 2).reshape(-1, 4, 8)",
    ),
    Step(
        "attention with a mask",
        "s, t = h.transpose(-1, -2), x.transpose(-1, -2).to(h.dtype)\n"
        "s = torch.matmul(h, <<order:s|t>>)\n"
        "s = s.masked_fill(~mask, -1e4)\n"
        "h = torch.matmul(torch.softmax(s, -1), h)",
        reads_x=True,
    ),
    Step("reduction", "s = h.mean(<<constant:-1|1>>, keepdim=True)\nh = h - s"),
    Step("tuple", "top, where = h.max(-1, keepdim=True)\nh = h - top * 0.5 + where.to(h.dtype) * 0.01"),
    Step("tuple", "l, r = h.split(4, -1)\nh = torch.cat(<<order:[r, l]|[l, r]>>, -1)"),
    Step("tuple", "a, b = h.unbind(1)[:2]\nh = h + (<<order:a - b|b - a>>).unsqueeze(1) * 0.5"),
    Step("transpose", "h = h.float().transpose(1, 2)\nh = F.linear(h, {time})\nh = h.transpose(1, 2)"),
    Step("transpose", "t = h.transpose(1, 2)\nt = <<stride:t * 2|t.contiguous() * 2>>\nh = t.transpose(1, 2)"),
    Step("dropout", "h = F.dropout(h, <<constant:0.25|0.5>>, self.training)"),
    Step("random draw", "s = torch.rand_like(h)\ns = s * <<constant:0.1|0.2>>\nh = h + s"),
    Step("in place on an intermediate", "h = h * 1.5\nh += <<type:1|1.0>>\nh.mul_(0.5)"),
    Step("in place on an intermediate", "h = h + <<constant:0.5|0.25>>\nh = F.relu(h, inplace=True)"),
    Step("in place without gradients", "h = h * 1.0\nwith torch.no_grad(): h.mul_(<<constant:0.5|0.75>>)"),
    Step("item assignment", "h = h * 1.0\nh[:, 0] = <<zero:0.0|-0.0>>"),
    Step("item assignment", "h = h * 1.0\nh[<<index:[0, 1]|(0, 1)>>] = 0.25"),
    Step("item assignment", "h = h * 1.0\nh[:, <<constant:0|1>>] = h[:, 2]", reads_x=True),
    Step("write into a view", "h = h * 2.0\nt = h.view(-1, 8)\nt[<<constant:0|1>>] = 1.0"),
    Step("signed zero", "s = h.abs()\ns = s * <<zero:0.0|-0.0>>\nh = torch.copysign(h, s)"),
    Step("cache", "s = h.detach().float().mean(0)[:2]\n{cache}.index_copy_(0, pos, s)"),
    Step("cache that is read", "w = {cache}\nw[<<constant:0|1>>] = 0.75\nh = h * w.sum(0).sin()"),
    Step("cache that is read", "w = {cache}\ns = w.sum(0).sin()\nw[<<type:0|False>>] += 1.0\nh = h * s"),
    Step("slice of one tensor", "part.index_copy_(0, pos, h.detach().float().mean(0)[:2])\nh = h + part.mean(0).cos()"),
    Step("counter", "n = {count}\nn.add_(<<constant:1|2>>)\nh = h * (1.0 / n)"),
    Step(
        "no_grad inside", "with torch.no_grad(): s = h.abs().amax(-1, keepdim=True)\ns = s + <<type:1|1.0>>\nh = h / s"
    ),
    Step(
        "autocast inside",
        "h = h.float()\n"
        'with torch.autocast("cpu", torch.bfloat16, enabled=<<scope:True|False>>): h = F.linear(h, {matrix})\n'
        "h = h.float()",
    ),
    Step(
        "grad mode inside",
        "s = h.float()\nwith torch.set_grad_enabled(<<grad scope:True|False>>): s = s.sin()\nh = h * s",
        training=True,
    ),
    Step("constant tensor", "h = h * torch.tensor([1.0, 0.5] * 4)"),
    Step("shared weight", "h = F.linear(h.float(), shared)\nh = h * <<constant:0.5|0.25>>"),
    Step(
        "checkpoint",
        "h = h.float()\n"
        "h = checkpoint(lambda t: F.linear(t, {matrix}).sin() * <<constant:0.5|2.0>>, h, use_reentrant=False)",
        training=True,
    ),
    Step("mask", "h = h.masked_fill(h > 1.0, <<zero:0.0|-0.0>>)"),
    Step("scan", "h = h.cumsum(<<constant:1|2>>)\nh = h * 0.25"),
    Step("cast weight", "w = {cast}.to(h.dtype)\nh = h * w"),
    Step("two weights", "h = h.float()\nh = torch.addcmul({twin}, h, {twin})"),
    Step("two tables", "h = h.float()\nh = torch.addcmul({table}, h, {table})"),
    Step(
        "made in the first block",
        "if not made: made.append((shared.cos().mean(0) + pos.sum()).sin())\nh = h + made[0]",
    ),
    Step(
        "made in the first block",
        "if len(made) < 2: made += [mask.float().sum(-1, keepdim=True).rsqrt()] * 2\nh = h * made[1]",
    ),
    Step("skip", "s = skip * 0.5\nh = h + s"),
    Step("second stream", "y = y * 0.5 + h.float() * 0.1\nh = <<order:h - y|y - h>>"),
]

ENDS = [
    End("residual", "x = x + h", 3),
    End("residual", "x = F.layer_norm((x + h).float(), (8,))"),
    End("no residual", "x = h.float()"),
    End("residual in place", "x += h.float()", 1.5, in_place=True),
    End("residual in place", "x.add_(h)", 1.5, in_place=True),
    End("two carried values", "x, y = y + h, x"),
]
