import errno
import gc
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.calibrate import activation_store
from bitmend.calibrate.activation_store import ActivationStore
from bitmend.errors import OutputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    with ActivationStore(None if request.param == "memory" else tmp_path / "acts") as opened:
        assert opened.where == request.param
        yield opened


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5), (1,), (), (0, 4)], ids=str)
def test_every_bit_comes_back(store, dtype, shape):
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = raw.view(dtype).squeeze(-1)
    store.append(tensor)
    assert store[0].shape == tensor.shape
    assert store[0].dtype == dtype
    assert torch.equal(bits(store[0]), bits(tensor))
    assert store.nbytes == tensor.nbytes


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-9, 9)), max_size=9))
def test_memory_and_disk_behave_alike(tmp_path_factory, changes):
    with ActivationStore() as memory, ActivationStore(tmp_path_factory.mktemp("acts")) as disk:
        for index, value in changes:
            for one in (memory, disk):
                if index < len(one):
                    one.replace_(index, torch.full((index + 1,), value))
                else:
                    one.append(torch.full((2, 2), value))
        assert [tensor.tolist() for tensor in memory] == [tensor.tolist() for tensor in disk]
        assert len(memory) == len(disk)
        assert memory.nbytes == disk.nbytes


def test_it_can_be_read_twice(store):
    for value in range(3):
        store.append(torch.full((1, 2, 2), float(value)))
    assert [float(tensor[0, 0, 0]) for tensor in store] == [0, 1, 2]
    assert [float(tensor[0, 0, 0]) for tensor in store] == [0, 1, 2]
    assert float(store[-1][0, 0, 0]) == 2
    with pytest.raises(IndexError):
        store[3]
    with pytest.raises(IndexError):
        store.replace_(3, torch.zeros(1))


def test_it_keeps_copies(store):
    tensor = torch.ones(2, 2).T[:1]
    store.append(tensor)
    tensor.zero_()
    assert store[0].tolist() == [[1, 1]]
    assert store[0].untyped_storage().nbytes() == 8


def test_a_tensor_handed_out_survives_its_replacement(store):
    store.append(torch.ones(4))
    old = store[0]
    store.replace_(0, torch.zeros(2, dtype=torch.bfloat16))
    assert old.tolist() == [1, 1, 1, 1]
    assert store[0].tolist() == [0, 0]
    assert store.nbytes == 4


def test_writing_to_a_tensor_from_disk_does_not_change_the_store(tmp_path):
    with ActivationStore(tmp_path) as store:
        store.append(torch.ones(4))
        store[0].zero_()
        assert store[0].tolist() == [1, 1, 1, 1]


def test_closing_deletes_only_its_own_files(tmp_path):
    (tmp_path / "mine").touch()
    first, second = ActivationStore(tmp_path), ActivationStore(tmp_path)
    first.append(torch.ones(4))
    second.append(torch.zeros(4))
    first.close()
    first.close()
    assert second[0].tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="closed"):
        first.append(torch.ones(1))
    second.close()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_forgotten_store_cleans_up(tmp_path):
    store = ActivationStore(tmp_path)
    store.append(torch.ones(4))
    del store
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def mapped_files(folder):
    """(resident bytes, of these anonymous) of each mapping of a file in `folder`."""
    found, current = [], {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if "-" in key:
            current = {}
            if str(folder) in line:
                found.append(current)
        else:
            current[key] = values
    return [(int(one["Rss:"][0]) * 1024, int(one["Anonymous:"][0]) * 1024) for one in found]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's account of the process")
def test_on_disk_the_data_take_no_memory_of_the_process(tmp_path):
    size = 2**20
    with ActivationStore(tmp_path) as store:
        for value in range(4):
            tensor = torch.full((size,), value, dtype=torch.uint8)
            given_in = weakref.ref(tensor)
            store.append(tensor)
            del tensor
            assert given_in() is None
        assert mapped_files(tmp_path) == []
        kept = list(store)
        assert [int(one.max()) for one in kept] == [0, 1, 2, 3]  # every page was read
        assert mapped_files(tmp_path) == [(size, 0)] * 4


def test_a_full_disk_is_told_and_keeps_the_old_tensor(tmp_path, monkeypatch):
    class FullDisk:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with ActivationStore(tmp_path) as store:
        store.append(torch.ones(4))
        monkeypatch.setattr(activation_store.Path, "open", lambda *_: FullDisk())
        sentence = r"16 more bytes are required in .*, but writing failed \(No space left on device\); free some space"
        with pytest.raises(OutputError, match=sentence):
            store.replace_(0, torch.zeros(4))
        with pytest.raises(OutputError, match=sentence):
            store.append(torch.zeros(4))
        monkeypatch.undo()
        assert len(store) == 1
        assert store[0].tolist() == [1, 1, 1, 1]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"a folder that can be written is required, but .*file"):
        ActivationStore(tmp_path / "file" / "acts")
