"""What the machine has left, read from folders that a test has written."""

import torch

from bitmend.pipeline import machine

DEEP = "0::/outer/inner\n"


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def pretend(monkeypatch, tmp_path, *, available=8_000_000, groups=DEEP):
    """A /proc and a /sys/fs/cgroup of our own."""
    proc, groups_folder = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo=f"MemTotal:       16000000 kB\nMemAvailable:    {available} kB")
    write(proc / "self", cgroup=groups, status="RssAnon:\t    1024 kB\nRssFile:\t   2048 kB")
    monkeypatch.setattr(machine, "PROC", proc)
    monkeypatch.setattr(machine, "CGROUPS", groups_folder)
    return groups_folder


def test_without_a_limit_the_machine_counts(monkeypatch, tmp_path):
    groups = pretend(monkeypatch, tmp_path)
    write(groups / "outer" / "inner", memory__max="max", memory__current="5")
    assert machine.available_memory() == 8_000_000 * 1024
    assert machine.anonymous_bytes() == 2**20
    assert machine.mapped_bytes() == 2**21


def test_the_smallest_limit_around_the_process_counts_and_cached_files_do_not(monkeypatch, tmp_path):
    groups = pretend(monkeypatch, tmp_path)
    write(groups / "outer" / "inner", memory__max="9000", memory__current="1000")
    write(groups / "outer", memory__max="5000", memory__current="4000", memory__stat="anon 9\ninactive_file 500")
    assert machine.available_memory() == 1500


def test_groups_of_version_one(monkeypatch, tmp_path):
    groups = pretend(monkeypatch, tmp_path, groups="5:cpu:/x\n4:memory:/gone/in/here\n")
    write(groups / "memory", memory__limit_in_bytes="7000", memory__usage_in_bytes="3000")
    assert machine.available_memory() == 4000
    write(groups / "memory", memory__limit_in_bytes=str(2**63 - 4096))
    assert machine.available_memory() == 8_000_000 * 1024


def test_a_group_that_is_over_its_limit_has_nothing_left(monkeypatch, tmp_path):
    groups = pretend(monkeypatch, tmp_path, groups="0::/\n")
    write(groups, memory__max="10", memory__current="20")
    assert machine.available_memory() == 0


def test_a_system_without_proc_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PROC", tmp_path / "none")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "none")
    monkeypatch.setattr(machine, "_malloc_trim", lambda: None)
    assert machine.available_memory() is None
    assert machine.anonymous_bytes() is None
    assert machine.mapped_bytes() is None
    machine.return_free_memory()


def test_disk_is_that_of_the_nearest_folder_that_exists(tmp_path):
    free = machine.free_disk(tmp_path / "not" / "yet" / "there")
    assert free is not None
    assert free > 0


def test_a_cpu_has_no_device_memory():
    assert machine.available_device_memory(torch.device("cpu")) is None


def test_peak_is_in_bytes():
    assert 20e6 < machine.peak_memory_bytes() < 1e12


def test_freed_memory_goes_back():
    # Below the 32 MB from which glibc gives memory back by itself; every other piece keeps the heap from shrinking.
    before = machine.anonymous_bytes()
    pieces = [torch.ones(2**18) for _ in range(200)]
    del pieces[::2]
    machine.return_free_memory()
    after = machine.anonymous_bytes()
    assert len(pieces) == 100
    if before is not None and machine._malloc_trim() is not None:
        assert after - before < 130 * 2**20
