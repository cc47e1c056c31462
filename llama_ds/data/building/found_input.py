"""The files of a pattern, found before a build; finding them again would read the beginning of each once more."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ds.data.building.input_files import InputFile, stat_files
from llama_ds.data.text.formats import ReadOptions
from llama_ds.data.text.input_storage import is_remote
from llama_ds.data.text.inputs import Inputs, find_inputs
from llama_ds.errors import UserError


@dataclass(frozen=True)
class FoundInput:
    """The files that a pattern gave, with their stamps at that time."""

    inputs: Inputs
    files: list[InputFile]
    options: ReadOptions

    def current(self) -> FoundInput:
        """Return this, or what the pattern gives now if one of the files has changed since; a build checks URLs itself.

        Raises:
            UserError: as `find_inputs` does.
        """
        if is_remote(self.inputs.pattern):
            return self
        try:
            if stat_files(self.inputs.paths) == self.files:
                return self
        except UserError:
            pass  # a file has gone
        return find_input(self.inputs.pattern, self.options)


def find_input(pattern: str, options: ReadOptions) -> FoundInput:
    """Return the files of `pattern`. Raises UserError as `find_inputs` does."""
    inputs = find_inputs(pattern, options)
    return FoundInput(inputs, stat_files(inputs.paths), options)
