"""The folder of a Chroma inside the process: what Chroma leaves in it of dropped collections."""

import shutil
import subprocess
import sys
import uuid
from pathlib import Path

# In a process of its own: to open and close Chroma's file in this one would release the locks that Chroma holds on it.
_SEGMENTS = """
import sqlite3, sys, pathlib
database = sqlite3.connect(pathlib.Path(sys.argv[1]).as_uri() + "?mode=ro", uri=True, timeout=10)
print("\\n".join(id for (id,) in database.execute("SELECT id FROM segments")))
"""


def remove_dead_folders(path: Path) -> None:
    tables = path / "chroma.sqlite3"
    if not tables.exists():
        return
    # Looked at first: a collection is in the tables before it has a folder.
    folders = [each for each in path.iterdir() if each.is_dir() and _is_uuid(each.name)]
    if not folders:
        return
    listed = subprocess.run([sys.executable, "-I", "-c", _SEGMENTS, str(tables)], capture_output=True, text=True)
    if listed.returncode == 0:
        alive = set(listed.stdout.split())
        for folder in folders:
            if folder.name not in alive:
                shutil.rmtree(folder, ignore_errors=True)


def _is_uuid(name: str) -> bool:
    try:
        uuid.UUID(name)
    except ValueError:
        return False
    return True
