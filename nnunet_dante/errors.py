"""The exception tree: every error this package raises on purpose derives from DanteError."""


class DanteError(Exception):
    """Base of all errors of nnunet_dante: the message names the thing, its value, what is allowed, what to do."""


class ConfigurationError(DanteError, ValueError):
    """An argument, option or block of the plans has a value that cannot work."""


class UnsupportedVersionError(DanteError):
    """Python, nnU-Net or PyTorch is installed in a version this package was not made for."""


class DonorError(DanteError):
    """A model folder, zip or checkpoint cannot be read as a pretrained nnU-Net."""


class UntrustedFileError(DonorError):
    """A file would have to execute code to be read; nothing was executed."""


class DatasetError(DanteError):
    """A folder cannot be turned into an nnU-Net data set: what is wrong with which case, and what to do."""


class TransferError(DanteError):
    """The donor model cannot be moved to the target data set."""


class InjectionError(DanteError):
    """Low-rank adapters cannot be added to, or removed from, this network."""


class GradientAuditError(DanteError):
    """A parameter that should be trained receives no gradient."""


class NonFiniteError(DanteError):
    """A training has produced NaN or infinite numbers; the checkpoints on disk are from before."""


class StorageError(DanteError):
    """A file cannot be written: the disk is full, or the folder cannot be written to."""


class AdapterError(DanteError):
    """An adapter file is damaged, or does not belong to this base."""


class StrengthError(DanteError, ValueError):
    """The strength of an update cannot be chosen or set: a value out of range, or start weights that do not fit."""


class DafneError(DanteError):
    """A Dafne .model file cannot be written or read."""


class ResultError(DanteError):
    """The result of a run, or a fold folder to be compared, is missing, damaged or of another format."""


class FederationError(DanteError):
    """A federation cannot be made, joined or run: settings, files or messages that do not belong together."""
