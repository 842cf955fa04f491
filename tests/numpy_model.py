"""The whole model once more, in float64 NumPy, one clip at a time and written out: what the fast one must equal.

Fusion tokens are full tokens of the ViT blocks, all pairs are built, decoders predict every patch, Swin windows are
found by the places of patches on the grid. Parameters are the model's own, by dotted name; [N, D] arrays throughout.
"""

import math

import numpy as np
from flax import nnx

from av_mae import models

erf = np.vectorize(math.erf, otypes=[np.float64])


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def patches_of(x, patch):
    """[H, W, C] → [N, P]: patches row by row, each with its values in (row, column, channel) order."""
    height, width = patch
    return np.array(
        [
            [x[r + i, c + j, channel] for i in range(height) for j in range(width) for channel in range(x.shape[2])]
            for r in range(0, x.shape[0], height)
            for c in range(0, x.shape[1], width)
        ]
    )


def positions_of(grid, width):
    """[N, width], number by number: half the width for the column, half for the row, each [sin…, cos…]."""
    quarter, table = width // 4, np.zeros((grid[0] * grid[1], width))
    for number, (row, column) in enumerate(np.ndindex(*grid)):
        for k in range(quarter):
            frequency = 10000.0 ** (-k / quarter)
            for half, coordinate in enumerate((column, row)):
                table[number, 2 * half * quarter + k] = math.sin(coordinate * frequency)
                table[number, (2 * half + 1) * quarter + k] = math.cos(coordinate * frequency)
    return table


