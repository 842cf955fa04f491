"""Plain float64 loops for what the heads are built of, and the two dense heads by the words of their definition.

Parameters and statistics are read from a flat dict by dotted path. `train` marks the rows that batch norms take their
statistics from; None means the running ones.
"""

import math

import numpy as np


def convolve(x, kernel, bias=0.0):
    """3×3 cross-correlation of x [B, R, C, I] with kernel [3, 3, I, O], zeros around, pixel by pixel."""
    b, rows, columns, _ = x.shape
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    out = np.zeros((b, rows, columns, kernel.shape[-1])) + bias
    for row in range(rows):
        for column in range(columns):
            out[:, row, column] += np.tensordot(padded[:, row : row + 3, column : column + 3], kernel, 3)
    return out


def transpose_convolve(x, kernel, bias):
    """Every value of x spreads its kernel over the factor × factor pixels that it becomes."""
    b, rows, columns, _ = x.shape
    factor, _, _, outputs = kernel.shape
    out = np.zeros((b, rows * factor, columns * factor, outputs)) + bias
    for row in range(rows * factor):
        for column in range(columns * factor):
            out[:, row, column] += x[:, row // factor, column // factor] @ kernel[row % factor, column % factor]
    return out


def bilinear_double(x):
    """Output pixel p lies at (p + 1/2) / 2 - 1/2 of the input, whose edge goes on outside."""
    for axis in (1, 2):
        size, parts = x.shape[axis], []
        for p in range(2 * size):
            position = min(max((p + 0.5) / 2 - 0.5, 0), size - 1)
            low, share = math.floor(position), position - math.floor(position)
            high = min(low + 1, size - 1)
            parts.append((1 - share) * x.take(low, axis) + share * x.take(high, axis))
        x = np.stack(parts, axis)
    return x


def batch_norm(p, path, x, train=None, eps=1e-5):
    if train is None:
        mean, variance = p[f"{path}.mean"], p[f"{path}.variance"]
    else:
        values = x[np.asarray(train, bool)].reshape(-1, x.shape[-1])
        mean, variance = values.mean(0), values.var(0)
    x = (x - mean) / np.sqrt(variance + eps)
    return x * p[f"{path}.scale"] + p[f"{path}.bias"] if f"{path}.scale" in p else x


def double_conv(p, path, x, train=None):
    for number in (1, 2):
        x = np.maximum(batch_norm(p, f"{path}.norm{number}", convolve(x, p[f"{path}.conv{number}.kernel"]), train), 0)
    return x


def up(p, path, x, skip=None, train=None):
    x = transpose_convolve(x, p[f"{path}.transposed.kernel"], p[f"{path}.transposed.bias"])
    x = x if skip is None else np.concatenate([x, skip], -1)
    return double_conv(p, f"{path}.convolutions", x, train)


def layer_norm(p, path, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p[f"{path}.scale"] + p[f"{path}.bias"]


def linear(p, path, x):
    return x @ p[f"{path}.kernel"] + p[f"{path}.bias"]


def beside(x, vector):
    return np.concatenate([x, np.tile(vector[:, None, None], (1, *x.shape[1:3], 1))], -1)


def separate(p, audio, image, grid, count, train=None):
    """Mask logits [B, mels, frames] from audio layers (a list of [B, A, D]), image tokens of the last, `count` ups.

    Scales are named as in the definition: 1, the finest, to count + 1.
    """
    depth = len(audio)
    wanted = [int(depth - 1) * step // count for step in range(count + 1)]  # linspace, truncated
    wanted = dict(zip(range(1, count + 2), reversed(wanted), strict=True))
    seen = layer_norm(p, "condition_norm", image).mean(1)

    def audio_map(s):
        tokens = layer_norm(p, f"audio_norms.{s - 1}", audio[wanted[s]])
        return tokens.reshape(len(tokens), *grid, -1)

    def condition(s):
        return linear(p, f"conditions.{s - 1}", seen)

    x = double_conv(p, "top", beside(audio_map(count + 1), condition(count + 1)), train)
    for s in range(count, 0, -1):
        lateral = up(p, f"laterals.{s - 1}", audio_map(s), train=train)
        x = up(p, f"ups.{s - 1}", x, beside(lateral, condition(s)), train)
    return convolve(x, p["predict.kernel"], p["predict.bias"])[..., 0]


def segment(p, image, audio, grid, count, train=None):
    """Logits [B, H, W, classes] from image layers (a list of [B, I, D]), audio tokens of the last, `count` scales."""
    wanted = [(len(image) - 1) * d // max(count - 1, 1) for d in range(count)]  # linspace, truncated

    def image_map(d):
        tokens = layer_norm(p, f"image_norms.{d}", image[wanted[d]])
        return tokens.reshape(len(tokens), *grid, -1)

    def heard(d):
        return layer_norm(p, f"audio_norms.{d}", linear(p, f"audio_projections.{d}", audio)).mean(1)

    x = double_conv(p, "top", beside(image_map(0), heard(0)), train)
    for d in range(1, count):
        lateral = up(p, f"laterals.{d - 1}", image_map(d), train=train)
        x = up(p, f"ups.{d - 1}", x, beside(lateral, heard(d)), train)
    x = bilinear_double(convolve(x, p["predict1.kernel"], p["predict1.bias"]))
    return convolve(x, p["predict2.kernel"], p["predict2.bias"])
