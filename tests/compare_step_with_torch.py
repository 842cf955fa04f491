"""A training step beside a plain PyTorch model of the same token counts and widths, in turn in one process.

Run by hand with a Python that has torch and this package's dependencies:

    python tests/compare_step_with_torch.py --config=configs/pretrain.py:base --config.batch_size=8 \\
        --config.dtype=float32 --rounds=5

The PyTorch model is written as one would write it there: queries, keys and values in one layer, fusion tokens as tokens
of the blocks, keys and values of all pairs, both decoders complete, scaled_dot_product_attention, AdamW; float32.
"""

import argparse
import sys

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from av_mae import benchmark, recipes
from av_mae.benchmark import step
from av_mae.train.optimizer import Length
from av_mae.train.sharding import make_mesh
from av_mae.train.step import TrainStep


def attend(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class Block(nn.Module):
    def __init__(self, width, heads, ratio):
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, int(ratio * width)), nn.GELU(), nn.Linear(int(ratio * width), width))

    def forward(self, x):
        x = x + self.out(attend(*self.qkv(self.norm1(x)).chunk(3, -1), self.heads))
        return x + self.mlp(self.norm2(x))


class Read(nn.Module):
    """Queries of tokens over others of `read` values, keys at `inner`, values at `values`."""

    def __init__(self, width, read, inner, values, heads):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, inner), nn.Linear(read, inner), nn.Linear(read, values)
        self.out, self.heads = nn.Linear(values, width), heads

    def forward(self, x, y):
        return self.out(attend(self.query(x), self.key(y), self.value(y), self.heads))


class Fusion(nn.Module):
    def __init__(self, width, fusion):
        super().__init__()
        inner = fusion.inner_width(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.image, self.audio = (Read(width, width, width, width, fusion.heads) for _ in range(2))
        self.pairs, self.tokens = Read(width, 2 * width, inner, width, fusion.heads), fusion.tokens
        hidden = int(width * fusion.mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, f, image, audio):
        f, image, audio = (norm(x) for norm, x in zip(self.norms, (f, image, audio)))
        tokens, v, a = f.split(self.tokens, 1)
        v, a = self.image(v, image), self.audio(a, audio)
        shape = len(f), v.shape[1], a.shape[1], f.shape[2]
        pairs = torch.cat([v[:, :, None].expand(shape), a[:, None].expand(shape)], -1).flatten(1, 2)
        f = f + torch.cat([self.pairs(tokens, pairs), v, a], 1)
        return f + self.mlp(self.norms[3](f))


class Decoder(nn.Module):
    def __init__(self, config, stream):
        super().__init__()
        self.embed = nn.Linear(stream.width, config.width)
        self.mask = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.randn(1, stream.tokens, config.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)))
        self.norm, self.predict = nn.LayerNorm(config.width), nn.Linear(config.width, stream.patch_values)

    def forward(self, tokens, fusion, restore):
        x = self.embed(tokens)
        x = torch.cat([x, self.mask.expand(len(x), restore.shape[1] - x.shape[1], -1)], 1)
        x = torch.gather(x, 1, restore[..., None].expand(-1, -1, x.shape[2])) + self.positions
        x = self.blocks(torch.cat([self.embed(fusion), x], 1))
        return self.predict(self.norm(x)[:, fusion.shape[1] :])


class MaskedAutoencoder(nn.Module):
    """Losses of patches image [B, I, P] and audio [B, A, P']; factorized fusion at every layer."""

    def __init__(self, config):
        super().__init__()
        self.streams, width = (config.image, config.audio), config.image.width
        self.embeds = nn.ModuleList(nn.Linear(s.patch_values, width) for s in self.streams)
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(width, s.heads, s.mlp_ratio) for _ in range(s.depth)) for s in self.streams
        )
        self.fusions = nn.ModuleList(Fusion(width, config.fusion) for _ in range(config.layers))
        self.tokens = nn.Parameter(torch.randn(1, sum(config.fusion.tokens), width) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.decoders = nn.ModuleList(Decoder(config.decoder, s) for s in self.streams)
        self.positions = nn.ParameterList(torch.randn(1, s.tokens, width) * 0.02 for s in self.streams)

    def forward(self, patches):
        orders = [torch.rand(x.shape[:2]).argsort(1) for x in patches]
        tokens = [
            torch.gather(embed(x) + positions, 1, order[:, : s.keep, None].expand(-1, -1, positions.shape[2]))
            for embed, x, positions, order, s in zip(self.embeds, patches, self.positions, orders, self.streams)
        ]
        fusion = self.tokens.expand(len(patches[0]), -1, -1)
        for number, fuse in enumerate(self.fusions):
            new = [
                blocks[number](torch.cat([fusion, x], 1))[:, fusion.shape[1] :]
                for blocks, x in zip(self.blocks, tokens)
            ]
            fusion, tokens = fuse(fusion, *tokens), new
        *tokens, fusion = (norm(x) for norm, x in zip(self.norms, (*tokens, fusion)))
        loss = 0.0
        for decoder, x, y, order, s in zip(self.decoders, tokens, patches, orders, self.streams):
            restore = order.argsort(1)
            error = (decoder(x, fusion, restore) - functional.layer_norm(y, y.shape[-1:])).square().mean(-1)
            loss = loss + error[restore >= s.keep].mean()
        return loss


def torch_step(config):
    """A step of the PyTorch model on noise, as a function without arguments."""
    model = MaskedAutoencoder(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    patches = [torch.randn(config.batch_size, s.tokens, s.patch_values) for s in model.streams]

    def run():
        optimizer.zero_grad()
        loss = model(patches)
        loss.backward()
        optimizer.step()
        return np.float32(loss.item())

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes.add_config_argument(parser)
    parser.add_argument("--rounds", type=int, default=5)
    arguments, overrides = recipes.parse_arguments(parser, sys.argv[1:])
    config = recipes.load_recipe(arguments.config, overrides)
    train_step = TrainStep(config, make_mesh(config.mesh), Length(1000, 10, 1000))
    batch = jax.device_put(step.random_batch(config), train_step.rows)
    ours = step.Runner(train_step.step, train_step.init(), batch)
    seconds = benchmark.in_turn({"ours": ours, "torch": torch_step(config)}, arguments.rounds)
    ratio = float(np.median(seconds["torch"] / seconds["ours"]))
    print(
        f"jax {jax.__version__} {np.median(seconds['ours']):.3f} s, torch {torch.__version__} "
        f"({torch.get_num_threads()} threads) {np.median(seconds['torch']):.3f} s: ours is {ratio:.2f} x as fast"
    )


if __name__ == "__main__":
    main()
