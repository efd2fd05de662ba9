"""JPEG XL: what its header says, and its pixels, decoded in a process that may be killed.

The plugin decodes when it opens a file, and libjxl has no limit: a few kB can ask for hours (layers, which
only an entropy decoder can count) or for a terabyte (4096 further channels). So the header is read here, and
the rest by a child that the system ends where it takes too much.
"""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
from typing import NamedTuple

CPU_SECONDS = 60
ADDRESS_BYTES = 6 << 30  # 50 megapixels of four 16-bit channels, as floats and as integers
HEADER_BYTES = 128  # of a codestream: far more than its size and what follows it take
CODESTREAM, CONTAINER = b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"
_RATIOS = (None, (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
# numbers of a variable length: two bits choose (what is added, how many bits follow)
_SIDE = ((1, 9), (1, 13), (1, 18), (1, 30))
_PREVIEW = ((1, 6), (65, 8), (321, 10), (1345, 12))
_PREVIEW_OF_8 = ((16, 0), (32, 0), (1, 5), (33, 9))


class JpegXlError(Exception):
    """A file that cannot be decoded. `code` is the status of its row."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Header(NamedTuple):
    """Of the image as it lies there, not turned upright."""

    width: int
    height: int
    animated: bool


class Raw(NamedTuple):
    """What the child gives: pixels of one of Pillow's modes, upright; of mode `JPEG` the file that was packed
    without loss."""

    mode: str
    width: int
    height: int
    data: bytes


class _Bits:
    """Bits of a codestream, the lowest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int) -> int:
        if count > self._left:
            raise JpegXlError("truncated", "the file ends in its header")
        found = self._value & ((1 << count) - 1)
        self._value >>= count
        self._left -= count
        return found

    def choice(self, table: tuple[tuple[int, int], ...]) -> int:
        base, count = table[self.take(2)]
        return base + self.take(count)


def read_header(data: bytes) -> Header:
    """-> what a file's header says. Source: ISO/IEC 18181-1, SizeHeader and ImageMetadata; 18181-2, boxes.
    Raises JpegXlError."""
    bits = _Bits(_codestream(data)[len(CODESTREAM) :][:HEADER_BYTES])
    width, height = _size(bits)
    animated = False
    if not bits.take(1) and bits.take(1):  # not all as usual, and more than the bit depth is said
        bits.take(3)  # orientation
        if bits.take(1):
            _size(bits)  # at which it is meant to be seen
        if bits.take(1):
            _preview_size(bits)
        animated = bool(bits.take(1))
    return Header(width, height, animated)


def _codestream(data: bytes) -> bytes:
    """-> the beginning of the codestream: of the file, or of its boxes for it one after the other."""
    if data.startswith(CODESTREAM):
        return data[: len(CODESTREAM) + HEADER_BYTES]
    found, position = b"", 0
    while position + 8 <= len(data) and len(found) < len(CODESTREAM) + HEADER_BYTES:
        size, kind = struct.unpack_from(">I4s", data, position)
        start = position + 8
        if size == 1 and start + 8 <= len(data):
            size, start = struct.unpack_from(">Q", data, start)[0], start + 8
        end = position + size if size else len(data)
        if end < start:
            break
        if kind in (b"jxlc", b"jxlp"):
            found += data[start + (4 if kind == b"jxlp" else 0) : min(end, start + 4 + 2 * HEADER_BYTES)]
        position = end
    if not found.startswith(CODESTREAM):
        raise JpegXlError("corrupt", "the container holds no image")
    return found


def _size(bits: _Bits) -> tuple[int, int]:
    of_8 = bits.take(1)
    height = 8 * (bits.take(5) + 1) if of_8 else bits.choice(_SIDE)
    if ratio := _RATIOS[bits.take(3)]:
        return height * ratio[0] // ratio[1], height
    return 8 * (bits.take(5) + 1) if of_8 else bits.choice(_SIDE), height


def _preview_size(bits: _Bits) -> None:
    side = _PREVIEW_OF_8 if bits.take(1) else _PREVIEW
    bits.choice(side)
    if not bits.take(3):
        bits.choice(side)


def decode_apart(data: bytes) -> Raw:
    """-> the decoded image, by a process of its own (about 0.1 s). Raises JpegXlError."""
    command = [sys.executable, "-P", "-c", _CHILD, str(CPU_SECONDS), str(ADDRESS_BYTES)]
    # a session of its own: Ctrl-C is for whoever decodes, and no reason to call a file broken
    done = subprocess.run(command, input=data, capture_output=True, check=False, start_new_session=True)
    if done.returncode == -signal.SIGXCPU:
        raise JpegXlError("too_large", f"decoding it takes more than {CPU_SECONDS} s")
    if done.returncode:  # libjxl does not tell the two apart
        most = f"{ADDRESS_BYTES / 2**30:.3g} GiB"
        raise JpegXlError("corrupt", f"it is damaged, or decoding it takes more than {most}")
    head, _, pixels = done.stdout.partition(b"\n")
    mode, width, height = head.decode().split()
    return Raw(mode, int(width), int(height), pixels)


_CHILD = """
import resource, sys
from pillow_jxl import Decoder
seconds, size = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
jpeg, info, pixels, *_ = Decoder(num_threads=0)(sys.stdin.buffer.read())
mode = "JPEG" if jpeg else info.mode
sys.stdout.buffer.write(f"{mode} {info.width} {info.height}\\n".encode())
sys.stdout.buffer.write(pixels)
"""
