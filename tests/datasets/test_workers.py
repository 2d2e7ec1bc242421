"""Worker processes give what this process would give, end when they should, and say what is broken."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.datasets.file_set import FileSet
from vitrail.datasets.items import FileItems
from vitrail.datasets.loading import BatchReader, batches
from vitrail.datasets.transforms import BrokenImageError

N, SIZE = 22, (16, 20)


def make(folder: Path, kind: type[FileItems] = FileItems) -> FileSet:
    """Noise, so that no two crops are alike; the label is the number of the image."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{k:02}.jpg" for k in range(N)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    items = kind(paths, range(N), classes=tuple(map(str, range(N))), name="noise", split="train")
    return FileSet.from_items(items, img_size=SIZE, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def images(tmp_path: Path) -> FileSet:
    return make(tmp_path)


def read(found) -> list[tuple[bytes, list[int]]]:
    return [(pixels.numpy().tobytes(), labels.tolist()) for pixels, labels in found]


def wait_until_gone(pids: list[int], seconds: float = 30.0) -> bool:
    """Whether processes end within some time; a zombie has not ended, somebody forgot it."""
    deadline = time.monotonic() + seconds
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


class TestSameBatches:
    @pytest.mark.parametrize("resized_crop", [None, 0.2])
    def test_with_and_without_workers_and_from_any_batch(self, images, resized_crop) -> None:
        options = {"seed": 3, "resized_crop": resized_crop}
        epochs = [read(batches(images, 4, epoch=epoch, **options)) for epoch in (0, 1)]
        assert len(epochs[0]) == 5
        assert epochs[0] != epochs[1]
        reader = BatchReader(images, 4, workers=2, **options)
        assert [read(reader.epoch(epoch)) for epoch in (0, 1)] == epochs
        assert read(reader.epoch(0, start=3)) == epochs[0][3:]
        assert read(reader.epoch(1, start=5)) == []
        # An epoch left early leaves nothing of it behind.
        next(reader.epoch(0))
        assert read(reader.epoch(1)) == epochs[1]

    def test_of_the_last_short_batch_and_in_order(self, images) -> None:
        options = {"seed": 0, "epoch": 0, "shuffle": False, "drop_last": False}
        found = read(batches(images, 5, workers=2, **options))
        assert found == read(batches(images, 5, **options))
        assert [labels for _, labels in found] == [[*range(k, min(k + 5, N))] for k in range(0, N, 5)]

    def test_a_crop_depends_on_the_place_alone(self, images) -> None:
        options = {"seed": 0, "epoch": 0, "resized_crop": 0.3}
        whole = torch.cat([pixels for pixels, _ in batches(images, 4, **options)])
        other = torch.cat([pixels for pixels, _ in batches(images, 10, **options)])
        assert torch.equal(whole[:20], other)
        shares = [
            [pixels for pixels, _ in batches(images, 4, shard=(rank, 2), **options)] for rank in range(2)
        ]
        joined = torch.cat([part for pair in zip(*shares, strict=True) for part in pair])
        assert torch.equal(joined, whole)

    def test_two_epochs_crop_an_image_differently(self, images) -> None:
        def crops(epoch: int) -> dict[int, bytes]:
            found = batches(images, 22, seed=0, epoch=epoch, resized_crop=0.3)
            return {
                int(label): pixels.numpy().tobytes()
                for batch, labels in found
                for pixels, label in zip(batch, labels, strict=True)
            }

        first, second = crops(0), crops(1)
        assert first.keys() == second.keys() == set(range(N))
        assert all(first[k] != second[k] for k in range(N))

    def test_the_random_state_is_left_alone(self, images) -> None:
        torch.manual_seed(7)
        before = torch.get_rng_state()
        reader = BatchReader(images, 11, seed=0, workers=1)
        for epoch in range(2):
            read(reader.epoch(epoch))
        assert torch.equal(torch.get_rng_state(), before)


class TestProcesses:
    def test_stay_over_epochs_and_end_with_the_reader(self, images) -> None:
        before = set(children())
        reader = BatchReader(images, 4, seed=0, workers=2)
        assert set(children()) == before
        read(reader.epoch(0))
        own = set(children()) - before
        assert len(own) == 2
        read(reader.epoch(1))
        assert set(children()) - before == own
        del reader
        gc.collect()
        assert wait_until_gone([*own])

    def test_end_when_an_epoch_is_dropped(self, images) -> None:
        before = set(children())
        found = batches(images, 4, seed=0, epoch=0, workers=2)
        next(found)
        own = set(children()) - before
        assert len(own) == 2
        del found
        gc.collect()
        assert wait_until_gone([*own])

    def test_end_at_once_when_the_reader_was_in_a_reference_cycle(self, images) -> None:
        before = set(children())
        found = batches(images, 4, seed=0, epoch=0, workers=2)
        next(found)
        own = set(children()) - before
        began = time.monotonic()
        cycle = [found]
        cycle.append(cycle)
        del found, cycle
        gc.collect()
        assert wait_until_gone([*own])
        # The garbage collector would first close the pipes, and the join would wait five seconds a worker.
        assert time.monotonic() - began < 5.0

    def test_read_in_a_thread(self, images) -> None:
        found: list[object] = []
        reader = BatchReader(images, 4, seed=0, workers=1)
        thread = threading.Thread(target=lambda: found.extend(read(reader.epoch(0))))
        thread.start()
        thread.join()
        assert found == read(batches(images, 4, seed=0, epoch=0))

    # A run that stops while its workers still have batches to give.
    SCRIPT = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_workers import make
from vitrail.datasets.loading import BatchReader

if __name__ == "__main__":
    reader = BatchReader(make(Path({folder!r})), 4, seed=0, workers=2)
    found = reader.epoch(0)
    next(found)
    import multiprocessing
    try:
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        while True:
            time.sleep(0.05)
    except KeyboardInterrupt:
        # Only this process was interrupted: the batches go on, until it ends in the midst of them.
        print(*(len(next(found)[0]) for _ in range(2)), flush=True)
"""

    @pytest.mark.parametrize(
        ("number", "code", "printed"), [(signal.SIGINT, 0, "4 4\n"), (signal.SIGKILL, -signal.SIGKILL, "")]
    )
    def test_end_with_this_process_and_without_a_word(self, tmp_path, number, code, printed) -> None:
        script = tmp_path / "run.py"
        script.write_text(self.SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
        run = subprocess.Popen(
            [sys.executable, script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # What was started in the background may ignore Ctrl-C, and its children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert run.stdout is not None
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(pids) == 2
        if number == signal.SIGINT:
            os.killpg(run.pid, number)  # as a terminal does it
        else:
            run.send_signal(number)
        assert run.communicate(timeout=60) == (printed, "")
        assert run.returncode == code
        assert wait_until_gone(pids)


class Deadly(FileItems):
    """A source whose reading ends the process, as the kernel does where memory is short."""

    def _read(self, row: int) -> bytes:
        if row == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._read(row)


class TestErrors:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_broken_file_is_named_in_one_line_when_its_batch_is_due(
        self, images, tmp_path, workers
    ) -> None:
        (tmp_path / "09.jpg").write_bytes(b"nothing")
        found = batches(images, 4, seed=0, epoch=0, shuffle=False, workers=workers)
        assert [next(found)[1].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        with pytest.raises(BrokenImageError) as caught:
            next(found)
        assert str(caught.value) == f"{tmp_path}/09.jpg: expected an image, got a file of another kind"

    def test_the_reader_goes_on_after_a_broken_file(self, images, tmp_path) -> None:
        whole = (tmp_path / "09.jpg").read_bytes()
        (tmp_path / "09.jpg").write_bytes(b"nothing")
        reader = BatchReader(images, 11, seed=0, workers=1)
        with pytest.raises(BrokenImageError):
            read(reader.epoch(0))
        (tmp_path / "09.jpg").write_bytes(whole)
        assert read(reader.epoch(0)) == read(batches(images, 11, seed=0, epoch=0))

    def test_a_killed_worker_is_told_in_one_line(self, tmp_path) -> None:
        found = batches(make(tmp_path, Deadly), 4, seed=0, epoch=0, shuffle=False, workers=1)
        with pytest.raises(ValueError, match="a worker process that decodes images ended") as caught:
            read(found)
        assert "\n" not in str(caught.value)
        assert "take fewer workers or a smaller batch" in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"workers": -1}, "workers: expected at least 0, got -1"),
            ({"resized_crop": 0.0}, "resized_crop: expected above 0 to 1, got 0.0"),
            ({"resized_crop": 1.5}, "resized_crop: expected above 0 to 1, got 1.5"),
        ],
    )
    def test_options_out_of_range(self, images, options, message) -> None:
        with pytest.raises(ValueError, match=message):
            BatchReader(images, 4, seed=0, **options)