class NumPyModel:
    """NumPyModel(model, model.config).run(image, audio, image_noise, audio_noise) → stream: (loss, prediction [N, P]).

    A part of a model takes its place with `name` before the names of its parameters.
    """

    def __init__(self, module: nnx.Module, config: models.AVMAEConfig, name: str = ""):
        state = nnx.to_flat_state(nnx.state(module, nnx.Param))
        self.p = {name + ".".join(map(str, path)): np.asarray(v.get_value(), np.float64) for path, v in state}
        self.config = config

    def linear(self, name, x):
        return x @ self.p[f"{name}.kernel"] + self.p.get(f"{name}.bias", 0.0)

    def norm(self, name, x, eps):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return y * self.p[f"{name}.scale"] + self.p[f"{name}.bias"]

    def mlp(self, name, x):
        hidden = self.linear(f"{name}.fc1", x)
        return self.linear(f"{name}.fc2", hidden * (1 + erf(hidden / math.sqrt(2))) / 2)

    def attend(self, name, q, k, v, heads, scale, bias=None):
        """Heads one by one over q [N, ·], k and v [M, ·]; bias [heads, N, M]; then the projection `name`.out."""
        out = []
        for head in range(heads):
            qh, kh, vh = (np.split(x, heads, axis=-1)[head] for x in (q, k, v))
            logits = qh @ kh.T * scale + (0 if bias is None else bias[head])
            out.append(softmax(logits) @ vh)
        return self.linear(f"{name}.out", np.concatenate(out, -1))

    def attention(self, name, x, context, heads, bias=None):
        q, k, v = (self.linear(f"{name}.{part}", y) for part, y in (("query", x), ("key", context), ("value", context)))
        return self.attend(name, q, k, v, heads, (q.shape[-1] / heads) ** -0.5, bias)

    def block(self, name, x, heads, eps):
        y = self.norm(f"{name}.norm1", x, eps)
        x = x + self.attention(f"{name}.attention", y, y, heads)
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x, eps))

    def all_pairs(self, name, part, image, audio):
        """Keys or values of every pair: a linear map of [v_i ; a_j], or the product of one map of each."""
        if self.config.fusion.kind == "bilinear":
            i, a = self.linear(f"{name}.{part}_image", image), self.linear(f"{name}.{part}_audio", audio)
            return np.array([x * y for x in i for y in a])
        kernel = np.concatenate([self.p[f"{name}.{part}_image.kernel"], self.p[f"{name}.{part}_audio.kernel"]])
        return (
            np.array([np.concatenate([x, y]) for x in image for y in audio]) @ kernel
            + self.p[f"{name}.{part}_image.bias"]
        )

    def read_pairs(self, name, fusion, image, audio):
        q, heads = self.linear(f"{name}.query", fusion), self.config.fusion.heads
        k, v = self.all_pairs(name, "key", image, audio), self.all_pairs(name, "value", image, audio)
        return self.attend(name, q, k, v, heads, (fusion.shape[-1] / heads) ** -0.5)

    def fusion_attention(self, name, f, image, audio):
        fusion = self.config.fusion
        if fusion.kind == "token":
            return self.attention(name, f, np.concatenate([image, audio]), fusion.heads)
        if fusion.kind in ("dense", "bilinear"):
            return self.read_pairs(name, f, image, audio)
        f, v, a = np.split(f, [fusion.tokens[0], fusion.tokens[0] + fusion.tokens[1]])
        v = self.attention(f"{name}.aggregate_image", v, image, fusion.heads)
        a = self.attention(f"{name}.aggregate_audio", a, audio, fusion.heads)
        return np.concatenate([self.read_pairs(f"{name}.pairs", f, v, a), v, a])

    def fusion_block(self, name, fusion, image, audio):
        f = self.norm(f"{name}.norm_fusion", fusion, 1e-5)
        image, audio = self.norm(f"{name}.norm_image", image, 1e-5), self.norm(f"{name}.norm_audio", audio, 1e-5)
        f = f + self.fusion_attention(f"{name}.attention", f, image, audio)
        return f + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", f, 1e-5))

    def encode(self, inputs, keep):
        """{'image': [H, W, C], 'audio': …} and kept ids → tokens of image, audio and fusion after the final norms."""
        c, streams = self.config, {"image": self.config.image, "audio": self.config.audio}
        x = {}
        for name, stream in streams.items():
            tokens = self.linear(f"encoder.{name}.patch_embed", patches_of(inputs[name], stream.patch_size))
            x[name] = (tokens + positions_of(stream.grid, stream.width))[keep[name]]
        fused = () if c.fusion.kind == "none" else range(min(c.image.depth, c.audio.depth))
        fused = fused if c.fusion.layers == "all" else c.fusion.layers
        fusion = self.p["encoder.fusion_tokens"][0] if fused else np.zeros((0, c.image.width))
        for number in range(max(c.image.depth, c.audio.depth)):
            before = dict(x)
            for name, stream in streams.items():
                if number < stream.depth:
                    read = fusion if number in fused else fusion[:0]
                    bridge = f"encoder.{name}.bridges.{number}"
                    read = self.linear(bridge, read) if f"{bridge}.kernel" in self.p else read
                    read = read if len(read) else np.zeros((0, stream.width))
                    y = self.block(
                        f"encoder.{name}.blocks.{number}", np.concatenate([read, x[name]]), stream.heads, 1e-6
                    )
                    x[name] = y[len(read) :]
            if number in fused:
                fusion = self.fusion_block(f"encoder.fusion_blocks.{number}", fusion, **before)
        x = {name: self.norm(f"encoder.{name}.norm", y, 1e-6) for name, y in x.items()}
        return x | {"fusion": self.norm("encoder.fusion_norm", fusion, 1e-5) if fused else fusion}

    def swin_attention(self, name, x, fusion, grid, window, shift):
        """Attention outputs of patches, and of fusion tokens averaged over windows.

        A window holds the patches that share a cell once the grid is rolled by `shift`; of these only patches whose
        places differ by less than the window see one another.
        """
        heads = self.config.decoder.heads
        positions = list(np.ndindex(*grid))
        cell = [tuple((p - s) % g // w for p, s, g, w in zip(position, shift, grid, window)) for position in positions]
        out, fusions = np.zeros_like(x), []
        for one in sorted(set(cell)):
            members = [n for n in range(len(positions)) if cell[n] == one]
            bias = np.zeros((heads, len(fusion) + len(members), len(fusion) + len(members)))
            for i, n in enumerate(members):
                for j, m in enumerate(members):
                    dy, dx = positions[n][0] - positions[m][0], positions[n][1] - positions[m][1]
                    near = abs(dy) < window[0] and abs(dx) < window[1]
                    index = (dy + window[0] - 1) * (2 * window[1] - 1) + dx + window[1] - 1
                    bias[:, len(fusion) + i, len(fusion) + j] = (
                        self.p[f"{name}.relative_bias"][index] if near else -np.inf
                    )
            y = np.concatenate([fusion, x[members]])
            y = self.attention(f"{name}.attention", y, y, heads, bias)
            fusions.append(y[: len(fusion)])
            out[members] = y[len(fusion) :]
        return out, np.mean(fusions, axis=0)

    def swin_block(self, name, x, fusion, grid, window, shift):
        y, f = self.swin_attention(
            name, self.norm(f"{name}.norm1", x, 1e-5), self.norm(f"{name}.norm1", fusion, 1e-5), grid, window, shift
        )
        return tuple(z + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", z, 1e-5)) for z in (x + y, fusion + f))

    def decode(self, name, tokens, fusion, keep, stream, windows=None):
        """Predictions [N, P] of one stream; `windows` (window, shift) per block for Swin."""
        decoder, config = f"{name}_decoder", self.config.decoder
        apart = f"{decoder}.fusion_embed.kernel" in self.p
        if len(fusion):
            fusion = self.linear(f"{decoder}.fusion_embed" if apart else f"{decoder}.embed", fusion)
        else:
            fusion = np.zeros((0, config.width))
        x = np.repeat(self.p[f"{decoder}.mask_token"][0], stream.tokens, 0)
        x[keep] = self.linear(f"{decoder}.embed", tokens)
        x = x + self.p[f"{decoder}.positions"][0]
        for number in range(config.depth):
            block = f"{decoder}.blocks.{number}"
            if config.kind == "swin":
                x, fusion = self.swin_block(block, x, fusion, stream.grid, *windows[number])
            else:
                y = self.block(block, np.concatenate([fusion, x]), config.heads, 1e-5)
                fusion, x = y[: len(fusion)], y[len(fusion) :]
        return self.linear(f"{decoder}.predict", self.norm(f"{decoder}.norm", x, 1e-5))

    def target(self, x, stream):
        patches = patches_of(x, stream.patch_size)
        if not stream.normalize_targets:
            return patches
        mean = patches.sum(1, keepdims=True) / patches.shape[1]
        variance = ((patches - mean) ** 2).sum(1, keepdims=True) / (patches.shape[1] - 1)
        return (patches - mean) / np.sqrt(variance + 1e-6)

    def run(self, image, audio, image_noise, audio_noise, windows=None):
        """One clip; `windows` {'image': [(window, shift), …], 'audio': …} for Swin decoders."""
        inputs = {name: np.asarray(x, np.float64) for name, x in (("image", image), ("audio", audio[..., None]))}
        streams = {"image": self.config.image, "audio": self.config.audio}
        order = {"image": np.argsort(image_noise), "audio": np.argsort(audio_noise)}
        count = {name: int(stream.tokens * (1 - stream.mask_ratio)) for name, stream in streams.items()}
        keep = {name: order[name][: count[name]] for name in streams}
        tokens, results = self.encode(inputs, keep), {}
        for name, stream in streams.items():
            prediction = self.decode(
                name, tokens[name], tokens["fusion"], keep[name], stream, windows and windows[name]
            )
            error = ((prediction - self.target(inputs[name], stream)) ** 2).mean(1)
            results[name] = error[order[name][count[name] :]].mean(), prediction
        return results
