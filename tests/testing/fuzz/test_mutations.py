import random
import shutil

import pytest

from bitmend.testing.fuzz.mutations import MUTATIONS, places, split, spoil_value


def state(folder):
    return {
        str(path.relative_to(folder)): (
            path.is_symlink(),
            path.read_bytes() if path.is_file() else path.lstat().st_mode,
        )
        for path in sorted(folder.rglob("*"))
        if not path.is_symlink()
    }


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_changes_a_folder_and_can_be_made_again(place, tmp_path, name):
    changed = 0
    for kind in ("native-sharded", "compressed-tensors", "stopped"):
        for seed in range(6):
            folders = [tmp_path / f"{kind}-{seed}-{number}" / "folder" for number in range(2)]
            for folder in folders:
                folder.parent.mkdir()
                shutil.copytree(place / "folders" / kind, folder)
            before = state(folders[0])
            done = [MUTATIONS[name].change(folder, random.Random(seed)) for folder in folders]
            assert done[0] == done[1]
            if name not in ("index_outside", "linked_folder"):  # they name the folder's own place
                assert state(folders[0]) == state(folders[1])
            changed += done[0] and state(folders[0]) != before
    assert changed > 0


def test_nothing_outside_of_the_parent_is_touched(place, tmp_path):
    for number, mutation in enumerate(MUTATIONS.values()):
        parent = tmp_path / str(number)
        parent.mkdir()
        shutil.copytree(place / "folders" / "native-sharded", parent / "folder")
        mutation.change(parent / "folder", random.Random(number))
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(len(MUTATIONS))}
    inside = {path.name for parent in tmp_path.iterdir() for path in parent.iterdir()}
    assert inside <= {"folder", "outside"}


def test_places_of_a_json_value():
    assert list(places({"a": [1, {"b": 2}]})) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
    assert spoil_value({}, random.Random(0)) is None
    assert spoil_value({"a": {"b": 1}, "c": 2}, random.Random(0), ["c"]) != {"a": {"b": 1}, "c": 2}


@pytest.mark.parametrize("data", [b"", b"123", b"\xff" * 8 + b"{}", b"\x02" + bytes(7) + b"[]"])
def test_what_is_no_file_cannot_be_split(data):
    with pytest.raises(ValueError, match=r"no header|no table"):
        split(data)
