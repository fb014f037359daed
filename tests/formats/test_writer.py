import errno
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitmend.errors import CheckpointError, OutputError, RequestError
from bitmend.formats.load import load
from bitmend.formats.safetensors_file import read_header, sha256_of
from bitmend.formats.writer import CheckpointWriter

CONFIG = {"quant_method": "bitmend", "format_version": 1, "schemes": [], "modules": {}, "tied": {}, "provenance": {}}


@pytest.fixture
def source(tmp_path):
    """A model folder with everything that may lie in one, and no readable weight."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "old"}}')
    for name in ("tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja", "generation_config.json",
                 "preprocessor_config.json", "modeling_custom.py", "LICENSE"):  # fmt: skip
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    for name in ("model.safetensors", "pytorch_model.bin", "consolidated.pth", "notes.txt", "optimizer.pt"):
        (folder / name).write_text("weights")
    return folder


def write(source, output, overwrite=False, shard_bytes=None, **finish):
    with CheckpointWriter(source, output, overwrite) as writer:
        if shard_bytes:
            writer._max_shard_bytes = shard_bytes
        for number in range(4):
            writer.add(f"block {number}", {f"b{number}.w": torch.full((10,), number), f"b{number}.s": torch.ones(3)})
        return writer.finish(
            finish.pop("quantization_config", {**CONFIG, "files": {}}), {"run.json": {"a": 1}}, **finish
        )


def test_a_folder_is_complete(source, tmp_path):
    output = write(source, tmp_path / "out", config_changes={"dtype": "bfloat16"})
    assert {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()} == {
        "config.json", "model.safetensors", "ledger.json", "run.json", "tokenizer.json", "merges.txt", "spiece.model",
        "chat_template.jinja", "generation_config.json", "preprocessor_config.json", "modeling_custom.py", "LICENSE",
        "additional_chat_templates/tool.jinja",
    }  # fmt: skip
    config = json.loads((output / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
    assert config["quantization_config"]["files"] == {"model.safetensors": sha256_of(output / "model.safetensors")}
    tensors = load_file(output / "model.safetensors")
    assert all(torch.equal(tensors[f"b{n}.w"], torch.full((10,), n)) for n in range(4))
    assert read_header(output / "model.safetensors").metadata == {"format": "pt"}
    assert not (tmp_path / "out.partial").exists()
    assert json.loads((output / "run.json").read_text()) == {"a": 1}


def test_shards_and_index(source, tmp_path):
    output = write(source, tmp_path / "out", shard_bytes=200)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in output.glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["metadata"]["total_size"] == 4 * (80 + 12)
    for name in names:
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == set(load_file(output / name))
    files = json.loads((output / "config.json").read_text())["quantization_config"]["files"]
    assert files == {name: sha256_of(output / name) for name in names}


def test_a_tensor_above_the_limit_gets_its_own_shard(source, tmp_path):
    output = write(source, tmp_path / "out", shard_bytes=1)
    assert len(list(output.glob("*.safetensors"))) == 8


def test_without_a_quantization_config_that_of_the_source_goes(source, tmp_path):
    output = write(source, tmp_path / "out", quantization_config=None)
    assert "quantization_config" not in json.loads((output / "config.json").read_text())


def test_links_in_the_source_become_files(source, tmp_path):
    (tmp_path / "blob").write_text("blob")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    copied = write(source, tmp_path / "out") / "tokenizer.json"
    assert copied.read_text() == "blob"
    assert not copied.is_symlink()


def test_config_is_written_last_and_nothing_loads_before(source, tmp_path):
    seen = []

    def check(folder: Path) -> None:
        seen.append((folder.name, (folder / "config.json").is_file(), (tmp_path / "out").exists()))

    write(source, tmp_path / "out", check=check)
    assert seen == [("model", True, False)]
    with CheckpointWriter(source, tmp_path / "other") as writer:
        writer.add("block", {"w": torch.ones(2)})
        for folder in ("other.partial", "other.partial/parts"):
            with pytest.raises(CheckpointError, match=r"no finished model folder: it has no config\.json"):
                load(tmp_path / folder)
        writer.abort()


# ---------------------------------------------------------------------------------------------- requests
def test_an_existing_output_is_refused(source, tmp_path):
    write(source, tmp_path / "out")
    with pytest.raises(RequestError, match=r"out exists; choose another output, or pass --overwrite to replace it"):
        CheckpointWriter(source, tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(RequestError, match=r"new\.partial exists, left by a stopped run .*--overwrite"):
        CheckpointWriter(source, tmp_path / "new")


def test_overwriting_replaces_the_output_only_at_the_end(source, tmp_path):
    output = write(source, tmp_path / "out")
    (output / "mark").write_text("old")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "abandoned").write_text("")
    write(source, output, overwrite=True, check=lambda folder: (output / "mark").read_text())
    assert not (output / "mark").exists()
    assert not (output / "abandoned").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_failed_overwrite_leaves_the_old_output(source, tmp_path):
    output = write(source, tmp_path / "out")

    def fail(folder):
        raise RequestError("no")

    with pytest.raises(RequestError, match="no"):
        write(source, output, overwrite=True, check=fail)
    assert (output / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_failed_rename_puts_the_old_output_back(source, tmp_path, monkeypatch):
    output = write(source, tmp_path / "out")
    (output / "mark").write_text("old")
    replace = Path.replace

    def fail(self, target):
        if self.name == "model":
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match=r"writing .*out failed: Input/output error"):
        write(source, output, overwrite=True)
    assert (output / "mark").read_text() == "old"


def test_a_folder_that_holds_no_model_is_never_replaced(source, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(RequestError, match="is not empty and holds no model, so it is not replaced"):
        CheckpointWriter(source, tmp_path / "home", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert write(source, tmp_path / "empty", overwrite=True).is_dir()


@pytest.mark.parametrize("place", [".", "inner", "..", "../source.partial/../source"])
def test_an_output_inside_the_source_is_refused(source, place):
    with pytest.raises(RequestError, match="must lie outside the model folder"):
        CheckpointWriter(source, source / place, overwrite=True)


def test_a_source_that_is_the_partial_folder_is_refused(source, tmp_path):
    moved = source.rename(tmp_path / "out.partial")
    with pytest.raises(RequestError, match="must lie outside the model folder"):
        CheckpointWriter(moved, tmp_path / "out", overwrite=True)
    assert (moved / "config.json").is_file()


def test_other_impossible_requests(source, tmp_path):
    with pytest.raises(RequestError, match=r"the model folder .*none has no config\.json"):
        CheckpointWriter(tmp_path / "none", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file; choose another name"):
        CheckpointWriter(source, tmp_path / "file", overwrite=True)
    with pytest.raises(RequestError, match="cannot be made: Not a directory; choose another"):
        CheckpointWriter(source, tmp_path / "file" / "out")


def test_a_read_only_parent_is_refused(source, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # the superuser, who runs tests in containers, may write anywhere
    with pytest.raises(RequestError, match="cannot be made: Permission denied; choose another"):
        CheckpointWriter(source, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- failures
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk of .*out is full; free some space and run again"),
        (errno.EIO, "writing .*out failed: I/O"),
    ],
)
@pytest.mark.parametrize("function", ["write_record", "write_hashed"])
def test_a_full_disk_ends_the_run_and_leaves_nothing(source, tmp_path, monkeypatch, number, message, function):
    def fail(*args, **kwargs):
        raise OSError(number, "I/O")

    monkeypatch.setattr(f"bitmend.formats.writer.{function}", fail)
    with pytest.raises(OutputError, match=message) as caught:
        write(source, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.slow
def test_a_really_full_disk(source, tmp_path):
    """The kernel refuses to write more than 4 kB to a file, as on a full disk, while a part is written."""
    script = f"""
        import resource, signal, sys, torch
        from pathlib import Path
        from bitmend.errors import OutputError
        from bitmend.formats.writer import CheckpointWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            CheckpointWriter(Path({str(source)!r}), Path({str(tmp_path / "out")!r})).add("b", {{"w": torch.ones(5000)}})
        except OutputError as error:
            sys.exit(str(error))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_error_of_the_run_removes_the_partial_folder(source, tmp_path):
    def run():
        with CheckpointWriter(source, tmp_path / "out") as writer:
            writer.add("block", {"w": torch.ones(2)})
            raise KeyError("elsewhere")

    with pytest.raises(KeyError):
        run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_tensor_cannot_be_written_twice(source, tmp_path):
    with CheckpointWriter(source, tmp_path / "out") as writer:
        writer.add("a", {"w": torch.ones(2)})
        with pytest.raises(ValueError, match="part 'b' repeats the tensor 'w'"):
            writer.add("b", {"w": torch.ones(2)})
        writer.abort()


