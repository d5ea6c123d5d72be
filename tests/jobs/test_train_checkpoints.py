"""Checkpoints of a training: which are kept, which count, damage by name; and the flags that it began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.train.checkpoints import Checkpoints, Position, require_same_flags
from pipeline.epoch import LoaderState
from pipeline.errors import MismatchError, StoreError
from pipeline.storage import LocalStorage


class TestWhatIsKept:
    def commit(self, checkpoints: Checkpoints, step: int, score: float | None) -> None:
        tensors = {"model.weight": torch.full((3,), float(step)), "step": torch.tensor(step)}
        checkpoints.commit(Position(step, LoaderState(step), float(step), score), tensors)

    def test_last_best_and_every_nth(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(LocalStorage(tmp_path), keep_every=4)
        kept = []
        for step, score in enumerate((None, 5.0, 1.0, 3.0, 1.0, None, 0.5), start=1):
            self.commit(checkpoints, step, score)
            kept.append(sorted(checkpoints.scores))
        assert kept == [[1], [2], [3], [3, 4], [3, 4, 5], [3, 4, 6], [4, 7]]
        assert sorted(Checkpoints(LocalStorage(tmp_path)).scores) == [4, 7]
        assert not list(tmp_path.glob("checkpoints/00000003/*"))

    def test_large_ones_lie_in_several_parts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("jobs.train.checkpoints._PART_BYTES", 100)
        tensors = {f"model.{number}": torch.full((15,), float(number)) for number in range(4)}
        checkpoints = Checkpoints(LocalStorage(tmp_path))
        checkpoints.commit(Position(1, LoaderState(1), 1.0, None), tensors)
        parts = [path.name for path in sorted(tmp_path.glob("checkpoints/00000001/*.safetensors"))]
        assert parts == [f"model{part}.safetensors" for part in ("-1", "-2", "-3", "")]
        found = checkpoints.load(1)[1]
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)

    def test_one_without_its_document_is_none(self, tmp_path: Path) -> None:
        storage = LocalStorage(tmp_path)
        checkpoints = Checkpoints(storage)
        self.commit(checkpoints, 3, None)
        storage.put("checkpoints/00000006/model.safetensors", b"half")
        checkpoints = Checkpoints(storage)
        assert checkpoints.last_step == 3
        position, tensors = checkpoints.load(3)
        assert (position.loader.step, position.seconds) == (3, 3.0)
        assert torch.equal(tensors["model.weight"], torch.full((3,), 3.0))
        self.commit(checkpoints, 9, None)
        assert storage.list("checkpoints/00000006/") == []

    @pytest.mark.parametrize("damage", [b"", None])
    def test_damage_is_named(self, damage: bytes | None, tmp_path: Path) -> None:
        storage = LocalStorage(tmp_path)
        self.commit(Checkpoints(storage), 3, None)
        part = tmp_path / "checkpoints/00000003/model.safetensors"
        part.unlink() if damage is None else part.write_bytes(damage)
        with pytest.raises(StoreError, match=r"00000003/model\.safetensors is missing or damaged: remove"):
            Checkpoints(storage).load(3)


def test_other_flags_are_refused_by_name(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    flags = {"--learning-rate": 1e-3, "--initial": None, "--frames": (1, 5)}
    for _ in range(2):
        require_same_flags(storage, flags)
    with pytest.raises(
        MismatchError, match=r"--learning-rate: it began with 0\.001, this command asks for 0\.002"
    ) as e:
        require_same_flags(storage, {**flags, "--learning-rate": 2e-3})
    assert "--frames" not in str(e.value)
