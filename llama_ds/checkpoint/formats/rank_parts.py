"""A part of a model, such as a pipeline stage or one layer, in the files of all its tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from llama_ds.checkpoint.formats.inventory import check_names, check_shape, merged
from llama_ds.checkpoint.formats.plan import part_shape
from llama_ds.checkpoint.stored import Stored
from llama_ds.checkpoint.weights import Readable


@dataclass(frozen=True)
class RankParts:
    """The state dict of a part of the model on every tensor-parallel rank."""

    paths: tuple[str, ...]
    parts: tuple[Mapping[str, Stored], ...]

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors on the first rank."""
        return self.parts[0].keys()

    def check(self, wanted: Collection[str]) -> None:
        """Check that all ranks have exactly the tensors `wanted`.

        Raises:
            UserError: tensors are missing or unknown.
        """
        for path, part in zip(self.paths, self.parts, strict=True):
            check_names(path, wanted, part)

    def merged(
        self, name: str, dim: int | None, shape: tuple[int, ...], config: str = "args", equal: bool = True
    ) -> Readable:
        """Return a tensor of all ranks, checked to have the unsharded `shape`.

        Args:
            dim: the dimension along which the ranks share it; None: each has all of it.
            config: what the shape follows from, for messages.
            equal: check that all ranks have the same values, where each has all of it.

        Raises:
            UserError: a shape, or a value that must be equal, differs.
        """
        own = part_shape(shape, dim, len(self.parts))
        check_shape(self.paths[0], name, self.parts[0][name].shape, own, config)
        return merged(name, self.parts, self.paths, dim, equal)
