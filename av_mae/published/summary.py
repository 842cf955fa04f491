"""What a published file is, told in lines."""

import dataclasses
import math
from typing import Any

from av_mae.models import AVMAEConfig, StreamConfig, kinds
from av_mae.published.infer import Options
from av_mae.published.source import Published

KINDS = {kinds.PRETRAINING: "pretraining checkpoint", "image_encoder": "unimodal MAE image encoder",
         "audio_encoder": "unimodal AudioMAE encoder"}
PARTS = {"image.": "image encoder", "audio.": "audio encoder", "fusion_": "fusion", "image_decoder.": "image decoder",
         "audio_decoder.": "audio decoder"}


def summarize(published: Published, options: Options) -> str:
    """Kind, parts with their parameters and sizes, what was ignored, what is missing, what is taken as published."""
    file, found = published.file, published.found
    counts = parameters_by_part(published)
    sizes = describe(found.config) | {"head": describe_head(found.head)}
    lines = [f"{file.path}: {KINDS.get(found.kind, found.kind)} ({file.format}, {len(file.tensors)} tensors, "
             f"{sum(counts.values()) / 1e6:.2f} M parameters)"]
    lines += [f"  {part:<14}{count / 1e6:9.2f} M  {sizes.get(part, '')}".rstrip() for part, count in counts.items()]
    for title, entries in (("ignored", ignored(published)), ("missing", missing(published)),
                           ("not told by the file", assumed(published, options))):
        lines.append(f"  {title}: {', '.join(entries) or 'nothing'}")
    if found.kind == "audio_encoder":
        lines.append("  patches as they are: AudioMAE has time in rows, here they are mels; the published system does "
                     "not turn them either")
    return "\n".join(lines)


def describe_head(head: Any) -> str:
    return "" if head is None else ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(head).items())


def parameters_by_part(published: Published) -> dict[str, int]:
    """Part → number of parameters; all that is no part of encoder or decoder is the head."""
    only = kinds.STREAMS.get(published.found.kind)
    counts = {}
    for path, x in published.parameters.items():
        path = f"{only}.{path}" if only else path.removeprefix("encoder.")
        part = next((name for begin, name in PARTS.items() if path.startswith(begin)), "head")
        counts[part] = counts.get(part, 0) + math.prod(x.shape)
    return dict(sorted(counts.items(), key=lambda item: [*PARTS.values(), "head"].index(item[0])))


def describe(config: AVMAEConfig) -> dict[str, str]:
    """Part → its sizes."""
    def stream(stream: StreamConfig) -> str:
        (rows, columns), patch = stream.size, "×".join(map(str, stream.patch_size))
        return (f"{stream.width} wide, {stream.depth} layers, {stream.heads} heads, MLP ratio {stream.mlp_ratio:g}, "
                f"input {rows}×{columns} in patches of {patch}")

    fusion, decoder = config.fusion, config.decoder
    layers = fusion.layers if fusion.layers == "all" else ", ".join(map(str, fusion.layers))
    decoders = (f"{decoder.kind}, {decoder.width} wide, {decoder.depth} layers, {decoder.heads} heads, MLP ratio "
                f"{decoder.mlp_ratio:g}" + (f", window {decoder.window}" if decoder.kind == "swin" else ""))
    return {"image encoder": stream(config.image), "audio encoder": stream(config.audio),
            "fusion": f"{fusion.kind}, layers {layers}, tokens {fusion.tokens}, {fusion.heads} heads, attention ratio "
                      f"{fusion.attention_ratio:g}, MLP ratio {fusion.mlp_ratio:g}",
            "image decoder": decoders, "audio decoder": decoders}


def ignored(published: Published) -> list[str]:
    """What the file holds besides the model."""
    file = published.file
    entries = [f"{name} ({size / 1e6:.1f} MB)" if size else name for name, size in file.ignored.items()]
    entries += list(file.metadata)
    left = published.left_out
    named = {"cls_token": "class token", "pos_embed": "positions (sin-cos of the run's grid take their place)"}
    entries += [said for name, said in named.items() if name in left]
    decoder = [name for name in left if name.startswith("decoder_") or name == "mask_token"]
    rest = [name for name in left if name not in named and name not in decoder]
    return entries + ([f"decoder ({len(decoder)} tensors)"] if decoder else []) + rest


def missing(published: Published) -> list[str]:
    """What a whole model has and the file has not."""
    parts = {kinds.ENCODER: ["decoders"]}.get(published.found.kind, [])
    return parts + [f"{name} (computed)" for name in published.missing]


def assumed(published: Published, options: Options) -> list[str]:
    """What no tensor tells and nobody said: taken as published."""
    kind, config = published.found.kind, published.found.config
    entries = [] if options.heads else ["heads"]
    if config.fusion.kind == "factorized" and options.tokens is None:
        entries.append("tokens")
    if kind == kinds.PRETRAINING:
        if config.decoder.kind == "plain" and options.decoder_heads is None:
            entries.append("decoder heads")
        entries += [f"mask ratios {config.image.mask_ratio} and {config.audio.mask_ratio}", "normalised targets"]
    if kind == "separator":
        entries.append("the kind of mask and the loss")
    return entries
