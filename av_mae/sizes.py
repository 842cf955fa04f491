"""The named model sizes, in one place: encoder width, depth, heads; decoders of 512 × 8 (tiny: 96 × 2)."""

from av_mae.models.config import FUSION_KINDS, AVMAEConfig, DecoderConfig, FusionConfig, StreamConfig

SIZES = {
    "tiny": {"width": 128, "depth": 4, "heads": 4},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16},
}
TINY_DECODER = DecoderConfig(width=96, depth=2, heads=4)


def sized_model(size: str, fusion: str = "factorized") -> AVMAEConfig:
    """The published input and masking with a named encoder size (`SIZES`) and fusion kind (`FUSION_KINDS`).

    Image 224×224 in patches of 16, sound 128 mels × 192 frames, attention ratio 0.25 and MLP ratio 1 in the fusion
    blocks. `bilinear` pairs do not separate and run in chunks.
    """
    encoder = SIZES[size]
    return AVMAEConfig(
        image=StreamConfig(size=(224, 224), channels=3, patch=16, mask_ratio=0.75, **encoder),
        audio=StreamConfig(size=(128, 192), channels=1, patch=16, mask_ratio=0.80, **encoder),
        fusion=FusionConfig(kind=fusion, layers="all", tokens=(16, 8, 8), heads=encoder["heads"],
                            attention_ratio=0.25, mlp_ratio=1.0,
                            pair_attention="chunked" if fusion == "bilinear" else "separable"),
        decoder=TINY_DECODER if size == "tiny" else DecoderConfig())


def size_variants() -> tuple[str, ...]:
    """Every `size` and `size_fusion`."""
    return tuple(SIZES) + tuple(f"{size}_{kind}" for size in SIZES for kind in FUSION_KINDS)
