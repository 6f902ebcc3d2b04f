"""What a disk may contain after a power cut: a crash-consistency model like ALICE (Pillai et al., OSDI 2014).

In the model, a folder is a table of names and a file is content. Each becomes durable separately:

- Content is durable after an fsync of the file. Later writes may be lost completely or in part.
- A name is durable after an fsync of its folder. Until then, a new name, a rename or a removal may be undone,
  each independently of the others, because disks reorder operations.

So a file renamed without an fsync may exist and be empty, and a file that was written and synced may have no
name. SQLite's own files and MLflow's artifacts are left unchanged, because this project does not promise their
durability.
"""

import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

Record = tuple[str, str, str, bytes | None]
# Unsynced changes: all lost | names kept, contents lost | chosen at random for each.
MODES = ("lost", "empty", "mixed")


@dataclass(eq=False)
class _File:
    durable: bytes = b""
    live: bytes = b""
    is_dirty: bool = False  # whether it was written since its last fsync


@dataclass(eq=False)
class _Folder:
    durable: dict[str, "_Node"] = field(default_factory=dict)
    live: dict[str, "_Node"] = field(default_factory=dict)


_Node = _File | _Folder


@dataclass(eq=False)
class _Change:
    """New names (with their node) and removed names (with None) in one or two folders; an atomic change."""

    names: list[tuple[_Folder, str, _Node | None]]
    is_durable: bool = False


def cut_power(project: Path, before: Path, trace: list[Record], mode: str, chance: random.Random) -> None:
    """Change `project`, where a process was just killed, to what a power cut at that moment could have left.

    `before` contains the project's files at the start of the process, all of them durable.
    """
    disk = _Disk(project, before)
    for record in trace:
        disk.replay(*record)
    disk.read_live_contents(project)
    disk.decide(mode, chance)
    for name in _watched(project):
        _remove(project / name)
    _write(disk.root, project, mode, chance)


def _watched(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not _is_excluded(name))  # noqa: PTH208


def _is_excluded(name: str) -> bool:
    """Whether a name in the project's root is outside the model."""
    return name.startswith((".git", ".dvc", "mlflow.db", ".mlflow.db", "mlartifacts")) and name != ".gptpipe"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class _Disk:
    def __init__(self, project: Path, before: Path) -> None:
        self.project = project
        self.root = _Folder()
        for name in _watched(before):
            self.root.durable[name] = _load(before / name)
        self.root.live = dict(self.root.durable)
        self.changes: list[_Change] = []

    def replay(self, kind: str, path: str, other: str, content: bytes | None) -> None:
        parts = Path(path).relative_to(self.project).parts
        if not parts:  # an fsync of the project's root
            self._sync_names(self.root)
            return
        if _is_excluded(parts[0]):
            return
        folder, name = self._find(parts[:-1]), parts[-1]
        if not isinstance(folder, _Folder):
            return
        node = folder.live.get(name)
        match kind:
            case "open" | "write":
                if node is None:
                    node = _File()
                    self._change((folder, name, node))
                if isinstance(node, _File):
                    node.is_dirty = True
            case "mkdir" if node is None:
                self._change((folder, name, _Folder()))
            case "remove" | "rmdir" if node is not None:
                self._change((folder, name, None))
            case "rename" if node is not None:
                target = Path(other).relative_to(self.project).parts
                new_folder = self._find(target[:-1])
                assert isinstance(new_folder, _Folder)
                self._change((folder, name, None), (new_folder, target[-1], node))
            case "fsync" if isinstance(node, _File) and content is not None:
                node.durable, node.is_dirty = content, False
            case "fsync" if isinstance(node, _Folder):
                self._sync_names(node)

    def _sync_names(self, folder: _Folder) -> None:
        for change in self.changes:
            change.is_durable |= any(changed is folder for changed, _, _ in change.names)

    def _find(self, parts: tuple[str, ...]) -> _Node | None:
        node: _Node | None = self.root
        for part in parts:
            node = node.live.get(part) if isinstance(node, _Folder) else None
        return node

    def _change(self, *names: tuple[_Folder, str, _Node | None]) -> None:
        for folder, name, node in names:
            if node is None:
                folder.live.pop(name, None)
            else:
                folder.live[name] = node
        self.changes.append(_Change(list(names)))

    def read_live_contents(self, project: Path) -> None:
        """Read what files contain at the moment of the cut. A nameless file has only its durable content."""

        def visit(folder: _Folder, path: Path) -> None:
            for name, node in folder.live.items():
                if isinstance(node, _Folder):
                    visit(node, path / name)
                elif (path / name).is_file():
                    node.live = (path / name).read_bytes()

        visit(self.root, project)

    def decide(self, mode: str, chance: random.Random) -> None:
        """Apply the changes of names that survive: the durable ones, and others according to `mode`."""
        for change in self.changes:
            if change.is_durable or mode == "empty" or (mode == "mixed" and chance.random() < 0.5):
                for folder, name, node in change.names:
                    if node is None:
                        folder.durable.pop(name, None)
                    else:
                        folder.durable[name] = node


def _load(path: Path) -> _Node:
    if path.is_dir():
        folder = _Folder()
        for name in sorted(os.listdir(path)):  # noqa: PTH208
            folder.durable[name] = _load(path / name)
        folder.live = dict(folder.durable)
        return folder
    content = path.read_bytes()
    return _File(durable=content, live=content)


def _write(folder: _Folder, path: Path, mode: str, chance: random.Random) -> None:
    path.mkdir(exist_ok=True)
    for name, node in folder.durable.items():
        if isinstance(node, _Folder):
            _write(node, path / name, mode, chance)
        else:
            (path / name).write_bytes(_content(node, mode, chance))


def _content(file: _File, mode: str, chance: random.Random) -> bytes:
    if not file.is_dirty:
        return file.durable
    if mode != "mixed":
        return file.durable
    part = file.live[: chance.randint(0, len(file.live))]
    return chance.choice([file.durable, part, file.live, bytes(len(file.live))])
