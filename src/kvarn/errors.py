"""The errors kvarn raises. Each says what was wrong and what to do about it."""


class KvarnError(Exception):
    """Base of all errors that kvarn raises on purpose."""


class RecipeError(KvarnError, ValueError):
    """A recipe that cannot be read, names an unknown method or parameter, or whose parts cannot act together."""


class BudgetError(KvarnError, ValueError):
    """A budget that is malformed, or smaller than the least the recipe can do."""


class OutOfMemory(KvarnError, MemoryError):
    """A pool would exceed its byte ceiling. Nothing was changed."""


class Unsupported(KvarnError, NotImplementedError):
    """A model, an attention variant or an operation that kvarn does not do."""


class CacheMismatch(KvarnError, ValueError):
    """A cache used with another model, batch or attention function than it was made for, or after it was freed."""


class PromptTooLong(KvarnError, ValueError):
    """More tokens than the model has positions for."""


class Refused(KvarnError, ValueError):
    """A request that an engine can never answer, and why."""


class ModelNotFound(KvarnError, FileNotFoundError):
    """A model's files are missing, incomplete or damaged."""


class CalibrationError(KvarnError, ValueError):
    """A method that was not calibrated for a model, or a calibration that does not belong to it."""
