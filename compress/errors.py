"""The two ways a run can stop: the user's mistake (exit 2) and hardware or numbers (exit 1)."""


class UserError(ValueError):
    """Something the user can mend: a recipe, a path, a model. The message says where, got, wanted, what to do."""


class NumericsError(RuntimeError):
    """Numbers that no setting of the recipe foresaw: non-finite activations, a matrix no damping makes definite."""


class VerificationError(RuntimeError):
    """What was written does not reload as the model that was meant."""
