"""Compare the texts that builds read from MDS folders with those that mosaicml-streaming's MDSWriter was given.

Usage: in_mosaicml_streaming.py FOLDER, with the project on PYTHONPATH
"""

from __future__ import annotations

import random
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

from llama_ds.data.text.corpus import documents
from llama_ds.data.text.formats import ReadOptions
from llama_ds.errors import UserError

COUNT = 2000
COMPRESSIONS = (None, "gz", "bz2:3", "zstd:7")
REFUSED = ("br", "snappy")
HASHES = ["sha1", "xxh64"]


def main() -> None:
    """Write and read datasets of each compression, with several shards, and a merged one."""
    _omit_torchvision()
    from streaming import MDSWriter
    from streaming.base.util import merge_index

    rng = random.Random(5)
    texts = [f"{i} " + "漢字 é\n" * rng.randrange(40) for i in range(COUNT)]
    columns = {"text": "str", "raw": "bytes", "doc": "json", "n": "int", "x": "float32", "ids": "ndarray:int32:4"}
    where = f"mosaicml-streaming {version('mosaicml-streaming')}"

    def write(folder: Path, compression: str | None) -> None:
        import numpy as np

        with MDSWriter(
            out=str(folder), columns=columns, compression=compression, hashes=HASHES, size_limit=1 << 16
        ) as writer:
            for i, text in enumerate(texts):
                sample = {"text": text, "raw": text.encode(), "doc": {"body": text}, "n": i, "x": 0.5}
                writer.write({**sample, "ids": np.arange(4, dtype=np.int32)})

    with tempfile.TemporaryDirectory() as root:
        for compression in COMPRESSIONS:
            folder = Path(root) / str(compression).replace(":", "")
            write(folder, compression)
            for field in ("text", "raw", "doc.body"):
                found = [d.text for d in documents(str(folder), options=ReadOptions(text_field=field))]
                if found != texts:
                    sys.exit(f"{where}, {compression}, {field}: other texts")
            print(f"{where}, {compression}: {len(texts)} texts equal, in {len(list(folder.iterdir())) - 1} shards")
        for compression in REFUSED:
            write(folder := Path(root) / compression, compression)
            try:
                list(documents(str(folder)))
            except UserError as error:
                print(f"{where}, {compression}: refused, {str(error).removeprefix(root)}")
            else:
                sys.exit(f"{where}, {compression}: not refused")
        for part in ("0", "1"):
            write(Path(root) / "merged" / part, "zstd")
        merge_index(str(Path(root) / "merged"), keep_local=True)
        if [d.text for d in documents(str(Path(root) / "merged"))] != texts * 2:
            sys.exit(f"{where}, merged: other texts")
        print(f"{where}, merged index: texts equal")


def _omit_torchvision() -> None:
    """Let the package be imported without torchvision, which only its readers of images use."""
    import transformers.feature_extraction_utils  # noqa: F401  (it looks for torchvision, and must not find this one)

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules[names[1]].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules[names[3]].to_tensor = None  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
