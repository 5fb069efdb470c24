"""What a module keeps of its forward for backward, and how many rows of it exist at a time: `keep` and `tile`."""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_KEEP = 2


class Memory(NamedTuple):
    """The setting of one module.

        keep=3    gate, up and the product
        keep=2    gate and up
        keep=1    gate; up comes from its projection again
        keep=0    the module's input; gate and up come from their projections again

    With `tile`, at most that many rows of gate and up exist at a time, in inference and in training.
    """

    keep: int = DEFAULT_KEEP
    tile: int | None = None
    # Whether a run of the forward may be repeated in backward: shown from its source, see `rowwise`.
    repeats: bool = False

    def __str__(self) -> str:
        return f"keep={self.keep}" if self.tile is None else f"keep={self.keep}, tile={self.tile}"


def checked(keep: object, tile: object) -> Memory:
    """The setting that a user asks for; `keep=None` is 2, and 0 with a tile.

    Raises:
        ValueError: `keep` is not 0 to 3, `tile` is not a positive integer, or `tile` comes with a `keep` other than 0.
    """
    if keep is not None and (type(keep) is not int or not 0 <= keep <= 3):
        raise ValueError(
            f"keep must be 0, 1, 2 or 3, the buffers that an MLP keeps for backward; got {keep!r}. "
            "Leave it out for the default of 2"
        )
    if tile is None:
        return Memory(DEFAULT_KEEP if keep is None else keep)
    if type(tile) is not int or tile < 1:
        raise ValueError(
            f"tile must be a positive integer, the rows of gate and up that exist at once, such as 512; got {tile!r}. "
            "Leave it out to compute all rows at once"
        )
    if keep not in (None, 0):
        raise ValueError(
            f"tile={tile} keeps no gate and no up for backward, so keep must be 0 or left out; got keep={keep}. "
            "Leave out one of the two"
        )
    return Memory(0, tile)
