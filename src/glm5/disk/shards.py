"""Which tensors a checkpoint directory holds and in which file, from its headers alone."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from glm5.disk.json_file import read_json
from glm5.disk.safetensors_file import SafetensorsFile, TensorInfo, shown
from glm5.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
# The largest published index (59,585 names) is 6 MB.
MAX_INDEX_BYTES = 256 << 20


class ShardIndex:
    """The tensors of a directory: `index[name]` is a TensorInfo, `index.file(name)` its file.

    Raises:
        CheckpointError: no weights, a missing shard, an index that points out of the directory, at
            a tensor that its shard lacks, or past a tensor that it does not list.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def _files(self) -> dict[str, SafetensorsFile]:
        """Tensor name to file."""
        index, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        if index.is_file():
            return self._from_index(index)
        if not single.is_file():
            if any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt")):
                raise CheckpointError(
                    f"{self.directory}: holds pickled weights (.bin, .pt) and no safetensors; "
                    "glm5 never unpickles: get a safetensors copy"
                )
            raise CheckpointError(f"{self.directory}: has neither {INDEX_FILE} nor {SINGLE_FILE}")
        file = SafetensorsFile(single)
        return dict.fromkeys(file.tensors, file)

    def _from_index(self, path: Path) -> dict[str, SafetensorsFile]:
        files: dict[str, SafetensorsFile] = {}
        listed: dict[str, SafetensorsFile] = {}
        for name, shard in _weight_map(path).items():
            if shard not in files:
                files[shard] = SafetensorsFile(self._inside(path, shard))
            file = files[shard]
            if name not in file.tensors:
                raise CheckpointError(
                    f"{path}: says {shown(name)} is in {shard}, which lacks it; download both again"
                )
            listed[name] = file
        for file in files.values():
            unlisted = next((name for name in file.tensors if listed.get(name) is not file), None)
            if unlisted is not None:
                raise CheckpointError(
                    f"{file.path}: holds {shown(unlisted)}, which {path.name} does not place there; "
                    "download both again"
                )
        return listed

    def _inside(self, index: Path, shard: str) -> Path:
        """The path of a shard, which must be a plain file name ending in .safetensors.

        The file itself may be a symbolic link: the hub's cache is made of them.
        """
        plain = shard.isprintable() and len(shard) <= 255 and not set(shard) & set("/\\:")
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: shard name {shown(shard)} is not a .safetensors file name; do not use it"
            )
        return self.directory / shard

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> TensorInfo:
        return self._files[name].tensors[name]

    def file(self, name: str) -> SafetensorsFile:
        return self._files[name]

    def bytes_by_dtype(self) -> dict[str, int]:
        """Stored bytes by dtype name (`BF16`, `F8_E4M3`, ...), largest first."""
        totals: dict[str, int] = {}
        for name in self.names:
            info = self[name]
            totals[info.dtype_name] = totals.get(info.dtype_name, 0) + info.num_bytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _weight_map(path: Path) -> dict[str, str]:
    index = read_json(path, limit=MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map object; download it again")
    wrong = next((name for name, shard in weight_map.items() if not isinstance(shard, str)), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: weight_map has no file name for {shown(wrong)}; download it again")
    return weight_map
