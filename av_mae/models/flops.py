"""Closed-form cost of the model: a multiply-add of a matrix product counts as two FLOPs.

Norms, softmax, GELU and other elementwise work are left out; they are 1 to 3 % at ViT-B.
"""

from av_mae.models.config import AVMAEConfig, StreamConfig, fit_window


def linear(tokens: int, inputs: int, outputs: int) -> int:
    """A linear layer of these widths on `tokens` tokens."""
    return 2 * tokens * inputs * outputs


def attention(queries: int, keys: int, key_width: int, value_width: int) -> int:
    """Both matrix products of an attention; widths are those of all heads together."""
    return 2 * queries * keys * (key_width + value_width)


def block(tokens: int, context: int, width: int, mlp_ratio: float) -> int:
    """A transformer block that updates `tokens` tokens, which attend to `context` further tokens."""
    read = tokens + context
    return (
        2 * linear(tokens, width, width)
        + 2 * linear(read, width, width)
        + attention(tokens, read, width, width)
        + 2 * linear(tokens, width, int(width * mlp_ratio))
    )


def pair_read(
    config: AVMAEConfig, implementation: str, queries: int, image: int, audio: int, widths: tuple[int, int], values: int
) -> int:
    """Attention over all pairs of image and audio tokens, projections included.

    Args:
      config: of the model.
      implementation: of the pair attention.
      queries: number of queries.
      image: number of image tokens.
      audio: number of audio tokens.
      widths: of image and audio tokens.
      values: width of the values of all heads.
    """
    fusion, width = config.fusion, config.fusion_width
    inner = fusion.inner_width(width)
    pairs = image + audio if implementation == "separable" else image * audio
    projections = (
        linear(image, widths[0], inner + values)
        + linear(audio, widths[1], inner + values)
        + linear(queries, width, inner)
        + linear(queries, values, width)
    )
    return projections + attention(queries, pairs, inner, values)


def fusion_block(config: AVMAEConfig, image: int, audio: int, implementation: str | None = None) -> int:
    """One fusion block; O(I + A) for `separable`, else O(I · A).

    Args:
      config: of the model.
      image: number of image tokens.
      audio: number of audio tokens.
      implementation: of the pair attention; `None` means that of the configuration.
    """
    fusion, width = config.fusion, config.fusion_width
    implementation = implementation or fusion.pair_attention
    tokens, widths = sum(fusion.tokens), (config.image.width, config.audio.width)
    inner = fusion.inner_width(width)
    cost = 2 * linear(tokens, width, int(width * fusion.mlp_ratio))
    if fusion.kind == "token":
        return cost + (
            2 * linear(tokens, width, inner)
            + linear(image + audio, widths[0], 2 * inner)
            + attention(tokens, image + audio, inner, inner)
        )
    if fusion.kind != "factorized":
        return cost + pair_read(config, implementation, tokens, image, audio, widths, inner)
    queries, from_image, from_audio = fusion.tokens
    for aggregated, read, read_width in ((from_image, image, widths[0]), (from_audio, audio, widths[1])):
        cost += 2 * linear(aggregated, width, width) + 2 * linear(read, read_width, width)
        cost += attention(aggregated, read, width, width)
    return cost + pair_read(config, implementation, queries, from_image, from_audio, (width, width), width)


def encoder_flops(config: AVMAEConfig, masked: bool = True, implementation: str | None = None) -> int:
    """Forward FLOPs of the encoder for one clip.

    Args:
      config: of the model.
      masked: whether only kept patches are encoded, or all.
      implementation: of the pair attention; `None` means that of the configuration.
    """
    total, fused = 0, config.fused_layers
    tokens = sum(config.fusion.tokens) if config.fusion.kind != "none" else 0
    counts = [s.keep if masked else s.tokens for s in (config.image, config.audio)]
    for stream, count in zip((config.image, config.audio), counts, strict=True):
        total += linear(count, stream.patch_values, stream.width)
        for number in range(stream.depth):
            total += block(count, tokens if number in fused else 0, stream.width, stream.mlp_ratio)
        if config.fusion_width != stream.width:
            total += len(fused) * linear(tokens, config.fusion_width, stream.width)
    return total + len(fused) * (fusion_block(config, counts[0], counts[1], implementation) if fused else 0)


def decoder_flops(config: AVMAEConfig, stream: StreamConfig) -> int:
    """Forward FLOPs of one decoder for one clip, predicting at the masked patches."""
    decoder, fusion = config.decoder, 0 if config.fusion.kind == "none" else sum(config.fusion.tokens)
    masked, width = stream.tokens - stream.keep, decoder.width
    total = linear(stream.keep, stream.width, width) + linear(fusion, config.fusion_width, width)
    total += linear(masked, width, stream.patch_values)
    if decoder.kind == "plain":
        everything = stream.tokens + fusion
        total += (decoder.depth - 1) * block(everything, 0, width, decoder.mlp_ratio)
        return total + block(masked, everything - masked, width, decoder.mlp_ratio)
    height, across = fit_window(stream.grid, decoder.window)
    window = height * across + fusion
    windows = stream.tokens // (height * across)
    mlp = 2 * linear(1, width, int(width * decoder.mlp_ratio))
    attend = windows * (4 * linear(window, width, width) + attention(window, window, width, width))
    total += decoder.depth * attend + (decoder.depth - 1) * (stream.tokens + fusion) * mlp
    return total + masked * mlp


def closed_form_flops(config: AVMAEConfig) -> int:
    """Forward FLOPs of the training loss for one clip."""
    return encoder_flops(config) + decoder_flops(config, config.image) + decoder_flops(config, config.audio)
