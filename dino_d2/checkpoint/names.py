"""What other repositories call the weights of our models.

A table is a list of (their name, our name). `#` stands for a number and `*` for any rest; they are
carried over in order. The first row that matches counts. A weight that means nothing here is
dropped by the name None. A name without a row is an error, so that nothing gets lost unseen.
"""

import re
from collections.abc import Iterable

from .io import CheckpointError

Table = list[tuple[str, str | None]]

OFFICIAL_DINO: Table = [
    ("backbone.0.*", "backbone.*"),
    ("input_proj.#.#.*", "neck.projections.#.#.*"),
    ("transformer.level_embed", "encoder.level_embed"),
    ("transformer.encoder.layers.#.self_attn.*", "encoder.layers.#.attention.*"),
    ("transformer.encoder.layers.#.norm1.*", "encoder.layers.#.attention_norm.*"),
    ("transformer.encoder.layers.#.linear#.*", "encoder.layers.#.ffn.linear#.*"),
    ("transformer.encoder.layers.#.norm2.*", "encoder.layers.#.ffn.norm.*"),
    ("transformer.enc_output.*", "query_source.project.*"),
    ("transformer.enc_output_norm.*", "query_source.norm.*"),
    ("transformer.enc_out_class_embed.*", "query_source.class_head.*"),
    ("transformer.enc_out_bbox_embed.*", "query_source.box_head.*"),
    ("transformer.tgt_embed.weight", "query_source.content"),
    ("transformer.decoder.layers.#.self_attn.*", "decoder.layers.#.self_attention.*"),
    ("transformer.decoder.layers.#.norm2.*", "decoder.layers.#.self_attention_norm.*"),
    ("transformer.decoder.layers.#.cross_attn.*", "decoder.layers.#.cross_attention.*"),
    ("transformer.decoder.layers.#.norm1.*", "decoder.layers.#.cross_attention_norm.*"),
    ("transformer.decoder.layers.#.linear#.*", "decoder.layers.#.ffn.linear#.*"),
    ("transformer.decoder.layers.#.norm3.*", "decoder.layers.#.ffn.norm.*"),
    ("transformer.decoder.norm.*", "decoder.norm.*"),
    ("transformer.decoder.ref_point_head.*", "decoder.position_mlp.*"),
    ("transformer.decoder.class_embed.#.*", "heads.class_heads.#.*"),
    ("transformer.decoder.bbox_embed.#.*", "heads.box_heads.#.*"),
    ("class_embed.#.*", "heads.class_heads.#.*"),
    ("bbox_embed.#.*", "heads.box_heads.#.*"),
    ("label_enc.weight", "denoising.label_embed.weight"),
]

_DETREX_DINO: Table = [
    ("backbone.*", "backbone.*"),
    ("neck.convs.#.conv.*", "neck.projections.#.0.*"),
    ("neck.convs.#.norm.*", "neck.projections.#.1.*"),
    ("transformer.level_embeds", "encoder.level_embed"),
    ("transformer.encoder.layers.#.attentions.0.*", "encoder.layers.#.attention.*"),
    ("transformer.encoder.layers.#.norms.0.*", "encoder.layers.#.attention_norm.*"),
    ("transformer.encoder.layers.#.ffns.0.layers.0.0.*", "encoder.layers.#.ffn.linear1.*"),
    ("transformer.encoder.layers.#.ffns.0.layers.1.*", "encoder.layers.#.ffn.linear2.*"),
    ("transformer.encoder.layers.#.norms.1.*", "encoder.layers.#.ffn.norm.*"),
    ("transformer.enc_output.*", "query_source.project.*"),
    ("transformer.enc_output_norm.*", "query_source.norm.*"),
    ("transformer.tgt_embed.weight", "query_source.content"),
    ("transformer.decoder.layers.#.attentions.0.attn.*", "decoder.layers.#.self_attention.*"),
    ("transformer.decoder.layers.#.norms.0.*", "decoder.layers.#.self_attention_norm.*"),
    ("transformer.decoder.layers.#.attentions.1.*", "decoder.layers.#.cross_attention.*"),
    ("transformer.decoder.layers.#.norms.1.*", "decoder.layers.#.cross_attention_norm.*"),
    ("transformer.decoder.layers.#.ffns.0.layers.0.0.*", "decoder.layers.#.ffn.linear1.*"),
    ("transformer.decoder.layers.#.ffns.0.layers.1.*", "decoder.layers.#.ffn.linear2.*"),
    ("transformer.decoder.layers.#.norms.2.*", "decoder.layers.#.ffn.norm.*"),
    ("transformer.decoder.norm.*", "decoder.norm.*"),
    ("transformer.decoder.ref_point_head.*", "decoder.position_mlp.*"),
    ("transformer.decoder.class_embed.#.*", "heads.class_heads.#.*"),
    ("transformer.decoder.bbox_embed.#.*", "heads.box_heads.#.*"),
    ("class_embed.#.*", "heads.class_heads.#.*"),
    ("bbox_embed.#.*", "heads.box_heads.#.*"),
    ("label_enc.weight", "denoising.label_embed.weight"),
]


def detrex_dino(names: Iterable[str]) -> Table:
    """detrex counts the proposals' heads as one more layer, and its extra levels from 0."""
    names = set(names)
    proposals = _count("class_embed.#.weight", names) - 1
    levels = _count("neck.convs.#.conv.weight", names)
    table: Table = []
    for prefix in ("transformer.decoder.", ""):
        table.append((f"{prefix}class_embed.{proposals}.*", "query_source.class_head.*"))
        table.append((f"{prefix}bbox_embed.{proposals}.*", "query_source.box_head.*"))
    for i in range(_count("neck.extra_convs.#.conv.weight", names)):
        table.append((f"neck.extra_convs.{i}.conv.*", f"neck.projections.{levels + i}.0.*"))
        table.append((f"neck.extra_convs.{i}.norm.*", f"neck.projections.{levels + i}.1.*"))
    return table + _DETREX_DINO


def rename(name: str, table: Table) -> str | None:
    """The name by a table; None if the weight is to be dropped.

    Raises:
        CheckpointError: no row matches.
    """
    for theirs, ours in table:
        match = _match(theirs, name)
        if match:
            return ours and _fill(ours, match.groups())
    raise CheckpointError(f"unknown weight {name!r}")


def _fill(ours: str, found: tuple[str, ...]) -> str:
    parts = re.split(r"[#*]", ours)
    return parts[0] + "".join(value + part for value, part in zip(found, parts[1:], strict=True))


def _match(pattern: str, name: str) -> re.Match | None:
    pattern = re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
    return re.fullmatch(pattern, name)


def _count(pattern: str, names: set[str]) -> int:
    return sum(_match(pattern, name) is not None for name in names)