def test_an_empty_checkpoint_is_refused(source, tmp_path):
    with (
        pytest.raises(CheckpointError, match="no part was added"),
        CheckpointWriter(source, tmp_path / "out") as writer,
    ):
        writer.finish(None, {})
    assert not (tmp_path / "out.partial").exists()


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the writer handles it."""


def nothing_is_left(source, output):
    assert not output.exists()
    with pytest.raises(CheckpointError, match="there is no model folder"):
        load(output)
    assert list(output.with_name("out.partial").iterdir())
    with pytest.raises(RequestError, match="--overwrite"):
        CheckpointWriter(source, output)
    write(source, output, overwrite=True)


@pytest.mark.parametrize(
    "moment", ["write_record", "write_hashed", "header_text", "read_header", "ledger_of", "sync", "parse_json"]
)
def test_a_killed_write_leaves_nothing_that_loads(source, tmp_path, monkeypatch, moment):
    def kill(*args, **kwargs):
        raise Killed

    def run():
        writer = CheckpointWriter(source, tmp_path / "out")
        writer.add("block", {"w": torch.ones(2)})
        writer.finish(None, {"run.json": {}})

    with monkeypatch.context() as patch:
        patch.setattr(f"bitmend.formats.writer.{moment}", kill)
        with pytest.raises(Killed):
            run()
    nothing_is_left(source, tmp_path / "out")


@pytest.mark.slow
def test_a_really_killed_write(source, tmp_path):
    script = f"""
        import os, signal, torch
        from pathlib import Path
        from bitmend.formats.writer import CheckpointWriter
        writer = CheckpointWriter(Path({str(source)!r}), Path({str(tmp_path / "out")!r}))
        writer.add("block", {{"w": torch.ones(2)}})
        writer.finish(None, {{}}, check=lambda folder: os.kill(os.getpid(), signal.SIGKILL))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    nothing_is_left(source, tmp_path / "out")


def test_memory_of_assembling_is_bounded(source, tmp_path, monkeypatch):
    """The bytes of 40 MB of tensors pass in pieces of at most 4 MB."""
    sizes = []
    from bitmend.formats import writer as module

    copy = module.copy_chunks

    def measured(*args):
        for chunk in copy(*args):
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(module, "copy_chunks", measured)
    with CheckpointWriter(source, tmp_path / "out") as writer:
        writer.add("block", {"w": torch.zeros(10_000_000)})
        writer.finish(None, {})
    assert sum(sizes) == 40_000_000
    assert max(sizes) <= 4 << 20
