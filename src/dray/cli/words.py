"""How words of a command line are read."""

from __future__ import annotations

import argparse
from typing import NoReturn

from dray.errors import UserError
from dray.processes.streams import warn


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        warn(f"{' '.join(message.split())}; `{self.prog} --help` lists what there is")
        raise SystemExit(UserError.exit_code)
