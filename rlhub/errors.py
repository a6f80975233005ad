"""Errors that a user can act on. Each message is one line with the offending value and the fix; the command line exits with 2."""


class UserError(ValueError):
    """Base of everything that is reported as one clear line without a traceback."""


class RecipeError(UserError):
    """A recipe cannot be used as written."""


class DataError(UserError):
    """A data file is missing or malformed."""


class CheckpointError(UserError):
    """A checkpoint or run folder is missing, corrupt or does not fit."""


class SyncError(RuntimeError):
    """Published and received weights differ, or rollouts come from older weights than they may."""


class WorkerLost(RuntimeError):
    """A worker died or stopped answering."""


class WorkerHung(WorkerLost):
    """A worker passed the deadline of its work and was ended."""
