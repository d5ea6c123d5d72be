"""The errors of the pipeline, grouped by what their handler does.

    LatentmillError
    |- SampleError          reject: this sample or clip is recorded with `reason` and the job goes on
    |  |- DecodeError       the video cannot be read as asked
    |- UnitError            retry: the unit failed for a cause outside its clips (storage, a shard that cannot be read
    |                       at the moment, a lost worker)
    |- JobError             stop: nothing that a retry could change
       |- UsageError        a flag or file of the user's is wrong; exit code 2
       |- MismatchError     the store was made with another recipe, plan or format; names the fields
       |- ShardError        a shard is not there, is none, or changed since it was planned
       |- StoreError        the store is damaged or cannot be written
       |- FailureLimitError more clips failed than the job allows

Every message says what, where (file, key, field), the value met, and what to do. `SampleError.reason` is a stable
snake_case word for the ledger; `str(error)` is the sentence.
"""

from __future__ import annotations


class LatentmillError(Exception):
    """The root of all errors that latentmill raises on purpose."""


class SampleError(LatentmillError):
    """One sample or clip is to be recorded as failed, with a stable reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class DecodeError(SampleError):
    """A video or image cannot be decoded as asked."""


class UnitError(LatentmillError):
    """A unit failed for a cause outside its clips; it may be tried again."""


class JobError(LatentmillError):
    """The job must stop."""


class UsageError(JobError):
    """A flag, a path or a file that the user gave is wrong."""


class MismatchError(JobError):
    """The store was made with another recipe, plan or format version than this command asks for."""


class ShardError(JobError):
    """A shard cannot be read, or is no longer what was planned."""


class StoreError(JobError):
    """The store is damaged or cannot be written."""


class FailureLimitError(JobError):
    """More clips failed than the job allows."""
