"""Names that others give to a place in a model, as the block whose output it is.

Here, layer ``L`` is the output of block ``L``, counted from 0, before any final norm. Hugging Face
calls it ``hidden_states[L + 1]``; TransformerLens and SAELens ``blocks.L.hook_resid_post``, which
is ``blocks.{L + 1}.hook_resid_pre``; a module path ends in ``layers.L`` (or ``h.L``). Hugging
Face's last entry is the exception: it comes after the final norm.
"""

from __future__ import annotations

import re

_LENS = re.compile(r"blocks\.(\d+)\.hook_resid_(post|pre)")
_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h)\.(\d+)(?:\.output)?")


def block_of_hook(hook: str) -> int:
    """The block whose output a hook point or module path stands for.

    Args:
        hook: Such as `blocks.12.hook_resid_pre`, `model.layers.11` or `model.layers.11.output`.

    Raises:
        ValueError: It is another place than the residual stream after a block.
    """
    if found := _LENS.fullmatch(hook):
        return block_before(int(found[1]), hook) if found[2] == "pre" else int(found[1])
    if found := _MODULE.fullmatch(hook):
        return int(found[1])
    raise ValueError(
        f"{hook} is no output of a block; tamis reads the residual stream after a block, "
        "so an autoencoder of another place can't be used"
    )


def block_before(block: int, place: str) -> int:
    """The block whose output is the input of a block.

    Raises:
        ValueError: It is the first one, whose input are the embeddings.
    """
    if block == 0:
        raise ValueError(
            f"{place} is the input of the first block, the embeddings; tamis reads the residual "
            "stream after a block"
        )
    return block - 1
