"""The original authors' checkpoint layout, mapped onto ours.

Their networks number everything by hand (``phi_6``, ``merge34``, ``stage2_encoder``); ours are first / middle / last
stages with a degradation and a proximal mapping each. One table of rules translates a name.
"""

import re
from collections.abc import Iterable

from torch import Tensor

from dgunet.runtime.errors import UserError, shorten_list

STAGES = 7  # of every network the authors published

# Where a name of theirs lives. Each rule: pattern, our stage (or how to count it), what is left of the name.
# The number in a name counts the stages from 0 (r, phi, phit) or from 1 (the others); samAB sits in stage A,
# mergeAB and concatAB in stage B.
_PLACES = [
    (r"Phi$", lambda m: "degradation", "matrix"),
    (r"(?:basic|stage_model)\.", lambda m: "middle.0", ""),
    (r"body\.(\d)\.", lambda m: f"middle.{m[1]}", ""),
    (r"r_final$", lambda m: "last", "rho"),
    (r"(shallow_feat|concat)_final\.", lambda m: "last", r"\1."),
    (r"tail\.", lambda m: "last", "tail."),
    (r"(r|phi|phit)_?(\d)(?=\.|$)", lambda m: _stage(int(m[2]) + 1), r"\1"),
    (r"(shallow_feat)(\d)\.", lambda m: _stage(int(m[2])), r"\1."),
    (r"stage(\d)_(encoder|decoder)\.", lambda m: _stage(int(m[1])), r"\2."),
    (r"(sam)(\d)\d\.", lambda m: _stage(int(m[2])), r"\1."),
    (r"(merge|concat)\d(\d)\.", lambda m: _stage(int(m[2])), r"\1."),
]


def _stage(number: int) -> str:
    if number == 1:
        return "first"
    return "last" if number == STAGES else f"middle.{number - 2}"


# Inside a stage: their module names to ours, applied in order.
_PARTS = [
    (r"^r\d?$", "rho"),
    (r"^phi(?:_\d)?\.", "degradation.A."),
    (r"^phit(?:_\d)?\.", "degradation.A_adjoint."),
    (r"^shallow_feat\d?\.0\.", "proximal.shallow.conv."),
    (r"^shallow_feat\d?\.1\.", "proximal.shallow.block."),
    (r"(^degradation\.\w+|shallow\.block)\.body\.0", r"\1.conv1"),
    (r"(^degradation\.\w+|shallow\.block)\.body\.1", r"\1.activation"),
    (r"(^degradation\.\w+|shallow\.block)\.body\.2", r"\1.conv2"),
    (r"shallow\.block\.CA\.conv_du\.0", "shallow.block.attention.squeeze"),
    (r"shallow\.block\.CA\.conv_du\.2", "shallow.block.attention.excite"),
    (r"^(?:stage\d?_)?encoder\.body\.(\d)\.", r"proximal.encoder.blocks.\1."),
    (r"^(?:stage\d?_)?decoder\.body\.(\d)\.(?:conv_block\.)?", r"proximal.decoder.blocks.\1."),
    (r"^(?:stage\d?_)?decoder\.skip_conv\.(\d)\.", r"proximal.decoder.skips.\1."),
    (r"\.conv_([12])\.", r".conv\1."),
    (r"\.norm\.", ".norm.norm."),
    (r"encoder\.blocks\.(\d)\.downsample", r"encoder.downsamples.\1"),
    (r"encoder\.blocks\.(\d)\.csff_enc", r"encoder.isff.\1.encoder_conv"),
    (r"encoder\.blocks\.(\d)\.csff_dec", r"encoder.isff.\1.decoder_conv"),
    (r"encoder\.blocks\.(\d)\.phi", r"encoder.isff.\1.scale_conv"),
    (r"encoder\.blocks\.(\d)\.gamma", r"encoder.isff.\1.shift_conv"),
    (r"encoder\.blocks\.3\.", "encoder.bottom."),
    (r"decoder\.blocks\.(\d)\.up\.", r"decoder.upsamples.\1."),
    (r"^sam(?:\d\d)?\.conv1\.", "proximal.features_conv."),
    (r"^sam(?:\d\d)?\.conv2\.", "proximal.image_conv."),
    (r"^sam(?:\d\d)?\.conv3\.", "proximal.attention_conv."),
    (r"^merge(?:\d\d)?\.conv_block\.", "proximal.fusion.merge_conv."),
    (r"^merge(?:\d\d)?\.subnet\.", "proximal.fusion.basis_conv."),
    (r"^concat\.", "proximal.fusion.conv."),
    (r"^tail\.", "proximal.image_conv."),
]

# Their decoders count the scales from the coarsest, ours from the finest.
_MIRRORED = re.compile(r"(decoder\.(?:upsamples|blocks|skips)\.)(\d)")

# Parameters that the original allocates and never uses.
_UNUSED = [
    r"basic\.concat12\.weight",
    r"(stage_model|body\.\d)\.phit?\..*",
    r"stage1_encoder\.body\.\d\.csff_(enc|dec)\..*",
]


def is_unused(name: str) -> bool:
    """Whether the original never uses this parameter of its own."""
    return any(re.fullmatch(pattern, name) for pattern in _UNUSED)


def our_name(name: str) -> str | None:
    """Our name of one of their parameters; None where the name is not one of theirs."""
    for pattern, stage, rest in _PLACES:
        match = re.match(pattern, name)
        if match:
            prefix, part = stage(match), match.expand(rest) + name[match.end() :]
            break
    else:
        return None
    for pattern, replacement in _PARTS:
        part = re.sub(pattern, replacement, part)
    part = _MIRRORED.sub(lambda m: m[1] + str(2 - int(m[2])), part)
    return f"{prefix}.{part}"


def is_original(names: Iterable[str]) -> bool:
    """Whether names of weights are in the original authors' layout."""
    return any(re.match(r"(shallow_feat1|stage1_encoder|tail)\.", name) for name in names)


def convert_original(state_dict: dict[str, Tensor], path="the checkpoint") -> dict[str, Tensor]:
    """Rename a state dict in the original layout (without ``module.``) to ours, dropping what they never use.

    Raises:
        UserError: listing the names that belong to neither, or naming one that is there in two spellings.
    """
    converted, unknown = {}, []
    for name, value in state_dict.items():
        if is_unused(name):
            continue
        ours = our_name(name)
        if ours is None:
            unknown.append(name)
        elif ours in converted:
            raise UserError(f"{path} has two weights for {ours}, one of them {name}")
        else:
            converted[ours] = value
    if unknown:
        raise UserError(f"{path} has parameters that no DGUNet of the authors has: {shorten_list(unknown)}")
    return converted
