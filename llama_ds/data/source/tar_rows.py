"""Rows as members of a tar, written and checked as arrays: byte for byte the output of webdataset's TarWriter.

Each member is one row, the raw little-endian ids of seq_len + 1 tokens, named by its row number in the split. All
members have the same size: member i of a shard starts at offset i * stride, and its ids 512 bytes later. A row is
therefore read without unpacking, and a shard is built or checked by a few array operations. A test compares the result
with webdataset's.

Shapes: R rows, S bytes from one member to the next.
"""

from __future__ import annotations

import tarfile

import numpy as np

BLOCK = tarfile.BLOCKSIZE  # 512 bytes; a member is a header block and its content padded to blocks
KEY_DIGITS = 10  # digits of the row number, which is webdataset's __key__
_CHECKSUM = slice(148, 156)  # position of the header checksum (POSIX ustar)


def extension(dtype: np.dtype) -> str:
    """Return the file extension of a member in webdataset: ids.u16 or ids.u32."""
    return f"ids.u{dtype.itemsize * 8}"


def stride(seq_len: int, dtype: np.dtype) -> int:
    """Return the number of bytes from one member to the next."""
    return BLOCK + -(-(seq_len + 1) * dtype.itemsize // BLOCK) * BLOCK


def shard_bytes(rows: int, seq_len: int, dtype: np.dtype) -> int:
    """Return the size of a shard of `rows` rows: members and two end-of-archive blocks, padded to 20 blocks."""
    content = rows * stride(seq_len, dtype) + 2 * BLOCK
    return -(-content // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def members(first_row: int, ids: np.ndarray) -> np.ndarray:
    """Return the members of the rows first_row, first_row + 1, ...: uint8 (R, S). `ids`: (R, seq_len + 1)."""
    rows, width = ids.shape
    out = np.zeros((rows, stride(width - 1, ids.dtype)), np.uint8)
    _write_headers(out, first_row, ids.dtype, width * ids.dtype.itemsize)
    _content(out, width, ids.dtype)[:] = ids
    return out


def rows_of(data: np.ndarray, seq_len: int, dtype: np.dtype) -> np.ndarray:
    """Return the ids (R, seq_len + 1) of a shard's members (R, S), as a view."""
    return _content(data, seq_len + 1, dtype)


def first_damage(data: np.ndarray, first_row: int, seq_len: int, dtype: np.dtype) -> int | None:
    """Return the offset of the first byte of the members (R, S) that differs from the output of `members`, or None.

    It checks every header and padding byte. Ids have no redundancy, so only a checksum can verify them.
    """
    width = (seq_len + 1) * dtype.itemsize
    headers = np.empty((len(data), BLOCK), np.uint8)
    _write_headers(headers, first_row, dtype, width)
    wrong = np.concatenate([headers != data[:, :BLOCK], data[:, BLOCK + width :] != 0], axis=1)
    offsets = np.concatenate([np.arange(BLOCK), np.arange(BLOCK + width, data.shape[1])])
    row, column = np.nonzero(wrong)
    return int(row[0] * data.shape[1] + offsets[column[0]]) if len(row) else None


def _content(data: np.ndarray, width: int, dtype: np.dtype) -> np.ndarray:
    return data[:, BLOCK : BLOCK + width * dtype.itemsize].view(dtype)


def _write_headers(out: np.ndarray, first_row: int, dtype: np.dtype, size: int) -> None:
    template = tarfile.TarInfo(f"{0:0{KEY_DIGITS}d}.{extension(dtype)}")
    template.size, template.mode, template.mtime = size, 0o0444, 0
    out[:, :BLOCK] = np.frombuffer(template.tobuf(tarfile.USTAR_FORMAT), np.uint8)
    powers = 10 ** np.arange(KEY_DIGITS - 1, -1, -1, dtype=np.int64)
    numbers = np.arange(first_row, first_row + len(out), dtype=np.int64)
    out[:, :KEY_DIGITS] = ord("0") + numbers[:, None] // powers % 10
    out[:, _CHECKSUM] = ord(" ")
    sums = out[:, :BLOCK].sum(1, dtype=np.int64)
    octal = ord("0") + sums[:, None] // 8 ** np.arange(5, -1, -1) % 8
    out[:, _CHECKSUM] = np.pad(octal, ((0, 0), (0, 2)), constant_values=((0, 0), (0, ord(" "))))
    out[:, _CHECKSUM.stop - 2] = 0  # six octal digits, NUL, space
