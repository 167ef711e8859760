"""A new folder of files, of which all or none are there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_new(folder: Path) -> bool:
    """Whether a folder does not exist yet or is empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files are those of ``folder`` in the end; on an error, nothing remains."""
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        yield partial
        if folder.is_dir():  # it stays, as it may be the working directory of a shell
            for file in partial.iterdir():
                file.replace(folder / file.name)
            partial.rmdir()
        else:
            partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
