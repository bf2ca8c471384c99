from __future__ import annotations

import pytest

from emu_lightning.data.folder import Folder, FolderData
from emu_lightning.data.held_out import is_held_out
from tests.data.test_folder import make


def test_hold_out_is_a_stable_share():
    uids = [f"{i}.jpg" for i in range(4000)]
    held = {uid for uid in uids if is_held_out(uid, 0.1)}
    assert 330 < len(held) < 470
    assert held < {uid for uid in uids if is_held_out(uid, 0.2)}
    assert not any(is_held_out(uid, 0.0) for uid in uids)


def test_the_parts_are_disjoint_and_complete(tmp_path):
    make(tmp_path, **{f"p{i}": f"picture {i}" for i in range(20)})
    data = FolderData(str(tmp_path), val_fraction=0.3, resolution=8, batch_size=4, num_workers=0)
    train, val = data.train_source().uids(), data.val_source().uids()
    assert val and sorted(train + val) == Folder(tmp_path).uids()
    assert FolderData(str(tmp_path), val_fraction=0.0).val_source() is None
    with pytest.raises(ValueError, match="val_fraction"):
        FolderData(str(tmp_path), val_fraction=1.0)
