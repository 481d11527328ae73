"""The errors a user can cause. Each names the value that was wrong and what would work; the command line turns them into exit code 2.

And two with a word for what went wrong elsewhere: a rank that is gone, and a block manager of the user's that fails.
"""


class InputError(ValueError):
    """A request, file or setting that cannot be used, found before anything was changed."""


class ModelError(InputError):
    """A model that cannot be found, read or trusted."""


class RequestError(InputError):
    """A request that this engine can never serve (empty, too long, larger than the pool)."""


class RankError(RuntimeError):
    """One of the processes that share a model died, hangs or failed: nothing can be run any more. The text says which and why."""


class BlockManagerError(RuntimeError):
    """The user's own block manager failed in the middle of a run. The text names its class, the call, the line and what was wrong."""


class TraceError(InputError):
    """A record stream that is none, is damaged before its first keyframe, or is newer than this reader."""
