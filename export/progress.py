"""What export is doing, while it does it: a bar over targets and precisions, with the step at hand."""

from __future__ import annotations

import sys

from tqdm import tqdm

from ffl_deploy.command import printable


class Progress:
    """One bar on a terminal; nothing elsewhere, where the lines about finished files are all that is said."""

    def __init__(self) -> None:
        self.bar = tqdm(
            bar_format="{percentage:3.0f}%|{bar:16}| {n_fmt} of {total_fmt} files, {elapsed}: {desc}",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=False,
        )

    def expect(self, files: int) -> None:
        """So many files are asked for: each precision of each target."""
        self.bar.total = files

    def step(self, text: str) -> None:
        """This is begun now, such as "fused: quantizing to int8"."""
        if not self.bar.disable:
            self.bar.set_description_str(text)

    def finished(self, files: int = 1) -> None:
        """So many files are written and verified, or refused."""
        self.bar.update(files)

    def line(self, text: str) -> None:
        """Print a line that stays, on standard output, above the bar."""
        self.bar.clear()
        print(printable(text), flush=True)
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()
