"""The state of a run on disk: all that an exact resume needs, whole at any moment, never executed.

`state/TAG/` contains DeepSpeed's part (trained weights, optimizer, schedule, random numbers of each
process) and `record.json`; `state/latest` names the TAG that is whole. Frozen weights are not in
it, only their checksum; they are read again from their source.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import BaseFileLock, FileLock, Timeout

from zeroi2v.files import write_whole
from zeroi2v.processes import first_alone, gather, together
from zeroi2v.train.engine import checksum, trained_weights


def save_state(engine: Any, folder: Path, record: dict[str, Any]) -> None:
    """Saves all that the run needs to resume, then removes the state before it.

    DeepSpeed's part goes to `folder/TAG` and `record`, which must contain `step` and `validated`,
    beside it; only then does `folder/latest` name TAG, so a kill at any time leaves a whole state.
    Raises OSError if the disk can't take it, in every process; the state before it stays.
    """
    tag = f"step_{record['step']:08d}_validated_{record['validated']:08d}"
    target, random_states = folder / tag, gather(_random_state())
    files = StateFiles()
    engine.checkpoint_engine = files

    def clear() -> None:
        """Removes what a killed run left."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)

    def finish() -> None:
        write_whole(target / "record.json", json.dumps(record, indent=1) + "\n")
        for file in target.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        write_whole(folder / "latest", tag + "\n")
        for old in folder.glob("step_*"):
            if old != target:
                shutil.rmtree(old)

    try:
        first_alone(clear)
        engine.save_checkpoint(
            str(folder),
            tag=tag,
            client_state={"random": random_states},
            save_latest=False,  # it would be written before the other processes are done
            exclude_frozen_parameters=True,
        )
        together(files.check)
        first_alone(finish)
    except (OSError, SystemExit):
        if dist.get_rank() == 0 and read_tag(folder) != tag:
            shutil.rmtree(target, ignore_errors=True)  # its space may be what is lacking
        raise


def read_tag(folder: Path) -> str | None:
    """Name of the whole state in `folder`, if there is one."""
    try:
        return (folder / "latest").read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_record(folder: Path) -> dict[str, Any]:
    """The `record` of the newest state in `folder`. Raises ValueError if there is none."""
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
        return json.loads((folder / tag / "record.json").read_text(encoding="utf-8")) | {"tag": tag}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"run.resume needs a saved state: no {error.filename}; remove the folder to start again"
        ) from None


def load_state(engine: Any, folder: Path, record: dict[str, Any]) -> None:
    """Puts the engine and this process's random numbers where `save_state` left them.

    Raises ValueError if the weights are not the saved ones, or a file is damaged.
    """
    engine.checkpoint_engine = StateFiles()
    path, client = engine.load_checkpoint(
        str(folder),
        tag=record["tag"],
        load_module_strict=False,  # frozen weights are not in it
    )
    if path is None or checksum(trained_weights(engine)) != record["trained"]:
        raise ValueError(f"state must contain the weights it was saved with: got {folder}")
    state = client["random"][dist.get_rank()]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


class StateFiles:
    """How DeepSpeed reads and writes its files here; it sees a `CheckpointEngine`.

    An error of writing is kept until `check`, since the other processes wait in the meantime.
    Reading executes nothing: only tensors, plain values and a few classes of DeepSpeed are allowed.
    """

    def __init__(self):
        self._error: str | None = None

    def check(self) -> None:
        """Raises OSError if a file could not be written."""
        if self._error is not None:
            raise OSError(self._error)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            with open(path, "wb") as handle:
                torch.save(_without_enums(state_dict), handle)
        except OSError as error:
            self._error = f"{path} can't be written ({error.strerror})"
        except RuntimeError as error:  # torch's own, of the same cause
            self._error = f"{path} can't be written ({str(error).splitlines()[0]})"

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.utils.tensor_fragment import fragment_address

        allowed = [DynamicLossScaler, LossScaler, fragment_address]
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged file makes torch raise nearly anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"state file can't be read: {path} ({reason})") from None

    def create(self, info: Any) -> None:
        """Nothing is to be done before files are written."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, rank: int) -> bool:
        return rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True


def lock_folder(folder: Path, patience: float = 20.0) -> BaseFileLock:
    """Takes `folder` for this process, as long as the lock is not released and the process lives.

    Waits `patience` seconds for the rest of a killed run to end. Raises OSError if another run is
    writing there.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=patience, poll_interval=0.5)
    except Timeout:
        raise OSError(f"run.dir must be free: another run is writing to {folder}") from None
    except NotImplementedError:  # a file system without locks
        pass
    return lock


def clear_leftovers(folder: Path) -> None:
    """Removes from run folder `folder` what a killed run was writing; what is whole stays."""
    tag = read_tag(folder / "state")
    for path in (*folder.glob(".last-*"), *folder.glob(".best-*"), *folder.glob("state/step_*")):
        if path.name != tag:
            shutil.rmtree(path)
    for path in (*folder.glob(".*.tmp*"), *folder.glob("state/.*.tmp*")):
        path.unlink()


def _without_enums(value: Any) -> Any:
    """`value`, enums within its dicts replaced by what they stand for.

    Some Pythons (3.11.2) pickle them by a call of `getattr`, which no reader should allow.
    """
    if type(value) is dict:
        return {key: _without_enums(inner) for key, inner in value.items()}
    return value.value if isinstance(value, Enum) else value
